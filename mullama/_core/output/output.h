// What the engine thread tells: records for the reader (ring.h), whom wakeup.h wakes, and the page (page_write.h) that
// anybody may look at. Nothing here knows of Python.
#pragma once

#include "clock.h"
#include "page_write.h"
#include "ring.h"
#include "wakeup.h"

#include <cstdint>
#include <string>

namespace mullama {

// Where the blocks of a page lie. A Page (page.pyx) has the mapping; nullptr: there is none, or none any more.
struct PageBlocks {
    mullama_counters * counters = nullptr;
    mullama_row * rows = nullptr;
    mullama_event * events = nullptr;
    uint32_t n_events = 0;
};

class Output {
  public:
    static constexpr uint32_t RING_BYTES = 1 << 20;

    Ring ring{RING_BYTES};
    Wake wake;
    PageBlocks page;
    mullama_counters counters = {};
    bool pushed = false;        // records since the last wake-up
    const Flag * stop = nullptr; // of the core that has it: a full ring is waited for no longer

    // A named call site: writes the event. Hooks attach here and nowhere else.
    void site(uint32_t kind, int32_t slot, uint64_t handle, int64_t a, int64_t b) {
        mullama_event event = {};
        event.time_ns = now_ns();
        event.handle = handle;
        event.kind = kind;
        event.slot = slot;
        event.a = a;
        event.b = b;
        if (page.events != nullptr) publish_event(page.events, page.n_events, counters.events, event);
        counters.events++;
    }

    // Put a record into the ring; a full ring stalls the engine (counted), it never drops. False: told to stop.
    bool push(const RecordHeader & header, const void * body, uint32_t n, const void * tail, uint32_t n_tail) {
        pushed = true;
        if (ring.push(header, body, n, tail, n_tail)) return true;
        const uint64_t start = now_ns();
        counters.ring_stalls++;
        while (!ring.push(header, body, n, tail, n_tail)) {
            if (stop->get()) return false;
            wake.signal();
            sleep_us(100);
        }
        const uint64_t stalled_ns = now_ns() - start;
        counters.ring_stall_ns += stalled_ns;
        site(MULLAMA_SITE_RING_STALL, -1, header.handle, stalled_ns, 0);
        return true;
    }

    // A text that `n_tokens` complete. Records are padded to 8 bytes, so its own length goes first.
    void push_text(uint64_t handle, uint16_t n_tokens, const std::string & text) {
        const RecordHeader header = { 0, RECORD_TEXT, n_tokens, handle };
        const uint32_t size = (uint32_t) text.size();
        push(header, &size, sizeof size, text.data(), size);
    }

    // What is to be known of a token: RECORD_TOKEN or RECORD_PROMPT.
    void push_token(RecordKind kind, uint64_t handle, const std::string & packed) {
        push({ 0, kind, 0, handle }, packed.data(), (uint32_t) packed.size(), nullptr, 0);
    }

    void push_finish(const mullama_row & row, int32_t stop_index, int32_t error, int32_t stop_token) {
        const RecordHeader header = { 0, RECORD_FINISH, 0, row.handle };
        const FinishBody body = { row.finish_reason, stop_index, error, stop_token };
        push(header, &body, sizeof body, &row, sizeof row);
    }

    void put_row(uint32_t index, const mullama_row & row) {
        if (page.rows != nullptr) publish(page.rows + index, row);
    }

    void put_counters() {
        counters.heartbeat_ns = now_ns();
        if (page.counters != nullptr) publish(page.counters, counters);
    }
};

} // namespace mullama
