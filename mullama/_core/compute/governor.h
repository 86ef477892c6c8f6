// How many threads the next decode uses, from measured step times. No clock and no thread inside: time (ns) and load
// (cores) are passed in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace mullama {

// A number that one thread changes and others look at.
template <typename T> class Shown {
  public:
    operator T() const { return value.load(std::memory_order_relaxed); }
    Shown & operator=(T v) {
        value.store(v, std::memory_order_relaxed);
        return *this;
    }

  private:
    std::atomic<T> value{};
};

class Governor {
  public:
    static constexpr int MAX_THREADS = 64, N_SHAPES = 16;
    static constexpr int FIRST_LARGE_SHAPE = 8; // shapes of more than 8 tokens hold ns a token

    // What others see of it, all of one moment. Costs by thread count and shape, 0: unknown.
    struct View {
        int threads, n_cores;
        uint64_t changes;
        bool on_trial;
        double neighbours; // cores that others use; -1: unknown
        double cost[MAX_THREADS + 1][N_SHAPES];
    };

    Governor(int n_max, bool fixed, int n_cores)
        : n_max(std::min(std::max(n_max, 1), +MAX_THREADS)), fixed(fixed || this->n_max == 1) {
        this->n_cores = n_cores > 0 ? n_cores : this->n_max;
        threads = this->n_max;
        neighbours = -1.0;
    }

    const int n_max; // most threads it may choose
    const bool fixed;

    // -- the engine thread's side -------------------------------------------------------------------------------

    int threads_for(int n_tokens) const {
        // PERF: fewer threads are tried with single tokens only; a prompt chunk on one thread can cost half a second.
        if (trial > threads || (trial != 0 && n_tokens <= FIRST_LARGE_SHAPE)) return trial;
        return threads;
    }

    // Ns that a decode on the present threads should cost; 0 when nothing is known of the shape.
    double expected(int n_tokens) const { return expected(n_tokens, threads); }

    // Ns after which a decode should be given up and run again with one thread; 0: never.
    uint64_t allowance(int n_tokens) const {
        const int on = threads_for(n_tokens);
        if (fixed || on == 1) return 0;
        double usual = expected(n_tokens, on);
        const double before = recent[trial_from][shape_of(n_tokens)];
        if (on == trial && before > 0) return (uint64_t) (before * unit_of(n_tokens) * 1.5) + 2 * MS;
        if (usual <= 0) usual = expected(n_tokens, 1);
        if (usual > 0) return (uint64_t) (usual * 3.0) + 10 * MS;
        // Nothing is known of this shape: so many single tokens on one thread cost no less.
        const double bound = single_bound(n_tokens);
        return bound > 0 ? (uint64_t) (bound * 1.5) + 10 * MS : 0;
    }

    // Work begins after idling, while others used `cores` (-1: unknown): take all the threads there was room for. Never
    // fewer: who was busy a moment ago may have waited for this very answer. If they are busy still, the first decode's
    // allowance tells.
    void wake(double cores, uint64_t now) {
        if (fixed || cores < 0 || trial != 0) return;
        const Writing writing(*this);
        neighbours = cores;
        next_look_ns = now + LOOK_NS;
        crowded_looks = free_looks = 0;
        if (room(cores) > threads) settle(room(cores));
    }

    // A decode has ended, or was given up at its deadline.
    void record(int n_tokens, int on, uint64_t ns, bool aborted, uint64_t now) {
        const Writing writing(*this);
        const int s = shape_of(n_tokens);
        if (aborted) return record_abort(on, s, now);
        const double cost = (double) ns / unit_of(n_tokens);
        const double old = quiet[on][s];
        recent[on][s] = recent[on][s] == 0 ? cost : recent[on][s] + 0.3 * (cost - recent[on][s]);
        if (old == 0) {
            quiet[on][s] = cost;
            outliers[on][s] = 0;
        } else if (cost > 1.6 * old) {
            if (++outliers[on][s] >= 16) {
                // Not a spell: the work itself grew (a longer context).
                quiet[on][s] = recent[on][s];
                outliers[on][s] = 0;
            }
        } else {
            quiet[on][s] += 0.1 * (cost - old);
            outliers[on][s] = 0;
        }
        if (fixed) return;
        if (trial != 0 && on == trial) {
            if (--trial_left <= 0) {
                const double before = recent[trial_from][s];
                end_trial(before == 0 || recent[trial][s] < before * 0.99, now);
            }
        } else if (trial == 0 && on > 1 && on == threads && now >= hold_down_until_ns) {
            const double single = quiet[1][s] > 0 ? quiet[1][s] : single_bound(n_tokens) / unit_of(n_tokens);
            if (outliers[on][s] >= 3 || (single > 0 && recent[on][s] > 1.3 * single)) start_trial(1);
        }
    }

