// One ubatch of prompts, from tokens to vectors. Nothing here knows of Python.
#pragma once

#include "clock.h"
#include "compute.h"
#include "output.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mullama {

// How the vectors of a prompt's tokens become one. The numbers are those of llama.cpp's enum.
enum Pool : int { POOL_NONE = 0, POOL_MEAN = 1, POOL_CLS = 2, POOL_LAST = 3, POOL_RANK = 4 };

struct Prompt {
    int  first, n;    // its rows of the batch
    int  pool;
    bool normalised;  // to length 1
    size_t at, size;  // what became of it, in `EmbeddingBatch::values`
    bool is_finite;
};

class EmbeddingBatch {
  public:
    std::vector<Prompt> prompts;
    std::vector<float> values;
    int n_tokens = 0;

    void clear() {
        prompts.clear();
        values.clear();
        n_tokens = 0;
    }

    // The tokens of one more prompt, as sequence `prompts.size()`.
    void begin(int pool, bool normalised) { prompts.push_back({ n_tokens, 0, pool, normalised, 0, 0, true }); }

    void put(Compute & compute, llama_token token) {
        Prompt & prompt = prompts.back();
        compute.put_token(n_tokens++, token, prompt.n++, (llama_seq_id) prompts.size() - 1, true);
    }

    // Compute them. 0, or llama_decode's code; 2 only when told to stop. The engine's turn is taken and given back.
    int run(llama_context * ctx, Compute & compute, Output & out) {
        compute.resume();
        const bool is_fresh = compute.busy_since == 0;
        const uint64_t came = now_ns();
        const uint64_t start = is_fresh ? came : compute.busy_since;
        if (is_fresh && compute.neighbours.age_ns() > IDLE_LOOK_NS) compute.governor->wake(compute.load(), came);
        if (!compute.take_turn()) return 2;
        const uint64_t turn = now_ns();
        out.counters.turn_wait_ns += turn - came;
        const int code = decode(ctx, compute, out);
        if (code == 0) {
            const uint64_t pooling = now_ns();
            pool(ctx);
            out.counters.commit_ns += now_ns() - pooling;
            out.counters.prefill_tokens += n_tokens;
        }
        llama_memory_clear(llama_get_memory(ctx), false); // what a causal model has kept
        const uint64_t now = now_ns();
        compute.give_turn(now - turn);
        out.counters.steps++;
        out.counters.busy_ns += now - start;
        compute.busy_since = now;
        if (compute.governor->wants_look(now)) compute.governor->look(compute.load(), now);
        return code;
    }

  private:
    static constexpr uint64_t IDLE_LOOK_NS = 200000000; // as in loop.pyx

    int decode(llama_context * ctx, Compute & compute, Output & out) {
        const int n_prompts = (int) prompts.size();
        compute.batch.n_tokens = n_tokens;
        bool is_retry = false;
        while (true) {
            const int threads = is_retry ? 1 : compute.governor->threads_for(n_tokens);
            if (threads != compute.threads) {
                out.site(MULLAMA_SITE_THREADS, -1, 0, threads, compute.threads);
                llama_set_n_threads(ctx, threads, threads);
                compute.threads = threads;
            }
            const uint64_t allowance = compute.can_abort && !is_retry ? compute.governor->allowance(n_tokens) : 0;
            out.site(MULLAMA_SITE_UBATCH_BEGIN, -1, 0, n_tokens, n_prompts);
            const uint64_t start = now_ns();
            compute.deadline.at_ns = allowance != 0 ? start + allowance : 0;
            const int code = guarded_decode(ctx, compute.batch, compute.guard);
            llama_synchronize(ctx); // the vectors are here
            const uint64_t end = now_ns();
            compute.deadline.at_ns = 0;
            out.counters.decode_ns += end - start;
            out.site(MULLAMA_SITE_UBATCH_END, -1, 0, end - start, code);
            const bool is_late = code == 2 && !compute.deadline.stop.get();
            if (is_late || code == 0) compute.governor->record(n_tokens, threads, end - start, is_late, end);
            if (is_late && !is_retry) { // somebody took a core
                out.counters.decode_retries++;
                is_retry = true;
                llama_memory_clear(llama_get_memory(ctx), false);
                continue;
            }
            if (code == 0) out.counters.ubatches++;
            return code;
        }
    }

    void pool(llama_context * ctx) {
        const llama_model * model = llama_get_model(ctx);
        const size_t n_embd = llama_model_n_embd_out(model);
        const size_t n_rank = llama_model_n_cls_out(model);
        size_t size = 0;
        for (Prompt & prompt : prompts) {
            prompt.at = size;
            prompt.size = prompt.pool == POOL_RANK ? n_rank : prompt.pool == POOL_NONE ? n_embd * prompt.n : n_embd;
            size += prompt.size;
        }
        values.assign(size, 0.0f);
        for (size_t i = 0; i < prompts.size(); ++i) {
            Prompt & prompt = prompts[i];
            float * to = values.data() + prompt.at;
            if (prompt.pool == POOL_RANK) {
                const float * from = llama_get_embeddings_seq(ctx, (llama_seq_id) i);
                if (from == nullptr) prompt.is_finite = false;
                else std::copy(from, from + n_rank, to);
            } else {
                fold(ctx, prompt, n_embd, to);
            }
            for (size_t k = 0; k < prompt.size; ++k) prompt.is_finite = prompt.is_finite && std::isfinite(to[k]);
            if (prompt.normalised && prompt.pool != POOL_RANK) {
                for (size_t row = 0; row < prompt.size; row += n_embd) normalise(to + row, n_embd);
            }
        }
    }

    static void fold(llama_context * ctx, Prompt & prompt, size_t n_embd, float * to) {
        int from = 0, until = prompt.n;
        if (prompt.pool == POOL_CLS) until = 1;
        if (prompt.pool == POOL_LAST) from = prompt.n - 1;
        const bool is_mean = prompt.pool == POOL_MEAN;
        for (int t = from; t < until; ++t) {
            const float * row = llama_get_embeddings_ith(ctx, prompt.first + t);
            if (row == nullptr) {
                prompt.is_finite = false;
                return;
            }
            float * out = prompt.pool == POOL_NONE ? to + n_embd * t : to;
            for (size_t k = 0; k < n_embd; ++k) out[k] = is_mean ? out[k] + row[k] : row[k];
        }
        if (is_mean) {
            for (size_t k = 0; k < n_embd; ++k) to[k] /= (float) prompt.n;
        }
    }

    static void normalise(float * row, size_t n) {
        double sum = 0.0;
        for (size_t k = 0; k < n; ++k) sum += (double) row[k] * row[k];
        const float by = sum > 0.0 ? (float) (1.0 / std::sqrt(sum)) : 0.0f;
        for (size_t k = 0; k < n; ++k) row[k] *= by;
    }
};

// What an Embedder has, in one piece of memory: some of it wants to lie at multiples of 64, where a Python object does not.
struct EmbeddingParts {
    Output out;
    Compute compute;
    EmbeddingBatch batch;
};

} // namespace mullama
