// One slot of the engine: the sequence that lives in it, or the finished prefix it retains.
#pragma once

#include "../abi.h"
#include "lora.h"
#include "text.h"

#include "llama.h"

#include <string>
#include <utility>
#include <vector>

namespace mullama {

struct Slot {
    uint32_t state = MULLAMA_SLOT_FREE;

    // KV bookkeeping. Law: cells [0, n_past) of this slot hold the KV of tokens[0, n_past).
    std::vector<llama_token> tokens; // prompt, then what was generated
    int32_t  n_past = 0;
    uint64_t last_used = 0;          // step number, for eviction of retained prefixes

    // The request.
    uint64_t handle = 0;
    int32_t  n_prompt = 0;
    int32_t  n_generated = 0;
    int32_t  max_tokens = 0;
    int32_t  min_tokens = 0;
    bool     ignore_eos = false;
    bool     poisoned = false;       // its KV may hold NaN: never keep it
    int32_t  shift_keep = -1;        // >= 0: at the end of the context, drop half of what comes after so many tokens
    int32_t  shifted = 0;            // tokens dropped so far; then its KV is not that of its tokens: never keep it

    LoraSetPtr lora;                 // adapters that compute it; none: the bare model

    // Sampling.
    llama_sampler * chain = nullptr; // owned
    bool     greedy = false;         // argmax of the (biased) logits, no chain needed
    int32_t  top_k_first = 0;        // > 0: the chain looks at the k largest only, so only those are built
    std::vector<llama_logit_bias> bias;

    TextGate gate;
    std::string pending_text;        // final, but not yet in the ring
    mullama_row row = {};

    bool open() const { return state == MULLAMA_SLOT_PREFILL || state == MULLAMA_SLOT_DECODE || state == MULLAMA_SLOT_DONE; }

    void end_request() {
        if (chain != nullptr) {
            llama_sampler_free(chain);
            chain = nullptr;
        }
        bias.clear();
        gate = TextGate();
        pending_text.clear();
        lora.reset();
        handle = 0;
        shift_keep = -1;
        shifted = 0;
    }
};

inline void swap_slots(Slot & a, Slot & b) { std::swap(a, b); }

} // namespace mullama