    bool wants_look(uint64_t now) const { return !fixed && now >= next_look_ns; }

    // Take note of the cores that other processes kept busy since the last look; -1: unknown.
    void look(double cores, uint64_t now) {
        const Writing writing(*this);
        next_look_ns = now + LOOK_NS;
        neighbours = cores;
        if (trial != 0 || fixed) return;
        const int most = room(std::max(cores, 0.0)); // unknown: only trials tell
        if (most < threads) {
            free_looks = 0;
            if (++crowded_looks >= LOOKS_TO_ACT && now >= hold_down_until_ns) {
                crowded_looks = 0;
                start_trial(most);
            }
        } else if (most > threads) {
            crowded_looks = 0;
            if (++free_looks >= LOOKS_TO_ACT && now >= hold_until_ns) {
                free_looks = 0;
                start_trial(most);
            }
        } else {
            crowded_looks = free_looks = 0;
        }
    }

    void set_cores(int n) {
        const Writing writing(*this);
        n_cores = n;
    }

    // Ns that a decode of `n_tokens` costs on the present threads, by the nearest shape known; 0: none is.
    double cost(int n_tokens) const {
        const int wanted = shape_of(n_tokens);
        for (int away = 0; away < N_SHAPES; ++away) {
            for (const int s : { wanted - away, wanted + away }) {
                const double known = 0 <= s && s < N_SHAPES ? +recent[threads][s] : 0.0;
                if (known > 0) return s == wanted ? known * unit_of(n_tokens) : per_token(known, s) * n_tokens;
            }
        }
        return 0.0;
    }

    uint64_t n_changes() const { return changes; }

    // -- everybody's ---------------------------------------------------------------------------------------------

    // Any thread, at any time. It waits only while the engine thread is between two of these numbers.
    View view() const {
        View found;
        while (true) {
            const uint64_t before = version.load(std::memory_order_acquire);
            found.threads = threads;
            found.n_cores = n_cores;
            found.on_trial = trial != 0;
            found.neighbours = neighbours;
            for (int t = 0; t <= MAX_THREADS; ++t) {
                for (int s = 0; s < N_SHAPES; ++s) found.cost[t][s] = t <= n_max ? +recent[t][s] : 0.0;
            }
            found.changes = changes;
            std::atomic_thread_fence(std::memory_order_acquire);
            if ((before & 1) == 0 && version.load(std::memory_order_relaxed) == before) return found;
            std::this_thread::yield();
        }
    }

  private:
    static constexpr uint64_t MS = 1000000;
    // The system counts CPU time in ticks of some 10 ms: a shorter window between looks would show noise.
    static constexpr uint64_t LOOK_NS = 200 * MS;
    static constexpr uint64_t STRIKE_NS = 500 * MS;
    static constexpr uint64_t MIN_HOLD_NS = 250 * MS;
    static constexpr uint64_t MAX_HOLD_UP_NS = 1000 * MS;    // a neighbour that left is noticed within two seconds
    static constexpr uint64_t MAX_HOLD_DOWN_NS = 16000 * MS; // one that does no harm is not asked about again and again
    static constexpr int TRIAL_DECODES = 3;
    static constexpr int LOOKS_TO_ACT = 2;

    // While it lives, the numbers that others see may be of two moments: the version is odd.
    struct Writing {
        explicit Writing(Governor & g) : version(g.version), begun(version.load(std::memory_order_relaxed)) {
            version.store(begun + 1, std::memory_order_relaxed);
            std::atomic_thread_fence(std::memory_order_release);
        }
        ~Writing() { version.store(begun + 2, std::memory_order_release); }
        Writing(const Writing &) = delete;
        Writing & operator=(const Writing &) = delete;

