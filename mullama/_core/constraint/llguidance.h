// llguidance's C functions, found in the shared library of its Python package: called without the GIL.
//
// Its header is not in the package, and the functions are no promise of the package either. What is declared here
// follows the library's public documentation, is used only with versions that were tried (grammars.pyx), and is compared
// with what the library itself fills in before anything else is called.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include <dlfcn.h>

namespace mullama {

struct LlgLimits {
    size_t   items_in_row;
    uint64_t initial_fuel;     // of compiling
    uint64_t step_fuel;        // of one mask
    size_t   step_items;
    size_t   lexer_states;
    size_t   grammar_size;
    bool     precompute_large;
    bool     verbose_errors;
};

struct LlgInit {
    const void * tokenizer;
    uint32_t log_buffer;
    uint32_t log_stderr;
    bool forced_tokens;
    bool backtrack;
    LlgLimits limits;
};

// Tokens of some bytes: how many there are, of which at most `most` are written.
using LlgTokenize = size_t (*)(const void * user, const uint8_t * bytes, size_t n, uint32_t * tokens, size_t most);

struct LlgTokenizerInit {
    size_t size;               // of this structure
    uint32_t n_tokens;
    uint32_t end;
    const uint32_t * lengths;  // of each token, in bytes
    const uint8_t * bytes;     // of all tokens
    const char * json;
    bool wants_text;
    LlgTokenize tokenize;
    bool greedy;
    const void * user;
    const char * const * slices;
    const uint32_t * more_ends;
    uint32_t n_more_ends;
};

struct Llg {
    void (*set_defaults)(LlgInit *, const void *) = nullptr;
    void * (*new_tokenizer)(const LlgTokenizerInit *, char *, size_t) = nullptr;
    void (*free_tokenizer)(void *) = nullptr;
    size_t (*tokenize)(const void *, const uint8_t *, size_t, uint32_t *, size_t) = nullptr;
    void * (*new_matcher)(const LlgInit *, const char * kind, const char * text) = nullptr;
    void * (*clone_matcher)(const void *) = nullptr;
    void (*free_matcher)(void *) = nullptr;
    const char * (*error)(void *) = nullptr;
    size_t (*mask_bytes)(const void *) = nullptr;
    int32_t (*mask)(void *, uint32_t *, size_t) = nullptr;
    int32_t (*consume)(void *, const uint32_t *, size_t) = nullptr;
    int32_t (*validate)(void *, const uint32_t *, size_t) = nullptr;
    int32_t (*forced)(void *, uint32_t *, size_t) = nullptr;
    bool (*is_stopped)(const void *) = nullptr;

    // Find them all. Empty, or what is wrong with the library.
    std::string open(const char * path) {
        void * library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return dlerror();
        std::string missing;
        const auto find = [&](auto & function, const char * name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (function == nullptr && missing.empty()) missing = std::string("it has no ") + name;
        };
        find(set_defaults, "llg_constraint_init_set_defaults");
        find(new_tokenizer, "llg_new_tokenizer_v2");
        find(free_tokenizer, "llg_free_tokenizer");
        find(tokenize, "llg_tokenize_bytes");
        find(new_matcher, "llg_new_matcher");
        find(clone_matcher, "llg_clone_matcher");
        find(free_matcher, "llg_free_matcher");
        find(error, "llg_matcher_get_error");
        find(mask_bytes, "llg_matcher_get_mask_byte_size");
        find(mask, "llg_matcher_compute_mask_into");
        find(consume, "llg_matcher_consume_tokens");
        find(validate, "llg_matcher_validate_tokens");
        find(forced, "llg_matcher_compute_ff_tokens");
        find(is_stopped, "llg_matcher_is_stopped");
        if (!missing.empty()) return missing;
        return has_our_layout() ? "" : "its structures are not those that are known";
    }

    LlgInit init(const void * tokenizer) const {
        LlgInit made = {};
        set_defaults(&made, tokenizer);
        made.log_buffer = made.log_stderr = 0;
        made.limits.verbose_errors = false;
        return made;
    }

  private:
    // The library fills in one structure, with room behind it that has to stay as it is.
    bool has_our_layout() const {
        constexpr size_t room = 256;
        alignas(LlgInit) unsigned char raw[sizeof(LlgInit) + room];
        std::memset(raw, 0xA5, sizeof raw);
        LlgInit made;
        set_defaults(reinterpret_cast<LlgInit *>(raw), raw);
        std::memcpy(&made, raw, sizeof made);
        for (size_t i = sizeof made; i < sizeof raw; ++i) {
            if (raw[i] != 0xA5) return false;
        }
        const LlgLimits & l = made.limits;
        const unsigned char * flags = raw + offsetof(LlgInit, limits) + offsetof(LlgLimits, precompute_large);
        return made.tokenizer == raw && made.log_stderr <= 2 && l.items_in_row == 2000 && l.initial_fuel == 1000000
            && l.step_fuel == 200000 && l.step_items == 50000 && l.lexer_states == 250000 && l.grammar_size == 500000
            && flags[0] <= 1 && flags[1] <= 1;
    }
};

} // namespace mullama
