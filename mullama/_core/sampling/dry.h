// DRY sequence breakers: which tokens hold a text, or begin it with their end, and what must follow then.
//
// What llama_sampler_init_dry works out for each sampler by detokenising the whole vocabulary once a breaker, and with
// duplicates. Here the vocabulary is detokenised once a model, and a breaker is looked for once.
#pragma once

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

// llama.cpp exports it for its own test; it takes the breakers as tokens.
struct llama_sampler * llama_sampler_init_dry_testing(float multiplier, float base, int32_t allowed_length,
                                                      int32_t penalty_last_n,
                                                      const std::vector<std::vector<llama_token>> & breakers);

namespace mullama {

using TokenSequence = std::vector<llama_token>;

constexpr size_t DRY_MAX_CHARS = 40; // llama.cpp's own limits
constexpr size_t DRY_MAX_TAIL  = 20;

// The texts of all tokens, side by side; made by whoever needs them first.
class Pieces {
  public:
    void make(const llama_vocab * vocab) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!ends.empty()) {
            return;
        }
        const llama_token n = llama_vocab_n_tokens(vocab);
        std::vector<size_t> found;
        std::string all, word(64, '\0');
        found.reserve(n);
        for (llama_token id = 0; id < n; ++id) {
            int32_t size = llama_detokenize(vocab, &id, 1, word.data(), (int32_t) word.size(), false, true);
            if (size < 0) {
                word.resize(-size);
                size = llama_detokenize(vocab, &id, 1, word.data(), (int32_t) word.size(), false, true);
            }
            all.append(word.data(), size > 0 ? size : 0);
            found.push_back(all.size());
        }
        text.swap(all);
        ends.swap(found);
    }

    size_t size() const { return ends.size(); }

    std::string_view at(size_t id) const {
        const size_t start = id == 0 ? 0 : ends[id - 1];
        return std::string_view(text).substr(start, ends[id] - start);
    }

  private:
    std::mutex mutex;
    std::string text;
    std::vector<size_t> ends;
};

inline TokenSequence tail_of(const llama_vocab * vocab, const std::string & text) {
    TokenSequence tokens(text.size() + 2);
    int32_t n = llama_tokenize(vocab, text.data(), (int32_t) text.size(), tokens.data(), (int32_t) tokens.size(), false,
                               false);
    if (n < 0) {
        tokens.resize(-n);
        n = llama_tokenize(vocab, text.data(), (int32_t) text.size(), tokens.data(), (int32_t) tokens.size(), false,
                           false);
    }
    tokens.resize(n > 0 ? std::min((size_t) n, DRY_MAX_TAIL) : 0);
    return tokens;
}

// Every token that holds `breaker`, and every one whose end begins it, with the tokens that must follow. False: there
// are more than `most`, and `found` holds so many of them.
inline bool find_breaker(const llama_vocab * vocab, Pieces & pieces, std::string breaker, size_t most,
                         std::vector<TokenSequence> & found) {
    pieces.make(vocab);
    breaker.resize(std::min(breaker.size(), DRY_MAX_CHARS));
    std::unordered_map<size_t, TokenSequence> tails; // by how much of the breaker the token holds
    for (size_t id = 0; id < pieces.size(); ++id) {
        const std::string_view word = pieces.at(id);
        const size_t first = found.size();
        if (word.find(breaker) != std::string_view::npos) {
            found.push_back({ (llama_token) id });
        } else {
            for (size_t pos = word.find(breaker[0]); pos != std::string_view::npos; pos = word.find(breaker[0], pos + 1)) {
                const std::string_view end = word.substr(pos);
                if (std::string_view(breaker).substr(0, end.size()) != end) {
                    continue;
                }
                auto known = tails.find(end.size());
                if (known == tails.end()) {
                    known = tails.emplace(end.size(), tail_of(vocab, breaker.substr(end.size()))).first;
                }
                TokenSequence sequence{ (llama_token) id };
                sequence.insert(sequence.end(), known->second.begin(), known->second.end());
                bool is_known = false;
                for (size_t i = first; i < found.size(); ++i) {
                    is_known |= found[i] == sequence;
                }
                if (!is_known) {
                    found.push_back(std::move(sequence));
                }
            }
        }
        std::sort(found.begin() + first, found.end()); // of one token, and tokens come in order
        if (found.size() > most) {
            return false;
        }
    }
    return true;
}

// `all` and `more`, both without doubles and in order: what several breakers share is listed once.
inline void merge_breakers(std::vector<TokenSequence> & all, const std::vector<TokenSequence> & more) {
    std::vector<TokenSequence> merged;
    merged.reserve(all.size() + more.size());
    std::set_union(all.begin(), all.end(), more.begin(), more.end(), std::back_inserter(merged));
    all.swap(merged);
}

// A long prompt's tokens as the chain would have seen them: only the last `look_back` matter to it.
inline void accept_all(llama_sampler * chain, const std::vector<llama_token> & tokens, size_t look_back) {
    for (size_t i = tokens.size() - std::min(look_back, tokens.size()); i < tokens.size(); ++i) {
        llama_sampler_accept(chain, tokens[i]);
    }
}

} // namespace mullama
