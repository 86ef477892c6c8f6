// The slots of a context: sequences come and go in them, and their KV is kept, cut and lost here. Nothing here knows of
// Python.
//
// Slot i is llama.cpp's sequence id i. The law of the KV bookkeeping: cells [0, n_past) of a slot hold the KV of its
// tokens [0, n_past). While a slot decodes, tokens has one more entry: the token that was sampled last and is computed
// in the next step; and some more where a grammar forced what comes behind it.
//
//     tokens   |0 ....... prompt ....... n_prompt)[ ... generated ... | last)
//     in KV    |0 .......................................... n_past)
//
// After a preemption whose KV was given up (parking.pyx), tokens holds what had been generated as well.
#pragma once

#include "../../abi.h"
#include "compute.h"
#include "guard.h"
#include "matching.h"
#include "adapters.h"
#include "output.h"
#include "text.h"

#include "llama-cells.h"
#include "llama.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace mullama {

constexpr int MAX_PIECE = 512; // bytes of a sane token's text

// The sequence that lives in a slot, or the finished prefix that it retains.
struct Slot {
    uint32_t state = MULLAMA_SLOT_FREE;

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
    MatchingPtr matching;            // what the text is held to; none: it is free

    std::vector<llama_token> shown;  // control tokens whose names are part of its text; few
    TextGate gate;
    std::string pending_text;        // final, but not yet in the ring
    mullama_row row = {};

    bool open() const { return runs() || state == MULLAMA_SLOT_DONE; }

    bool shows(llama_token token) const { return std::find(shown.begin(), shown.end(), token) != shown.end(); }

    bool runs() const { return state == MULLAMA_SLOT_PREFILL || state == MULLAMA_SLOT_DECODE; }

    void end_request() {
        if (chain != nullptr) {
            llama_sampler_free(chain);
            chain = nullptr;
        }
        bias.clear();
        shown.clear();
        matching.reset();
        gate = TextGate();
        pending_text.clear();
        lora.reset();
        handle = 0;
        shift_keep = -1;
        shifted = 0;
    }
};

inline void swap_slots(Slot & a, Slot & b) { std::swap(a, b); }

class Slots {
  public:
    Output * out = nullptr;   // of the core that has these slots, as is the guard
    Guard * guard = nullptr;

    // The context in charge; nullptr: the core was closed, or has no weights for now (vacancy.pyx).
    llama_context * ctx = nullptr;
    llama_memory_t mem = nullptr;
    int n_ctx = 0;            // tokens one slot may hold
    bool unified = false;     // one buffer of cells for all slots
    bool needs_checkpoint = false; // its KV cannot be cut anywhere
    size_t token_bytes = 0;   // KV of one token in the full-attention cache, 0: it cannot be had by the row
    LoraSetPtr in_charge;     // the set of adapters that the context has now
    bool changed = false;     // a sequence changed its state
    uint64_t waiting = 0;     // requests without a slot, for the page
    uint64_t reused_before = 0; // graphs reused by contexts before this one

    void resize(int n) { all.resize(n); }
    int size() const { return (int) all.size(); }
    Slot * at(int slot) { return &all[slot]; }

    void take_on(llama_context * context) {
        ctx = context;
        mem = context != nullptr ? llama_get_memory(context) : nullptr;
        in_charge.reset();
    }

    // Before its context is freed.
    void let_go_of_context() {
        reused_before += llama_perf_context(ctx).n_reused;
        ctx = nullptr;
        mem = nullptr;
        in_charge.reset(); // adapters may go now
    }

    // See that the context computes with a set of adapters. False: one of them is gone.
    bool put_in_charge(const LoraSetPtr & set) {
        if (same_set(in_charge, set)) return true;
        if (!use_set(ctx, set)) return false;
        in_charge = set;
        out->counters.adapter_switches++;
        return true;
    }

    int n_open() const {
        return (int) std::count_if(all.begin(), all.end(), [](const Slot & s) { return s.open(); });
    }

    // Remove the KV of a slot from position `n` on. False where llama.cpp cannot.
    bool cut(int slot, int n) { return llama_memory_seq_rm(mem, slot, n > 0 ? n : -1, -1); }

    // Keep the KV of the first `n` tokens of a slot, or none where that cannot be done. Returns those kept.
    int keep_head(int slot, int n) {
        Slot & s = all[slot];
        if (n > 0 && s.n_past > n && !cut(slot, n)) n = 0;
        if (n == 0) cut(slot, 0);
        s.n_past = n;
        return n;
    }

    // A slot holds KV of its first `n_past` tokens, and no request.
    void retain(int slot, int n_past) {
        Slot & s = all[slot];
        s.n_past = n_past;
        s.state = MULLAMA_SLOT_RETAINED;
        s.last_used = out->counters.steps;
    }

    void clear(int slot) {
        Slot & s = all[slot];
        if (s.poisoned) guarded_wipe(ctx, slot, *guard); // else the next sequence in these cells would have it
        cut(slot, 0);
        s.tokens.clear();
        s.n_past = 0;
        s.end_request();
        s.state = MULLAMA_SLOT_FREE;
    }

    // The KV of a slot is gone: its request fails, a retained prefix is forgotten.
    void lose(int slot) {
        Slot & s = all[slot];
        if (s.runs()) {
            s.poisoned = true;
            finish(&s, slot, MULLAMA_FINISH_ERROR, -1, CORE_NO_KV);
            out->wake.signal();
        } else if (s.state == MULLAMA_SLOT_RETAINED) {
            clear(slot);
        }
    }

