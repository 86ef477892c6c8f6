// What threads share in mullama/_core, without Python: driven hard, and compiled with sanitizers by test_native_threads.py.
//
//     threads ring|page|arbiter|governor|deadline|log   the subject; status 0 when every value that was read is right
//     threads race                             two threads write one word: a run that the sanitizer must refuse
//     threads overrun                          reads behind an allocation: the same for addresses
//     threads overflow                         a signed overflow: the same for undefined behaviour
#include "arbiter.h"
#include "clock.h"
#include "governor.h"
#include "log_sink.h"
#include "page_write.h"
#include "ring.h"
#include "wakeup.h"

#include <poll.h>

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

using namespace mullama;

#define CHECK(condition)                                                               \
    do {                                                                               \
        if (!(condition)) {                                                            \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);       \
            std::_Exit(1);                                                             \
        }                                                                              \
    } while (0)

// Until the returned threads are joined, each runs one of the functions.
static void together(const std::vector<std::function<void()>> & parts) {
    std::vector<std::thread> threads;
    for (const auto & part : parts) threads.emplace_back(part);
    for (auto & thread : threads) thread.join();
}

// --- the ring, and the descriptor that wakes its reader -------------------------------------------------------------

static uint8_t byte_of(uint64_t handle, size_t i) { return (uint8_t) (handle * 31 + i); }

static uint32_t length_of(uint64_t handle) { return (uint32_t) (handle * 2654435761u >> 7) % 200; }

static void ring() {
    constexpr uint64_t N = 10000;
    Ring ring(1024); // a few records: it is full and wraps all the time
    Wake wake;
    CHECK(wake.open());
    Flag done;
    const auto engine = [&] {
        uint8_t text[200];
        for (uint64_t handle = 1; handle <= N; ++handle) {
            const uint32_t n = length_of(handle);
            for (uint32_t i = 0; i < n; ++i) text[i] = byte_of(handle, i);
            RecordHeader header = {};
            header.kind = handle % 7 == 0 ? RECORD_FINISH : RECORD_TEXT;
            header.n_tokens = (uint16_t) (handle & 0xFFFF);
            header.handle = handle;
            while (!ring.push(header, &n, sizeof n, text, n)) {
                wake.signal();
                std::this_thread::yield();
            }
            if (handle % 16 == 0) wake.signal();
        }
        wake.signal();
    };
    const auto reader = [&] {
        uint64_t expected = 1;
        while (expected <= N) {
            pollfd waiting = { wake.read_fd, POLLIN, 0 };
            CHECK(poll(&waiting, 1, 20000) == 1);
            wake.clear();
            while (const RecordHeader * header = ring.peek()) {
                const auto * body = (const uint8_t *) header + sizeof *header;
                uint32_t n;
                std::memcpy(&n, body, sizeof n);
                CHECK(header->handle == expected);
                CHECK(header->kind == (expected % 7 == 0 ? RECORD_FINISH : RECORD_TEXT));
                CHECK(n == length_of(expected));
                for (uint32_t i = 0; i < n; ++i) CHECK(body[sizeof n + i] == byte_of(expected, i));
                ring.pop();
                expected++;
            }
        }
        CHECK(ring.peek() == nullptr && ring.used() == 0);
        done.set(1);
    };
    const auto observer = [&] {
        while (!done.get()) CHECK(ring.used() <= ring.capacity());
    };
    together({ engine, reader, observer });
    wake.close();
    CHECK(wake.read_fd == -1);
}

// --- the page: one writer, readers that keep to the law in abi.h ----------------------------------------------------

static uint64_t load(const uint64_t * word, std::memory_order order) {
    return reinterpret_cast<const std::atomic<uint64_t> *>(word)->load(order);
}

// Copy words; false when the writer was inside.
static bool copy(const uint64_t * from, uint64_t * to, size_t n) {
    to[0] = load(from, std::memory_order_acquire);
    for (size_t i = 1; i < n; ++i) to[i] = load(from + i, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_acquire);
    return load(from, std::memory_order_relaxed) == to[0];
}

template <typename Block> static bool read_block(const Block & block, Block & out) {
    constexpr size_t n = sizeof(Block) / 8;
    uint64_t words[n];
    if (!copy((const uint64_t *) &block, words, n) || words[0] & 1) return false;
    uint64_t sum = 0;
    for (size_t i = 1; i + 1 < n; ++i) sum += words[i];
    std::memcpy(&out, words, sizeof out);
    return sum == words[n - 1];
}

