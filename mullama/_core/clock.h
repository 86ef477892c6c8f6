// Clocks and the machine's load, without the GIL.
#pragma once

#include "wake.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>

#if defined(__linux__)
#include <time.h>
#include <unistd.h>
#endif

namespace mullama {

inline uint64_t now_ns() {
#if defined(__linux__)
    // Python's time.monotonic_ns() reads this clock too, so times compare.
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t) t.tv_sec * 1000000000ull + (uint64_t) t.tv_nsec;
#else
    return (uint64_t) std::chrono::duration_cast<std::chrono::nanoseconds>(
        std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

inline void sleep_us(int us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

// How many cores other processes of usual priority kept busy since the last call. Negative: this system does not say.
class NeighbourLoad {
  public:
    double read() {
#if defined(__linux__)
        uint64_t busy = 0;
        if (!read_busy(busy)) return -1.0;
        timespec t;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
        const uint64_t own = (uint64_t) t.tv_sec * 1000000000ull + (uint64_t) t.tv_nsec;
        const uint64_t now = now_ns();
        double load = 0.0;
        if (last_time != 0 && now > last_time) {
            const double all = (double) (busy - last_busy) * 1e9 / (double) sysconf(_SC_CLK_TCK);
            load = (all - (double) (own - last_own)) / (double) (now - last_time);
        }
        last_time = now;
        last_busy = busy;
        last_own = own;
        return load < 0.0 ? 0.0 : load;
#else
        return -1.0;
#endif
    }

    // Time since the last read().
    uint64_t age_ns() const { return last_time == 0 ? 0 : now_ns() - last_time; }

  private:
    uint64_t last_time = 0, last_busy = 0, last_own = 0;

#if defined(__linux__)
    static bool read_busy(uint64_t & busy) {
        // First line only: "cpu user nice system idle iowait irq softirq steal guest guest_nice", in ticks.
        std::FILE * file = std::fopen("/proc/stat", "re");
        if (file == nullptr) return false;
        unsigned long long v[8] = { 0 };
        const int n = std::fscanf(file, "cpu %llu %llu %llu %llu %llu %llu %llu %llu",
                                  &v[0], &v[1], &v[2], &v[3], &v[4], &v[5], &v[6], &v[7]);
        std::fclose(file);
        if (n < 4) return false;
        // Not v[1]: who runs at a low priority yields to the decodes. Fewer threads would hand it the core that it does
        // not ask for; one that disturbs nevertheless shows in the times of the decodes.
        busy = v[0] + v[2] + v[5] + v[6] + v[7];
        return true;
    }
#endif
};

// A word that one thread sets and another reads.
struct Flag {
    std::atomic<int> value{0};

    void set(int v) { value.store(v, std::memory_order_release); }
    int get() const { return value.load(std::memory_order_acquire); }
};

// What the abort callback of a decode looks after; ggml asks on the calling thread after every node, some 700 times a
// token. It holds the decode to its deadline, and wakes the reader of the last step's tokens: a reader that is woken
// between two graphs takes the engine thread's core, and all compute waits.
struct Deadline {
    uint64_t at_ns = 0;      // 0: none
    Flag stop;               // set from another thread: give up at once
    unsigned calls = 0;
    const Wake * wake = nullptr; // to signal from inside the next graph; set and cleared by the engine thread

    static bool expired(void * self) noexcept {
        auto * d = (Deadline *) self;
        if (d->wake != nullptr) {
            d->wake->signal();
            d->wake = nullptr;
        }
        if (d->stop.get()) return true;
        // PERF: the clock is read every 8th node.
        return d->at_ns != 0 && (++d->calls & 7u) == 0 && now_ns() > d->at_ns;
    }
};

} // namespace mullama
