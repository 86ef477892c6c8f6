// One pass over a row of logits: are they usable, which is the largest, which are the k largest.
// llama_sampler_sample builds 12 bytes a vocabulary entry before it looks; these scans touch each logit once.
#pragma once

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace mullama {

constexpr int SCAN_LANES = 64; // one block; the inner loops have fixed bounds so that compilers vectorise them

// Largest value of one block, and (in `bad`) whether a value is NaN or +inf.
inline float block_max(const float * x, int & bad) {
    float m[16];
    int   b[16];
    for (int j = 0; j < 16; ++j) {
        m[j] = x[j];
        b[j] = !(x[j] < std::numeric_limits<float>::infinity());
    }
    for (int i = 16; i < SCAN_LANES; i += 16) {
        for (int j = 0; j < 16; ++j) {
            const float v = x[i + j];
            m[j] = v > m[j] ? v : m[j];
            b[j] |= !(v < std::numeric_limits<float>::infinity());
        }
    }
    float best = m[0];
    for (int j = 0; j < 16; ++j) {
        best = m[j] > best ? m[j] : best;
        bad |= b[j];
    }
    return best;
}

// Index of the largest logit (the lowest index among equals, as llama.cpp's greedy sampler); -1 when unusable.
inline int32_t scan_argmax(const float * x, int32_t n) {
    float best = -std::numeric_limits<float>::infinity();
    int32_t best_block = -1;
    int bad = 0;
    int32_t i = 0;
    for (; i + SCAN_LANES <= n; i += SCAN_LANES) {
        const float m = block_max(x + i, bad);
        if (m > best) {
            best = m;
            best_block = i;
        }
    }
    int32_t best_at = -1;
    for (int32_t j = i; j < n; ++j) {
        bad |= !(x[j] < std::numeric_limits<float>::infinity());
        if (x[j] > best) {
            best = x[j];
            best_at = j;
        }
    }
    if (bad) return -1;
    if (best_at >= 0) return best_at;
    if (best_block < 0) return -1; // nothing above -inf
    for (int32_t j = best_block; j < best_block + SCAN_LANES; ++j) {
        if (x[j] == best) return j;
    }
    return -1;
}

// The k largest, sorted from the largest down, into `out`. Returns how many, or -1 when unusable.
inline int32_t scan_top_k(const float * x, int32_t n, int32_t k, std::vector<llama_token_data> & out) {
    const auto greater = [](const llama_token_data & a, const llama_token_data & b) { return a.logit > b.logit; };
    out.clear();
    if (k > n) k = n;
    int bad = 0;
    const auto offer = [&](int32_t id) {
        const float v = x[id];
        if ((int32_t) out.size() < k) {
            out.push_back({ id, v, 0.0f });
            std::push_heap(out.begin(), out.end(), greater);
        } else if (v > out.front().logit) {
            std::pop_heap(out.begin(), out.end(), greater);
            out.back() = { id, v, 0.0f };
            std::push_heap(out.begin(), out.end(), greater);
        }
    };
    int32_t i = 0;
    for (; i + SCAN_LANES <= n; i += SCAN_LANES) {
        const float m = block_max(x + i, bad);
        if ((int32_t) out.size() < k || m > out.front().logit) {
            for (int32_t j = i; j < i + SCAN_LANES; ++j) offer(j);
        }
    }
    for (; i < n; ++i) {
        bad |= !(x[i] < std::numeric_limits<float>::infinity());
        offer(i);
    }
    if (bad) return -1;
    std::sort_heap(out.begin(), out.end(), greater);
    if (out.empty() || !(out.front().logit > -std::numeric_limits<float>::infinity())) return -1;
    return (int32_t) out.size();
}

// All of them, unsorted. Returns how many, or -1 when unusable.
inline int32_t scan_all(const float * x, int32_t n, std::vector<llama_token_data> & out) {
    if (scan_argmax(x, n) < 0) return -1;
    out.resize(n);
    for (int32_t i = 0; i < n; ++i) out[i] = { i, x[i], 0.0f };
    return n;
}

} // namespace mullama