static bool read_event(const mullama_event & slot, uint64_t index, mullama_event & out) {
    uint64_t words[sizeof(mullama_event) / 8];
    if (!copy((const uint64_t *) &slot, words, sizeof words / 8) || words[0] != index + 1) return false;
    std::memcpy(&out, words, sizeof out);
    return true;
}

static void page() {
    constexpr uint64_t N = 20000;
    constexpr uint32_t EVENTS = 8;
    static mullama_header header;
    static mullama_counters counters;
    static mullama_row row;
    static mullama_event events[EVENTS];
    std::atomic<uint64_t> accepted{0};
    const auto engine = [&] {
        for (uint64_t i = 1; i <= N; ++i) {
            mullama_event event = {};
            event.time_ns = i * 3;
            event.handle = i;
            event.kind = (uint32_t) i;
            event.slot = (int32_t) i;
            event.a = (int64_t) i;
            event.b = -(int64_t) i;
            publish_event(events, EVENTS, i - 1, event);
            mullama_row now = {};
            now.handle = now.prefill_ns = now.decode_ns = i;
            now.kv_cell_ns = i * 5;
            now.preemptions = now.moves = (uint32_t) i;
            publish(&row, now);
            mullama_counters all = {};
            all.steps = all.ubatches = all.kv_hit_tokens = all.events = i;
            all.adapter_ubatches = i * 7;
            publish(&counters, all);
        }
        publish_word(&header.closed_ns, 1);
    };
    const auto reader = [&] {
        uint64_t last_steps = 0, last_row = 0, n = 0;
        while (load(&header.closed_ns, std::memory_order_acquire) == 0) {
            mullama_counters c;
            if (read_block(counters, c)) {
                CHECK(c.steps == c.ubatches && c.steps == c.kv_hit_tokens && c.adapter_ubatches == c.steps * 7);
                CHECK(c.steps >= last_steps);
                last_steps = c.steps;
                n++;
                mullama_event event;
                for (uint64_t i = c.events > EVENTS ? c.events - EVENTS : 0; i < c.events; ++i) {
                    if (!read_event(events[i & (EVENTS - 1)], i, event)) continue;
                    CHECK(event.handle == i + 1 && event.time_ns == (i + 1) * 3 && event.kind == i + 1);
                    CHECK(event.slot == (int32_t) (i + 1) && event.a == (int64_t) (i + 1) && event.b == -(int64_t) (i + 1));
                    n++;
                }
            }
            mullama_row r;
            if (read_block(row, r)) {
                CHECK(r.handle == r.prefill_ns && r.handle == r.decode_ns && r.kv_cell_ns == r.handle * 5);
                CHECK(r.preemptions == r.handle && r.moves == r.handle && r.handle >= last_row);
                last_row = r.handle;
                n++;
            }
        }
        accepted += n;
    };
    together({ engine, reader, reader });
    mullama_counters c;
    CHECK(read_block(counters, c) && c.steps == N && c.adapter_ubatches == N * 7);
    std::printf("%" PRIu64 " copies were accepted while it was written\n", accepted.load());
}

// --- the arbiter ----------------------------------------------------------------------------------------------------

static void arbiter() {
    constexpr int ENGINES = 4, TURNS = 1500;
    TurnTable table;
    Flag done, never;
    std::atomic<int> working{ENGINES};
    uint64_t turns = 0, inside = 0; // no atomics: the turn itself is what keeps them
    const auto engine = [&] {
        int seat = table.join();
        for (int i = 0; i < TURNS; ++i) {
            CHECK(table.acquire(seat, never));
            CHECK(++inside == 1);
            turns++;
            inside--;
            table.release(seat, 1000 + i);
            if (i % 100 == 99) { // unloaded and loaded again
                table.leave(seat);
                seat = table.join();
            }
        }
        table.leave(seat);
        if (--working == 0) done.set(1);
    };
    // A model that is unloaded while it waits gives up, and whoever holds the turn meanwhile keeps it.
    const auto fickle = [&] {
        while (!done.get()) {
            Flag stop;
            const int seat = table.join();
            std::thread other([&] { stop.set(1); });
            if (table.acquire(seat, stop)) {
                CHECK(++inside == 1);
                inside--;
                table.release(seat, 10);
            }
            other.join();
            table.leave(seat);
        }
    };
    const auto operator_ = [&] {
        int i = 0;
        while (!done.get()) {
            table.policy.store(++i % 3);
            for (const SeatUse & use : table.uses()) {
                table.share(use.id, 0.5 + use.id % 3, use.id % 5);
                (void) table.busy_beside(use.id, 1000);
            }
            (void) table.taken();
            std::this_thread::yield();
        }
    };
    std::vector<std::function<void()>> parts(ENGINES, engine);
    parts.push_back(fickle);
    parts.push_back(operator_);
    together(parts);
    CHECK(turns == (uint64_t) ENGINES * TURNS);
    CHECK(table.uses().empty());
}