    // Swap the contents of two slots, whatever they hold; KV is copied bit by bit, `n_bytes` of it. False: llama.cpp does
    // not take it back, and the sequences are lost.
    bool exchange(int a, int b, size_t & n_bytes) {
        const uint64_t start = now_ns();
        size_t n_a = 0, n_b = 0;
        bool ok = true;
        if (move_rows(a, b) || move_rows(b, a)) {
            n_a = token_bytes * std::max(all[a].n_past, all[b].n_past);
        } else {
            ok = save(a, state_a, n_a);
            ok = save(b, state_b, n_b) && ok;
            cut(a, 0);
            cut(b, 0);
            if (n_a > 0) ok = llama_state_seq_set_data(ctx, state_a.data(), n_a, b) == n_a && ok;
            if (n_b > 0) ok = llama_state_seq_set_data(ctx, state_b.data(), n_b, a) == n_b && ok;
        }
        swap_slots(all[a], all[b]);
        n_bytes = n_a + n_b;
        for (const int i : { a, b }) {
            if (!ok) lose(i);
            else if (all[i].open()) all[i].row.moves++;
        }
        if (!ok) return false;
        out->counters.kv_moves++;
        out->counters.kv_move_bytes += n_bytes;
        out->counters.kv_move_ns += now_ns() - start;
        out->site(MULLAMA_SITE_MOVE, a, all[a].handle, b, n_bytes);
        return true;
    }

    // Memory in which a state waits while it moves, at least so many bytes; it is kept for the next time.
    uint8_t * staging(size_t n) {
        if (state_a.size() < n) state_a.resize(n);
        return state_a.data();
    }

    size_t staging_bytes() const { return state_a.size() + state_b.size(); } // what is reserved beyond was never touched

    // Tell the gate how the prompt ends: a list of token ids may end in the middle of a character.
    void begin_text(Slot * s) {
        const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
        std::string end;
        char piece[MAX_PIECE];
        for (size_t i = s->tokens.size(); i > 0 && end.size() < 3; --i) {
            // More of a character than 3 bytes cannot be there without its last one.
            const int32_t n = llama_token_to_piece(vocab, s->tokens[i - 1], piece, MAX_PIECE, 0, false);
            if (n <= 0) break; // a control token, behind which a character begins
            end.insert(0, piece, n);
        }
        s->gate.begin(end);
    }

    // What is final of a sequence's text goes to its reader.
    void flush_text(Slot * s) {
        out->push_text(s->handle, 1, s->pending_text);
        s->pending_text.clear();
    }

    // End a request: let its last text out and hand over its row, whole, with the finish record. `slot` is -1 for a
    // preempted sequence.
    void finish(Slot * s, int slot, uint32_t reason, int stop_index, int error) {
        if (reason == MULLAMA_FINISH_STOP || reason == MULLAMA_FINISH_LENGTH) {
            if (stop_index < 0) {
                stop_index = s->gate.flush(released);
                if (stop_index >= 0) reason = MULLAMA_FINISH_STOP;
                s->pending_text.append(released);
            }
            // A character that was cut is left out-> Of what went out before, none was.
            s->pending_text.resize(s->pending_text.size() - utf8_incomplete_tail(s->pending_text));
            flush_text(s);
        }
        s->state = s->row.state = MULLAMA_SLOT_DONE;
        changed = true;
        s->row.slot = slot;
        s->row.cells = s->n_past;
        s->row.finish_reason = reason;
        s->row.finished_ns = now_ns();
        mullama_counters & c = out->counters;
        (reason == MULLAMA_FINISH_STOP        ? c.finished_stop
         : reason == MULLAMA_FINISH_LENGTH    ? c.finished_length
         : reason == MULLAMA_FINISH_CANCELLED ? c.cancelled
                                              : c.failed)++;
        out->push_finish(s->row, stop_index, error);
        out->site(MULLAMA_SITE_FINISH, slot, s->handle, reason, s->n_generated);
    }

    // Bring the page up to date: gauges, counters and the rows of open slots.
    void publish(const Compute & compute) {
        mullama_counters & c = out->counters;
        c.running = c.retained = c.cells_used = 0;
        for (int i = 0; i < size(); ++i) {
            Slot & s = all[i];
            c.cells_used += s.n_past;
            c.running += s.open();
            c.retained += s.state == MULLAMA_SLOT_RETAINED;
            if (s.open() || s.row.state != s.state || s.row.cells != (uint32_t) s.n_past || s.row.slot != i) {
                s.row.state = s.state;
                s.row.slot = i;
                s.row.cells = s.n_past;
                out->put_row(i, s.row);
            }
        }
        c.waiting = waiting;
        c.threads = compute.threads;
        c.thread_changes = compute.governor->n_changes();
        c.graphs_reused = reused_before + (ctx != nullptr ? llama_perf_context(ctx).n_reused : 0);
        out->put_counters();
    }

  private:
    // Move the KV of a slot to one that holds none, row by row: half the work of writing and reading its state. False,
    // and nothing has changed: one of them is not so, or the KV cannot be had by the row.
    bool move_rows(int src, int dst) {
        const int n = all[src].n_past;
        if (n == 0 || all[dst].n_past != 0 || unified || needs_checkpoint || token_bytes == 0) return false;
        cut(dst, 0);
        const bool ok = llama_cells_carry_rows(ctx, src, ctx, dst, 0, 0, n);
        cut(ok ? src : dst, 0);
        return ok;
    }

    // The KV of a slot, as llama.cpp saves it; nothing of an empty one.
    bool save(int slot, std::vector<uint8_t> & state, size_t & n) {
        if (all[slot].n_past == 0) return true;
        n = llama_state_seq_get_size(ctx, slot);
        if (state.size() < n) state.resize(n);
        n = llama_state_seq_get_data(ctx, state.data(), n, slot);
        return n > 0;
    }

    std::vector<Slot> all;
    std::string released;
    std::vector<uint8_t> state_a, state_b;
};

} // namespace mullama
