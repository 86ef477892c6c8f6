// What holds a text to its constraint: one object a sequence, which moves with its slot and goes with its request.
//
//     seen(token)    a token was sampled: where the constraint has begun it is consumed, and what has to follow is known
//     forced()       tokens that follow by themselves, one after the other
//     mask()         else, which tokens may come: worked out by a thread while the graph runs, or here if that has not begun
//
// Nothing here knows of Python or of who works a matcher out. The engine thread owns a Matching; the worker has it only
// between QUEUED and DONE.
#pragma once

#include "llama.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <sys/types.h>
#include <unistd.h>

namespace mullama {

constexpr size_t MAX_FORCED = 256; // tokens known ahead at a time

// A grammar on its way through one text. False and -1: it failed, and stays so.
class Matcher {
  public:
    virtual ~Matcher() = default;
    virtual bool consume(const uint32_t * tokens, size_t n) = 0;
    virtual bool accepts(const uint32_t * tokens, size_t n) = 0; // all of them; nothing is consumed
    virtual bool is_complete() = 0;                              // nothing may follow
    virtual int forced(uint32_t * tokens, size_t most, const llama_vocab * vocab) = 0;
    virtual bool mask(uint32_t * words, size_t n_words) = 0;     // one bit a token
    virtual std::vector<uint32_t> tokens_of(std::string_view text, const llama_vocab * vocab) = 0;
};

// Where a constraint begins, if not with the first token.
struct Beginning {
    std::vector<std::string> after, triggers;

    bool is_start() const { return after.empty() && triggers.empty(); }

    // The first of the texts in `text` behind position `from`: where what is constrained begins; npos: it has not.
    size_t find(std::string_view text, size_t from) const {
        size_t first = std::string_view::npos, begins = first;
        const auto look = [&](const std::vector<std::string> & texts, bool is_inside) {
            for (const std::string & one : texts) {
                const size_t at = text.find(one, from > one.size() ? from - one.size() : 0);
                if (at < first) {
                    first = at;
                    begins = is_inside ? at : at + one.size();
                }
            }
        };
        look(after, false);
        look(triggers, true);
        return begins;
    }

    size_t longest() const {
        size_t n = 0;
        for (const auto * texts : { &after, &triggers }) {
            for (const std::string & one : *texts) n = std::max(n, one.size());
        }
        return n;
    }
};

class Matching {
  public:
    enum class Next { goes_on, complete, failed };

    Matching(std::unique_ptr<Matcher> matcher, const Beginning & beginning, size_t n_vocab)
        : matcher(std::move(matcher)), beginning(beginning), holds(beginning.is_start()), words((n_vocab + 31) / 32) {}

    // -- engine thread ------------------------------------------------------------------------------------------------

    // Whether every token may come now, and whether the end may.
    bool is_open() const { return !holds; }
    bool may_end() const { return holds || beginning.after.empty(); }

    // Before it goes on behind the tokens that are there already.
    Next start(const std::vector<llama_token> & known, const llama_vocab * vocab) {
        for (const llama_token token : known) {
            if (!follow(token, vocab)) return Next::failed;
        }
        return holds ? look_ahead(vocab) : Next::goes_on;
    }

    bool has_forced() const { return next_forced < ahead.size(); }
    size_t n_forced() const { return ahead.size() - next_forced; }
    llama_token take_forced() { return (llama_token) ahead[next_forced++]; }

    // Whether a token may come although everything may: it must not begin the constraint with what that does not allow.
    bool may_come(llama_token token, const llama_vocab * vocab) {
        if (holds) return true;
        std::string text = tail + piece(token, vocab);
        const size_t begins = beginning.find(text, tail.size());
        if (begins == std::string::npos) return true;
        const std::vector<uint32_t> first = first_tokens(std::string_view(text).substr(begins), vocab);
        return matcher->accepts(first.data(), first.size());
    }

    // A token was sampled, or taken of those that are forced.
    Next seen(llama_token token, const llama_vocab * vocab) {
        if (has_forced()) return Next::goes_on;
        if (ahead.empty() && !follow(token, vocab)) return Next::failed; // one ahead was consumed when it was found
        return holds ? look_ahead(vocab) : Next::goes_on;
    }

    // The tokens that may come, one bit each; nullptr: it failed. Waits for the worker where that has begun.
    const uint32_t * mask() {
        int expected = QUEUED;
        if (state.compare_exchange_strong(expected, RUNNING)) work();
        while (state.load(std::memory_order_acquire) == RUNNING) std::this_thread::yield();
        return state.load() == DONE ? words.data() : nullptr;
    }

    bool wants_mask() const { return holds && !has_forced(); }

    // -- the worker ---------------------------------------------------------------------------------------------------

    void queue() { state.store(QUEUED, std::memory_order_release); }

    void work_if_queued() {
        int expected = QUEUED;
        if (state.compare_exchange_strong(expected, RUNNING)) work();
    }

  private:
    enum : int { IDLE, QUEUED, RUNNING, DONE, FAILED };

    void work() {
        const bool ok = matcher->mask(words.data(), words.size());
        state.store(ok ? DONE : FAILED, std::memory_order_release);
    }