// --- the governor: the event loop looks while the engine thread decides ---------------------------------------------

// Two decodes that were given up leave for one thread, and work after idling takes two again: so two threads are settled
// on after an even number of changes, and one after an odd number. A view of two moments says something else.
static void governor() {
    constexpr uint64_t VIEWS = 30000, CHANGES = 100000, MS = 1000000;
    Governor governor(2, false, 2);
    std::atomic<uint64_t> changes{0};
    std::atomic<int> looking{2};
    const auto engine = [&] {
        for (uint64_t now = 1000 * MS; looking != 0; now += MS) {
            governor.record(1, 2, MS, true, now);
            governor.record(1, 2, MS, true, now); // twice: down to 1
            governor.wake(0.0, now);              // up to 2
            changes = governor.n_changes();
        }
    };
    const auto event_loop = [&] {
        for (uint64_t n = 0; n < VIEWS || changes < CHANGES; ++n) {
            const Governor::View view = governor.view();
            CHECK((view.threads == 2) == (view.changes % 2 == 0));
        }
        looking--;
    };
    together({ engine, event_loop, event_loop });
}

// --- giving up a decode: the abort callback beside other threads ----------------------------------------------------

static void deadline() {
    for (int round = 0; round < 200; ++round) {
        Deadline deadline;
        Wake wake;
        CHECK(wake.open());
        const auto decode = [&] {
            deadline.wake = &wake; // once inside the next graph, then no more
            while (!Deadline::expired(&deadline)) {}
            CHECK(deadline.wake == nullptr);
        };
        const auto reader = [&] {
            pollfd waiting = { wake.read_fd, POLLIN, 0 };
            CHECK(poll(&waiting, 1, 20000) == 1);
            wake.clear();
            wake.clear(); // an empty one does not block
            deadline.stop.set(1);
        };
        const auto look = [&] {
            // Each engine has a NeighbourLoad of its own.
            NeighbourLoad load;
            load.read();
            load.read();
            CHECK(load.cores() >= 0);
        };
        if (round % 50 == 0) together({ decode, reader, look, look });
        else together({ decode, reader });
        wake.close();
    }
}

// --- llama.cpp's log lines, which come from every thread ------------------------------------------------------------

static void log_lines() {
    LogSink sink;
    const auto engine = [&] {
        for (int i = 0; i < 4000; ++i) {
            LogSink::receive(i % 3 ? GGML_LOG_LEVEL_INFO : GGML_LOG_LEVEL_ERROR, "a line\n", &sink);
            LogSink::receive(GGML_LOG_LEVEL_CONT, ".", &sink);
        }
    };
    const auto loader = [&] {
        for (int i = 0; i < 2000; ++i) {
            sink.print_level = i % 2 ? GGML_LOG_LEVEL_NONE : GGML_LOG_LEVEL_ERROR + 10; // never prints
            const std::string taken = sink.take_errors();
            CHECK(taken.size() < 2100 && taken.size() % 7 == 0);
        }
    };
    together({ engine, engine, loader });
}

// --- that the sanitizer is at work ----------------------------------------------------------------------------------

static int word;

static void race() {
    const auto write = [] { for (int i = 0; i < 1000; ++i) word += i; };
    together({ write, write });
}

static void overrun(int n) {
    std::vector<uint8_t> bytes(8);
    std::printf("%d\n", bytes.data()[n]);
}

static void overflow(int n) { std::printf("%d\n", 0x7FFFFFFF + n); }

int main(int argc, char ** argv) {
    const std::string subject = argc == 2 ? argv[1] : "";
    if (subject == "ring") ring();
    else if (subject == "page") page();
    else if (subject == "arbiter") arbiter();
    else if (subject == "governor") governor();
    else if (subject == "deadline") deadline();
    else if (subject == "log") log_lines();
    else if (subject == "race") race();
    else if (subject == "overrun") overrun(argc * 4 + (int) subject.size());
    else if (subject == "overflow") overflow(argc);
    else return 2;
    return 0;
}
