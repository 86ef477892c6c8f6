// Which tokens may come, and which end a text, whatever the model makes of them.
#pragma once

#include "logprobs.h"

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mullama {

struct TokenRules {
    std::vector<llama_token> ends;                // they end the text, and are no part of it
    std::vector<std::vector<llama_token>> banned; // sequences that must not come
    std::vector<llama_token> allowed;             // if there are any, no others may come

    bool has_ends() const { return !ends.empty(); }

    bool edits() const { return !banned.empty() || !allowed.empty(); }

    bool is_end(llama_token token) const { return std::find(ends.begin(), ends.end(), token) != ends.end(); }

    // Write over the logits of what must not come after `n` generated tokens.
    void apply(float * logits, int32_t n_vocab, const llama_token * generated, int32_t n) {
        if (!allowed.empty()) {
            kept.clear();
            for (const llama_token token : allowed) kept.push_back(logits[token]);
            std::fill(logits, logits + n_vocab, BANNED_LOGIT);
            for (size_t i = 0; i < allowed.size(); ++i) logits[allowed[i]] = kept[i];
        }
        for (const auto & sequence : banned) {
            const int32_t before = (int32_t) sequence.size() - 1;
            if (before <= n && std::equal(sequence.begin(), sequence.end() - 1, generated + n - before)) {
                logits[sequence.back()] = BANNED_LOGIT;
            }
        }
    }

    // No end may come yet.
    void ban_ends(float * logits) const {
        for (const llama_token token : ends) logits[token] = BANNED_LOGIT;
    }

  private:
    std::vector<float> kept;
};

} // namespace mullama