    bool follow(llama_token token, const llama_vocab * vocab) {
        if (holds) {
            const uint32_t one = (uint32_t) token;
            return matcher->consume(&one, 1);
        }
        tail += piece(token, vocab);
        const size_t begins = beginning.find(tail, 0);
        if (begins == std::string::npos) {
            const size_t keep = beginning.longest();
            if (tail.size() > keep) tail.erase(0, tail.size() - keep);
            return true;
        }
        holds = true;
        const std::vector<uint32_t> first = first_tokens(std::string_view(tail).substr(begins), vocab);
        tail.clear();
        return first.empty() || matcher->consume(first.data(), first.size());
    }

    // What has to follow is consumed at once, so that the mask behind it can be worked out.
    Next look_ahead(const llama_vocab * vocab) {
        ahead.clear();
        next_forced = 0;
        if (matcher->is_complete()) return Next::complete;
        ahead.resize(MAX_FORCED);
        const int n = matcher->forced(ahead.data(), ahead.size(), vocab);
        ahead.resize(std::max(n, 0));
        if (n < 0 || (n > 0 && !matcher->consume(ahead.data(), n))) return Next::failed;
        return Next::goes_on;
    }

    // White space between the end of thinking and what is constrained belongs to neither.
    std::vector<uint32_t> first_tokens(std::string_view text, const llama_vocab * vocab) {
        if (!beginning.after.empty()) {
            while (!text.empty() && std::string_view(" \n\r\t").find(text[0]) != std::string_view::npos) text.remove_prefix(1);
        }
        return text.empty() ? std::vector<uint32_t>() : matcher->tokens_of(text, vocab);
    }

    static std::string piece(llama_token token, const llama_vocab * vocab) {
        std::string text(64, '\0');
        int32_t n = llama_token_to_piece(vocab, token, text.data(), (int32_t) text.size(), 0, true);
        if (n < 0) {
            text.resize(-n);
            n = llama_token_to_piece(vocab, token, text.data(), (int32_t) text.size(), 0, true);
        }
        text.resize(std::max(n, 0));
        return text;
    }

    std::unique_ptr<Matcher> matcher;
    const Beginning beginning;
    bool holds;                       // it has begun
    std::string tail;                 // of the text before it
    std::vector<uint32_t> ahead;      // tokens that follow by themselves, consumed already
    size_t next_forced = 0;
    std::vector<uint32_t> words;
    std::atomic<int> state{ IDLE };
};

using MatchingPtr = std::shared_ptr<Matching>;

// Works masks out while the graph runs. Its thread begins with the first one.
class MaskWorker {
  public:
    MaskWorker() = default;
    MaskWorker(const MaskWorker &) = delete;
    ~MaskWorker() { close(); }

    void close() {
        Shared * const mine = shared;
        shared = nullptr;
        if (mine == nullptr) return;
        if (pid != getpid()) { // a child of the process, which has the memory but not the thread
            thread.detach();
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mine->mutex);
            mine->ending = true;
        }
        mine->wake.notify_one();
        thread.join();
        delete mine;
    }

    // Engine thread: to be worked out from the next `start` on.
    void add(const MatchingPtr & matching) {
        matching->queue();
        next.push_back(matching);
    }

    void start() {
        if (next.empty()) return;
        if (shared == nullptr) {
            shared = new Shared;
            pid = getpid();
            thread = std::thread(run, shared);
        }
        {
            std::lock_guard<std::mutex> lock(shared->mutex);
            shared->queue.insert(shared->queue.end(), next.begin(), next.end());
        }
        next.clear();
        shared->wake.notify_one();
    }

  private:
    struct Shared {
        std::mutex mutex;
        std::condition_variable wake;
        std::vector<MatchingPtr> queue;
        bool ending = false;
    };

    static void run(Shared * shared) {
        std::vector<MatchingPtr> mine;
        while (true) {
            mine.clear();
            {
                std::unique_lock<std::mutex> lock(shared->mutex);
                shared->wake.wait(lock, [shared] { return shared->ending || !shared->queue.empty(); });
                if (shared->ending) return;
                mine.swap(shared->queue);
            }
            for (const MatchingPtr & one : mine) one->work_if_queued();
        }
    }

    std::vector<MatchingPtr> next;
    Shared * shared = nullptr;
    std::thread thread;
    pid_t pid = 0;
};

// Leave only the tokens of a mask in a row of logits.
inline void apply_mask(float * logits, int32_t n, const uint32_t * mask) {
    constexpr float never = -std::numeric_limits<float>::infinity();
    int32_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const uint32_t word = mask[i / 32];
        if (word == 0xFFFFFFFFu) continue;
        if (word == 0) {
            std::fill_n(logits + i, 32, never);
            continue;
        }
        for (int32_t j = 0; j < 32; ++j) logits[i + j] = (word >> j) & 1 ? logits[i + j] : never;
    }
    for (; i < n; ++i) {
        if (!((mask[i / 32] >> (i % 32)) & 1)) logits[i] = never;
    }
}

} // namespace mullama
