// Vocabularies and grammars of llguidance: a tokenizer a vocabulary, a compiled grammar a constraint, a matcher a text.
#pragma once

#include "llguidance.h"
#include "matching.h"

#include "llama.h"

#include <chrono>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace mullama {

constexpr size_t COMPILE_STACK = 256u << 20; // bytes of address space: the library recurses over what it parses
constexpr size_t TOKENIZED_AT_ONCE = 512;    // bytes: some vocabularies are split by a regex that recurses
constexpr char SPECIAL = '\xff';             // the library's mark of a token that is no text

// The library may tokenise in any thread; who asks it to says by which vocabulary. None: byte by byte.
inline thread_local const llama_vocab * spoken = nullptr;

// Append the tokens of a piece of text that give exactly these bytes. False: there are none.
inline bool tokens_exactly(const llama_vocab * vocab, std::string_view text, std::vector<uint32_t> & found) {
    // Some vocabularies put a space before a text: behind a line break there is none.
    for (const char * before : { "", "\n" }) {
        const std::string whole = before + std::string(text);
        std::vector<llama_token> tokens(whole.size() + 8);
        int32_t n = -1;
        try {
            n = llama_tokenize(vocab, whole.data(), (int32_t) whole.size(), tokens.data(), (int32_t) tokens.size(), false, false);
        } catch (...) { // a byte that the vocabulary lacks
        }
        if (n <= 0) continue;
        std::vector<std::string> pieces;
        std::string all;
        for (int32_t i = 0; i < n; ++i) {
            std::string word(256, '\0');
            const int32_t size = llama_token_to_piece(vocab, tokens[i], word.data(), (int32_t) word.size(), 0, false);
            word.resize(size > 0 ? size : 0);
            all += word;
            pieces.push_back(std::move(word));
        }
        if (all.size() < text.size() || std::string_view(all).substr(all.size() - text.size()) != text) continue;
        size_t skip = all.size() - text.size();
        int32_t first = 0;
        while (first < n && skip >= pieces[first].size() && skip > 0) skip -= pieces[first++].size();
        if (skip != 0) continue;
        found.insert(found.end(), tokens.begin() + first, tokens.begin() + n);
        return true;
    }
    return false;
}

// The tokens of a vocabulary as the library wants them; depends on no model once it is made.
class Vocabulary {
  public:
    Vocabulary(const Llg & llg) : llg(llg) {}
    Vocabulary(const Vocabulary &) = delete;
    ~Vocabulary() { llg.free_tokenizer(tokenizer); }

