// Log-probabilities: of a token that came and of the most likely ones, from a row of logits or from the candidates that
// a sampler chain left, packed as a record for the reader. Nothing here knows of Python.
#pragma once

#include "scan.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace mullama {

constexpr float BANNED_LOGIT = -1e30f; // written over the logit of a token that must not come: exp() of it is 0

// A token's record: this, then `n` entries (the token itself, then the most likely ones from the first down), then their
// bytes one after the other.
struct TokenHead {
    int32_t  rank; // of the token among all, from 1; 0: there are no log-probabilities
    uint32_t n;
};

struct TokenEntry {
    int32_t  token;
    float    logprob;
    uint32_t size; // bytes of its text
};

// exp(x) of x <= 0 to 3e-7 of itself; below 1e-38 it stays there. No branches and no calls, so that compilers vectorise.
inline float exp_below_0(float x) {
    constexpr float SHIFT = 12582912.0f; // 1.5 * 2^23: adding it rounds to a whole number, in the low bits
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 1.44269504f + SHIFT;
    const float n = shifted - SHIFT;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts (Cody and Waite)
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// ln of the sum of exp(x[i]); `most` is the largest of them.
inline double log_sum_exp(const float * x, int32_t n, float most) {
    constexpr int32_t LANES = 16, SPAN = 1024; // a span is summed in floats, spans in doubles
    double sum = 0.0;
    for (int32_t i = 0; i < n; i += SPAN) {
        const int32_t end = std::min(i + SPAN, n);
        float lane[LANES] = { 0.0f };
        int32_t j = i;
        for (; j + LANES <= end; j += LANES) {
            for (int32_t l = 0; l < LANES; ++l) lane[l] += exp_below_0(x[j + l] - most);
        }
        for (; j < end; ++j) lane[0] += exp_below_0(x[j] - most);
        for (int32_t l = 0; l < LANES; ++l) sum += lane[l];
    }
    return (double) most + std::log(sum);
}

class Scorer {
  public:
    // What was scored or named last; sizes are known when it is packed.
    int32_t rank = 0;
    std::vector<TokenEntry> entries;

    // Of a whole row of logits, `k` most likely ones. False: it is not usable.
    bool score_row(const float * x, int32_t n_vocab, llama_token token, int32_t k) {
        if (scan_top_k(x, n_vocab, std::max(k, 1), top) < 0) return false;
        const double all = log_sum_exp(x, n_vocab, top[0].logit);
        const float own = x[token];
        rank = 1;
        for (int32_t i = 0; i < n_vocab; ++i) rank += x[i] > own;
        note(token, own, k, all);
        return true;
    }

    // Of the candidates that a chain left, which may be in any order.
    void score_candidates(const llama_token_data * data, size_t n, llama_token token, int32_t k) {
        float most = -std::numeric_limits<float>::infinity(), own = most;
        for (size_t i = 0; i < n; ++i) {
            most = std::max(most, data[i].logit);
            if (data[i].id == token) own = data[i].logit;
        }
        double sum = 0.0;
        rank = 1;
        for (size_t i = 0; i < n; ++i) {
            sum += exp_below_0(data[i].logit - most);
            rank += data[i].logit > own;
        }
        top.resize(std::min((size_t) k, n));
        std::partial_sort_copy(data, data + n, top.begin(), top.end(),
                               [](const llama_token_data & a, const llama_token_data & b) { return a.logit > b.logit; });
        note(token, own, k, (double) most + std::log(sum));
    }

    // No log-probabilities: the token alone.
    void name(llama_token token) {
        rank = 0;
        entries.assign(1, { token, 0.0f, 0 });
    }

    // The record of what was scored or named last.
    const std::string & pack(const llama_vocab * vocab) {
        char piece[64];
        pieces.clear();
        for (TokenEntry & entry : entries) {
            int32_t size = llama_token_to_piece(vocab, entry.token, piece, sizeof piece, 0, true);
            if (size < 0) {
                long_piece.resize(-size);
                size = llama_token_to_piece(vocab, entry.token, &long_piece[0], -size, 0, true);
                pieces.append(long_piece, 0, std::max(size, 0));
            } else {
                pieces.append(piece, size);
            }
            entry.size = (uint32_t) std::max(size, 0);
        }
        const TokenHead head = { rank, (uint32_t) entries.size() };
        packed.assign((const char *) &head, sizeof head);
        packed.append((const char *) entries.data(), entries.size() * sizeof(TokenEntry));
        packed.append(pieces);
        return packed;
    }

  private:
    void note(llama_token token, float own, int32_t k, double all) {
        entries.clear();
        entries.push_back({ token, (float) (own - all), 0 });
        for (int32_t i = 0; i < k && i < (int32_t) top.size(); ++i) {
            const float logprob = (float) (top[i].logit - all);
            if (logprob < -1e20f) break; // it could not come
            entries.push_back({ top[i].id, logprob, 0 });
        }
    }

    std::vector<llama_token_data> top;
    std::string pieces, packed, long_piece;
};

} // namespace mullama
