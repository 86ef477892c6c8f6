// Clocks and the machine's load, without the GIL.
#pragma once

#include "wakeup.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#include <sys/resource.h>
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

// The cores that the calling thread may run on; a mask as large as the machine needs.
class OwnCores {
#if defined(__linux__)
  public:
    OwnCores() {
        for (int n = 1024; n <= 1 << 16; n *= 2) {
            set = CPU_ALLOC(n);
            if (set == nullptr) return;
            size = CPU_ALLOC_SIZE(n);
            if (sched_getaffinity(0, size, set) == 0) return;
            CPU_FREE(set);
            set = nullptr;
        }
    }
    ~OwnCores() {
        if (set != nullptr) CPU_FREE(set);
    }
    OwnCores(const OwnCores &) = delete;
    OwnCores & operator=(const OwnCores &) = delete;

    bool known() const { return set != nullptr; }
    bool has(int core) const { return set == nullptr || CPU_ISSET_S(core, size, set); }
    int count() const { return set == nullptr ? 0 : CPU_COUNT_S(size, set); }

  private:
    cpu_set_t * set = nullptr;
    size_t size = 0;
#endif
};

// How many of this process's cores other processes of usual priority kept busy since the last call: what happens on
// cores that it may not use is nothing to it. Negative: this system does not say.
class NeighbourLoad {
  public:
    double read() {
#if defined(__linux__)
        uint64_t busy = 0;
        const OwnCores own_cores;
        if (!read_busy("/proc/stat", own_cores, busy)) return -1.0;
        timespec t;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
        const uint64_t own = (uint64_t) t.tv_sec * 1000000000ull + (uint64_t) t.tv_nsec;
        const uint64_t now = now_ns();
        double load = 0.0;
        // Of other cores than last time there is nothing to compare with.
        if (last_time != 0 && now > last_time && n_cores == own_cores.count()) {
            const double all = (double) (busy - last_busy) * 1e9 / (double) sysconf(_SC_CLK_TCK);
            // The process's own time is among the ticks unless it runs at a low priority itself.
            const double ours = getpriority(PRIO_PROCESS, 0) > 0 ? 0.0 : (double) (own - last_own);
            load = busy < last_busy ? 0.0 : (all - ours) / (double) (now - last_time);
        }
        n_cores = own_cores.count();
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

    // Cores that this process might use at the last read(); 0: unknown.
    int cores() const { return n_cores; }

    // Ticks that the process's cores were busy, since the machine started. False: the file does not say.
    static bool read_busy(const char * path, const OwnCores & own_cores, uint64_t & busy) {
#if defined(__linux__)
        // "cpuN user nice system idle iowait irq softirq steal guest guest_nice" for each core, in ticks, after a line
        // "cpu …" with the sums.
        std::FILE * file = std::fopen(path, "re");
        if (file == nullptr) return false;
        char line[512];
        uint64_t sum = 0, all = 0;
        bool any = false, found = false;
        while (std::fgets(line, sizeof(line), file) != nullptr && std::strncmp(line, "cpu", 3) == 0) {
            unsigned long long v[8] = { 0 };
            int core = -1;
            const bool one = line[3] != ' ';
            const int n = one ? std::sscanf(line, "cpu%d %llu %llu %llu %llu %llu %llu %llu %llu", &core,
                                            &v[0], &v[1], &v[2], &v[3], &v[4], &v[5], &v[6], &v[7]) - 1
                              : std::sscanf(line, "cpu %llu %llu %llu %llu %llu %llu %llu %llu",
                                            &v[0], &v[1], &v[2], &v[3], &v[4], &v[5], &v[6], &v[7]);
            if (n < 4) continue;
            // Not v[1]: who runs at a low priority yields to the decodes. Fewer threads would hand it the core that it
            // does not ask for; one that disturbs nevertheless shows in the times of the decodes.
            const uint64_t ticks = v[0] + v[2] + v[5] + v[6] + v[7];
            if (!one) {
                all = ticks;
                any = true;
            } else if (own_cores.known() && own_cores.has(core)) {
                sum += ticks;
                found = true;
            }
        }
        std::fclose(file);
        // A container may be shown cores by numbers of their own: then the sum is all there is.
        busy = found ? sum : all;
        return found || any;
#else
        (void) path, (void) own_cores, (void) busy;
        return false;
#endif
    }

  private:
    uint64_t last_time = 0, last_busy = 0, last_own = 0;
    int n_cores = 0;
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