    // Empty, or why that is not possible.
    std::string read(const llama_vocab * vocab) {
        n_tokens = llama_vocab_n_tokens(vocab);
        std::vector<uint32_t> lengths, ends;
        std::string bytes;
        std::string word(256, '\0');
        for (llama_token id = 0; id < (llama_token) n_tokens; ++id) {
            const bool is_end = llama_vocab_is_eog(vocab, id);
            const int attr = llama_vocab_get_attr(vocab, id);
            const bool is_text = !is_end && !(attr & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN | LLAMA_TOKEN_ATTR_UNUSED));
            int32_t size = llama_token_to_piece(vocab, id, word.data(), (int32_t) word.size(), 0, !is_text);
            if (size < 0) {
                word.resize(-size);
                size = llama_token_to_piece(vocab, id, word.data(), (int32_t) word.size(), 0, !is_text);
            }
            size = std::max(size, 0);
            if (!is_text) bytes += SPECIAL;
            if (!is_text && size == 0) { // one without a name has its number
                const std::string name = "<[" + std::to_string(id) + "]>";
                bytes += name;
                size = (int32_t) name.size();
            } else {
                bytes.append(word.data(), size);
            }
            if (is_text && size == 1) of_byte[(uint8_t) word[0]] = id;
            lengths.push_back(size + !is_text);
            if (is_end) ends.push_back(id);
        }
        LlgTokenizerInit init = {};
        init.size = sizeof init;
        init.n_tokens = n_tokens;
        init.end = ends.empty() ? 0xFFFFFFFFu : ends[0];
        init.lengths = lengths.data();
        init.bytes = (const uint8_t *) bytes.data();
        init.tokenize = tokenize;
        init.user = this;
        if (ends.size() > 1) {
            init.more_ends = ends.data() + 1;
            init.n_more_ends = (uint32_t) ends.size() - 1;
        }
        char error[256] = "the library does not say why";
        tokenizer = llg.new_tokenizer(&init, error, sizeof error);
        return tokenizer != nullptr ? "" : error;
    }

    const Llg & llg;
    void * tokenizer = nullptr;
    uint32_t n_tokens = 0;

  private:
    // What the model would make of a text, as far as that is known; all of its bytes have to be there.
    static size_t tokenize(const void * user, const uint8_t * bytes, size_t n, uint32_t * out, size_t most) noexcept {
        const Vocabulary & self = *(const Vocabulary *) user;
        std::vector<uint32_t> found;
        std::string_view text((const char *) bytes, n);
        while (!text.empty()) {
            size_t size = std::min(text.size(), TOKENIZED_AT_ONCE);
            while (size < text.size() && size > 1 && (text[size] & 0xC0) == 0x80) --size; // not within a character
            if (spoken == nullptr || !tokens_exactly(spoken, text.substr(0, size), found)) {
                for (const char byte : text.substr(0, size)) {
                    const int32_t token = self.of_byte[(uint8_t) byte];
                    if (token >= 0) found.push_back(token);
                }
            }
            text.remove_prefix(size);
        }
        std::copy_n(found.begin(), std::min(most, found.size()), out);
        return found.size();
    }

    std::vector<int32_t> of_byte = std::vector<int32_t>(256, -1);
};

using VocabularyPtr = std::shared_ptr<Vocabulary>;

class LlgMatcher : public Matcher {
  public:
    LlgMatcher(VocabularyPtr vocabulary, void * native) : vocabulary(std::move(vocabulary)), native(native) {}
    ~LlgMatcher() override { vocabulary->llg.free_matcher(native); }

    bool consume(const uint32_t * tokens, size_t n) override { return vocabulary->llg.consume(native, tokens, n) == 0; }

    bool accepts(const uint32_t * tokens, size_t n) override {
        return vocabulary->llg.validate(native, tokens, n) == (int32_t) n;
    }

    bool is_complete() override {
        return vocabulary->llg.is_stopped(native) && vocabulary->llg.error(native) == nullptr;
    }

    int forced(uint32_t * tokens, size_t most, const llama_vocab * vocab) override {
        spoken = vocab;
        const int n = vocabulary->llg.forced(native, tokens, most);
        spoken = nullptr;
        return n;
    }

    bool mask(uint32_t * words, size_t n_words) override {
        return vocabulary->llg.mask(native, words, n_words * sizeof(uint32_t)) == 0;
    }

    std::vector<uint32_t> tokens_of(std::string_view text, const llama_vocab * vocab) override {
        spoken = vocab;
        std::vector<uint32_t> found(text.size() + 1);
        found.resize(vocabulary->llg.tokenize(vocabulary->tokenizer, (const uint8_t *) text.data(), text.size(), found.data(), found.size()));
        spoken = nullptr;
        return found;
    }

  private:
    VocabularyPtr vocabulary;
    void * native;
};

// A constraint, compiled: what every text that it holds begins with.
class Grammar {
  public:
    Grammar(VocabularyPtr vocabulary, void * native, Beginning beginning)
        : vocabulary(std::move(vocabulary)), native(native), beginning(std::move(beginning)) {}
    Grammar(const Grammar &) = delete;
    ~Grammar() { vocabulary->llg.free_matcher(native); }

