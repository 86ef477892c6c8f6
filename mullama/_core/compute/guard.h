// llama.cpp calls that may throw, made safe to call without the GIL: an exception becomes a code and a message.
#pragma once

#include "llama.h"
#include "llama-cells.h"

#include <cstdio>
#include <exception>

namespace mullama {

enum CoreError : int {
    CORE_OK            = 0,
    CORE_NOT_FINITE    = 1, // logits hold NaN or +inf, or nothing but -inf
    CORE_SAMPLER       = 2, // the sampler chain threw or selected nothing
    CORE_DECODE        = 3, // llama_decode failed for good
    CORE_NO_KV         = 4, // no room in the KV cache
    CORE_ADAPTER       = 5, // an adapter of the request is gone
    CORE_CONSTRAINT    = 6, // the text cannot be held to its constraint any more
    CORE_EXCEPTION     = 100,
};

struct Guard {
    char message[256] = { 0 };

    void keep(const char * text) { std::snprintf(message, sizeof message, "%s", text); }
};

inline int guarded_decode(llama_context * ctx, const llama_batch & batch, Guard & guard) noexcept {
    try {
        return llama_decode(ctx, batch);
    } catch (const std::exception & e) {
        guard.keep(e.what());
    } catch (...) {
        guard.keep("unknown C++ exception");
    }
    return CORE_EXCEPTION;
}

inline bool guarded_wipe(llama_context * ctx, llama_seq_id seq, Guard & guard) noexcept {
    try {
        llama_cells_wipe(ctx, seq);
        return true;
    } catch (const std::exception & e) {
        guard.keep(e.what());
    } catch (...) {
        guard.keep("unknown C++ exception");
    }
    return false;
}

// Apply a chain to candidates and accept the choice. Returns the token or -1.
inline llama_token guarded_sample(llama_sampler * chain, llama_token_data_array * candidates, Guard & guard) noexcept {
    try {
        llama_sampler_apply(chain, candidates);
        if (candidates->selected < 0 || candidates->selected >= (int64_t) candidates->size) {
            guard.keep("the sampler chain selected nothing");
            return -1;
        }
        const llama_token token = candidates->data[candidates->selected].id;
        llama_sampler_accept(chain, token);
        return token;
    } catch (const std::exception & e) {
        guard.keep(e.what());
    } catch (...) {
        guard.keep("unknown C++ exception");
    }
    return -1;
}

} // namespace mullama