        std::atomic<uint64_t> & version;
        const uint64_t begun;
    };

    // 1 to 8 tokens have a shape each, then one a power of two.
    static int shape_of(int n_tokens) {
        if (n_tokens <= FIRST_LARGE_SHAPE) return n_tokens > 0 ? n_tokens - 1 : 0;
        int shape = FIRST_LARGE_SHAPE;
        for (int upper = 16; n_tokens > upper && shape < N_SHAPES - 1; upper *= 2) ++shape;
        return shape;
    }

    static double unit_of(int n_tokens) { return n_tokens <= FIRST_LARGE_SHAPE ? 1.0 : (double) n_tokens; }

    static double per_token(double cost, int shape) { return cost / (shape < FIRST_LARGE_SHAPE ? shape + 1.0 : 1.0); }

    // Threads that have a core each beside a load of `cores`; small loads (clients, the system) are shared.
    int room(double cores) const { return std::min(std::max(n_cores - (int) (cores + 0.35), 1), n_max); }

    double expected(int n_tokens, int on) const { return quiet[on][shape_of(n_tokens)] * unit_of(n_tokens); }

    // Ns that `n_tokens` should cost at most, by the nearest smaller shape known on one thread; 0: none is.
    double single_bound(int n_tokens) const {
        for (int s = shape_of(n_tokens); s >= 0; --s) {
            if (quiet[1][s] > 0) return per_token(quiet[1][s], s) * n_tokens;
        }
        return 0.0;
    }

    void settle(int n) {
        threads = n;
        changes = changes + 1;
    }

    void record_abort(int on, int shape, uint64_t now) {
        if (trial != 0) end_trial(false, now);
        if (on == threads && on > 1 && now - last_abort_ns < STRIKE_NS) {
            // Given up twice in a short time: leave at once, without a trial. Once may be anything.
            settle(1);
            hold_until_ns = now + MIN_HOLD_NS;
            free_looks = 0;
            quiet[on][shape] = 0.0; // out of date
            recent[on][shape] = 0.0;
        }
        last_abort_ns = now;
    }

    void start_trial(int n) {
        trial = n;
        trial_from = threads;
        trial_left = TRIAL_DECODES;
        // What this count cost in other times says nothing of now.
        for (int s = 0; s < N_SHAPES; ++s) recent[n][s] = 0.0;
    }

    void end_trial(bool keep, uint64_t now) {
        if (keep) {
            settle(trial);
            hold_up_ns = hold_down_ns = MIN_HOLD_NS;
        } else if (trial > trial_from) {
            hold_up_ns = std::min(hold_up_ns * 2, +MAX_HOLD_UP_NS);
        } else {
            hold_down_ns = std::min(hold_down_ns * 2, +MAX_HOLD_DOWN_NS);
        }
        hold_until_ns = now + hold_up_ns;
        hold_down_until_ns = now + hold_down_ns;
        trial = 0;
        crowded_looks = free_looks = 0;
    }

    // Seen by others, under the version.
    std::atomic<uint64_t> version{0};
    Shown<int> threads, n_cores;
    Shown<int> trial; // thread count on trial, 0: none
    Shown<uint64_t> changes;
    Shown<double> neighbours;
    Shown<double> recent[MAX_THREADS + 1][N_SHAPES]; // what a decode costs now; 0: unknown

    // The engine thread's alone.
    double quiet[MAX_THREADS + 1][N_SHAPES] = {}; // outliers left out: what a decode should cost
    int outliers[MAX_THREADS + 1][N_SHAPES] = {}; // in a row
    uint64_t next_look_ns = 0;
    int crowded_looks = 0; // looks in a row that wanted fewer threads
    int free_looks = 0;    // looks in a row that allowed more
    int trial_left = 0;    // decodes of the trial still to come
    int trial_from = 0;    // the count to go back to
    uint64_t hold_until_ns = 0;      // no trial of more threads before
    uint64_t hold_down_until_ns = 0; // no trial of fewer before
    uint64_t hold_up_ns = MIN_HOLD_NS, hold_down_ns = MIN_HOLD_NS;
    uint64_t last_abort_ns = 0;
};

} // namespace mullama