    MatchingPtr begin() {
        std::lock_guard<std::mutex> lock(mutex);
        return std::make_shared<Matching>(
            std::make_unique<LlgMatcher>(vocabulary, vocabulary->llg.clone_matcher(native)), beginning, vocabulary->n_tokens);
    }

  private:
    VocabularyPtr vocabulary;
    void * native;
    Beginning beginning;
    std::mutex mutex;
};

using GrammarPtr = std::shared_ptr<Grammar>;

// Compiling, in a thread of its own: it needs a deep stack, and nobody waits for it longer than `most_ms`.
struct Compilation {
    VocabularyPtr vocabulary;
    std::string kind, text, error;
    LlgLimits limits;
    void * native = nullptr;
    bool is_done = false;
    std::mutex mutex;
    std::condition_variable done;
    pid_t thread = 0;

    ~Compilation() {
        if (native != nullptr) vocabulary->llg.free_matcher(native);
    }

    void work() {
        const Llg & llg = vocabulary->llg;
        LlgInit init = llg.init(vocabulary->tokenizer);
        init.limits = limits;
        {
            std::lock_guard<std::mutex> lock(mutex);
#ifdef __linux__
            thread = (pid_t) syscall(SYS_gettid);
#endif
        }
        void * made = llg.new_matcher(&init, kind.c_str(), text.c_str());
        // Its first mask as well: what is too complex to follow shows there, and every text needs it.
        std::vector<uint32_t> words(llg.mask_bytes(made) / sizeof(uint32_t));
        if (llg.error(made) != nullptr || llg.mask(made, words.data(), words.size() * sizeof(uint32_t)) != 0) {
            const char * why = llg.error(made);
            error = why != nullptr ? why : "the library does not say why";
            llg.free_matcher(made);
            made = nullptr;
        }
        std::lock_guard<std::mutex> lock(mutex);
        native = made;
        is_done = true;
        done.notify_all();
    }
};

inline std::atomic<int> n_compiling{ 0 }; // threads, also those that nobody waits for any more

// The grammar, or nullptr with what is wrong. After `quick_ms` it goes on at a low priority: whoever streams comes first.
inline GrammarPtr compile(VocabularyPtr vocabulary, const std::string & kind, const std::string & text,
                          const LlgLimits & limits, const Beginning & beginning, int quick_ms, int most_ms, int most_threads,
                          std::string & error) {
    auto job = std::make_shared<Compilation>();
    job->vocabulary = vocabulary;
    job->kind = kind;
    job->text = text;
    job->limits = limits;
    if (n_compiling.fetch_add(1) >= most_threads) {
        n_compiling.fetch_sub(1);
        error = "busy";
        return nullptr;
    }
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, COMPILE_STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    auto * given = new std::shared_ptr<Compilation>(job);
    const int failed = pthread_create(&thread, &attributes, [](void * data) -> void * {
        std::unique_ptr<std::shared_ptr<Compilation>> mine((std::shared_ptr<Compilation> *) data);
        (*mine)->work();
        n_compiling.fetch_sub(1);
        return nullptr;
    }, given);
    pthread_attr_destroy(&attributes);
    if (failed) {
        delete given;
        n_compiling.fetch_sub(1);
        error = "there is no thread for it";
        return nullptr;
    }
    std::unique_lock<std::mutex> lock(job->mutex);
    const auto is_done = [&] { return job->is_done; };
    if (!job->done.wait_for(lock, std::chrono::milliseconds(quick_ms), is_done)) {
        if (job->thread != 0) setpriority(PRIO_PROCESS, job->thread, 19);
        if (!job->done.wait_for(lock, std::chrono::milliseconds(most_ms - quick_ms), is_done)) {
            error = "slow";
            return nullptr;
        }
    }
    if (job->native == nullptr) {
        error = job->error;
        return nullptr;
    }
    void * native = job->native;
    job->native = nullptr;
    return std::make_shared<Grammar>(vocabulary, native, beginning);
}

} // namespace mullama
