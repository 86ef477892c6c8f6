// What computes: the thread pool, the turn among engines, the governor and the deadline of a decode. Nothing here knows
// of Python.
#pragma once

#include "arbiter.h"
#include "clock.h"
#include "governor.h"
#include "guard.h"
#include "matching.h"
#include "pool.h"

#include "llama.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mullama {

enum class Trial { done, given_up, stopped, failed };

class Compute {
  public:
    Compute() = default;
    Compute(const Compute &) = delete;
    Compute & operator=(const Compute &) = delete;

    ~Compute() {
        if (batch.token != nullptr) llama_batch_free(batch);
    }

    // Belong to the engine thread, like all below, but for the two flags, which any thread may set.
    Deadline deadline;  // its flag: give up at once, and every turn and stall
    Flag interrupted;   // return after the step
    Governor * governor = nullptr;  // of the context in charge
    TurnTable * turns = nullptr;
    int seat = 0;       // among them; 0: none
    int threads = 1;    // that the context in charge has now
    bool can_abort = false;
    bool synchronous = true; // all compute is on the CPU
    llama_batch batch = {};
    Guard guard;
    NeighbourLoad neighbours;
    MaskWorker masks;   // of constraints, while the graph runs
    uint64_t busy_since = 0;  // end of the last step; 0 after idling
    std::atomic<uint64_t> switched_ns{0}; // last step of the old weights ended; 0: the new ones have taken one
    int code = 0;             // llama_decode's, of the last trial

    // An idle pool sleeps at once (poll 0): a spinning one takes the event loop's core. False: there is none.
    bool open(int n_threads, int n_batch) {
        ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
        params.poll = 0;
        params.paused = true;
        pool = pool_new(&params);
        threads = n_threads;
        synchronous = !llama_supports_gpu_offload();
        batch = llama_batch_init(n_batch, 0, 1);
        neighbours.read();
        return pool != nullptr;
    }

    // Contexts with these threads must be gone.
    void close() {
        masks.close();
        if (pool != nullptr) pool_free(pool);
        pool = nullptr;
        if (seat != 0) turns->leave(seat);
        seat = 0;
    }

    // Give a context these threads, the deadline and the thread count.
    void attach(llama_context * ctx) {
        llama_attach_threadpool(ctx, pool, pool);
        llama_set_abort_callback(ctx, Deadline::expired, &deadline);
        llama_set_n_threads(ctx, threads, threads);
    }

    void resume() {
        if (paused) pool_resume(pool);
        paused = false;
    }

    void pause() {
        if (!paused) pool_pause(pool);
        paused = true;
    }

    // Wait for the turn. False: told to stop.
    bool take_turn() { return turns->acquire(seat, deadline.stop); }

    void give_turn(uint64_t used_ns) { turns->release(seat, used_ns); }

    // Cores that neighbours kept busy since the last look (-1: unknown); the governor learns how many there are.
    double load() {
        const double cores = neighbours.read();
        if (neighbours.cores() > 0) governor->set_cores(neighbours.cores());
        return cores;
    }

    // Decode `n_tokens` from `pos` on as sequence 0 on so many threads, and let `on` know what that cost where `note`.
    // Given up: it took too long on these threads. The caller has the turn.
    Trial try_threads(llama_context * ctx, Governor & on, int n_threads, int pos, int n_tokens, bool note) {
        const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
        for (int i = 0; i < n_tokens; ++i) {
            put_token(i, std::max(llama_vocab_bos(vocab), 0), pos + i, 0, i == n_tokens - 1);
        }
        batch.n_tokens = n_tokens;
        const uint64_t allowance = n_threads > 1 && can_abort ? on.allowance(n_tokens) : 0;
        llama_set_n_threads(ctx, n_threads, n_threads);
        const uint64_t start = now_ns();
        deadline.at_ns = allowance != 0 ? start + allowance : 0;
        code = guarded_decode(ctx, batch, guard);
        llama_synchronize(ctx);
        const uint64_t end = now_ns();
        deadline.at_ns = 0;
        llama_set_n_threads(ctx, threads, threads);
        const bool aborted = code == 2 && allowance != 0;
        if (code != 0 && !aborted) return Trial::failed;
        if (aborted || note) on.record(n_tokens, n_threads, end - start, aborted, end);
        return aborted ? Trial::given_up : Trial::done;
    }

    // Fault the weights in and give a governor its first figures: single tokens, on one thread and on all. One comes
    // first and needs no luck; its cost is the measure that all threads must keep, also here. The context must be empty,
    // and is so again.
    Trial warm_up(llama_context * ctx, Governor & on, bool quick) {
        if (!take_turn()) return Trial::stopped;
        const uint64_t start = now_ns();
        const int n = quick ? 2 : 3;
        Trial got = Trial::done;
        if (!on.fixed) {
            for (int i = 0; i < n && got == Trial::done; ++i) got = try_threads(ctx, on, 1, i, 1, i > 0);
            if (!quick && got == Trial::done) got = try_threads(ctx, on, 1, n, WARM_UP_PREFILL, true);
            llama_memory_clear(llama_get_memory(ctx), false);
        }
        for (int i = 0; i < n && got == Trial::done; ++i) got = try_threads(ctx, on, on.n_max, i, 1, i > 0);
        llama_memory_clear(llama_get_memory(ctx), false);
        give_turn(now_ns() - start);
        return got;
    }

    void put_token(int row, llama_token token, llama_pos pos, llama_seq_id seq, bool logits) {
        batch.token[row] = token;
        batch.pos[row] = pos;
        batch.n_seq_id[row] = 1;
        batch.seq_id[row][0] = seq;
        batch.logits[row] = logits;
    }

  private:
    static constexpr int WARM_UP_PREFILL = 16; // tokens

    ggml_threadpool_t pool = nullptr;
    bool paused = true;
};

} // namespace mullama
