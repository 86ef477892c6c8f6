"""The slots of a context: sequences come and go in them, and their KV is kept, cut, moved and lost here.

Slot i is llama.cpp's sequence id i. The law of the KV bookkeeping: cells [0, n_past) of a slot hold the KV of its
tokens [0, n_past). While a slot decodes, tokens has one more entry: the token that was sampled last and is computed in
the next step.

    tokens   |0 ....... prompt ....... n_prompt)[ ... generated ... | last)
    in KV    |0 .......................................... n_past)

After a preemption whose KV was given up (parking.pyx), tokens holds what had been generated as well.
"""

cimport cython
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memset

from mullama._core.adapters cimport LoraSetPtr, build_set, use_set
from mullama._core.sampling cimport Chain, Sampling, accept_all, build_chain, prepared_for
from mullama.errors import ComputeFailed, InvalidRequest


@cython.no_gc_clear  # the context must be freed before the model that it points into
cdef class Slots(Machine):
    """A Machine whose context holds sequences."""

    def states(self):
        """State number of every slot (see abi.SLOT_STATES)."""
        return [self.slots[i].state for i in range(self.n_slots)]

    def progress(self):
        """(state, tokens generated, tokens in the KV cache) of every slot."""
        return [(self.slots[i].state, self.slots[i].n_generated, self.slots[i].n_past) for i in range(self.n_slots)]

    def retained(self, int slot):
        """(tokens, step of last use) of the prefix a slot retains; (0, 0) when it retains none."""
        self.check_slot(slot)
        if self.slots[slot].state != MULLAMA_SLOT_RETAINED:
            return 0, 0
        return self.slots[slot].n_past, self.slots[slot].last_used

    def gap_cost_ns(self, int slot):
        """What a gap in the decoding slots will cost at most while the sequence in ``slot`` runs, in ns.

        Each step pays for one more pass over the weights, estimated as half of a one-token decode. The look-ahead is
        bounded: a sequence may end at any token.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if self.unified:
            return 0.0
        steps = min(max(s.max_tokens - s.n_generated, 0), 64)
        return 0.5 * self.governor.expected(1, self.governor.threads) * steps

    def slot_info(self, int slot):
        """(state, handle, n_past, tokens, last_used) of a slot; tokens as a list."""
        self.check_slot(slot)
        return (self.slots[slot].state, self.slots[slot].handle, self.slots[slot].n_past,
                list(self.slots[slot].tokens), self.slots[slot].last_used)

    def packed(self, int slot):
        """The tokens whose KV a slot holds, as the bytes of 32-bit integers."""
        self.check_slot(slot)
        return (<const char *> self.slots[slot].tokens.data())[:self.slots[slot].n_past * sizeof(llama_token)]

    def slot_fill(self, int slot):
        """(tokens in the KV cache, tokens known) of a slot."""
        self.check_slot(slot)
        return self.slots[slot].n_past, <int> self.slots[slot].tokens.size()

    @property
    def kv_cells(self):
        """Tokens that all slots together may hold."""
        self.check_slot(0)
        return <int> llama_n_ctx(self.ctx) if self.unified else self.n_slots * self.n_ctx

    def match(self, prompt):
        """The retained slot whose prefix saves most of ``prompt``, and the number of tokens it saves.

        (-1, 0) when none does. At least one token of the prompt is always left to compute. Sliding-window caches only
        serve a prefix whose window is still whole, recurrent ones only a whole retained sequence.
        """
        cdef vector[llama_token] tokens = prompt
        cdef int best = -1, best_n = 0, i, n, limit
        cdef llama_pos pos_min
        cdef Slot * s
        for i in range(self.n_slots):
            s = &self.slots[i]
            if s.state != MULLAMA_SLOT_RETAINED:
                continue
            limit = min(s.n_past, <int> tokens.size() - 1)
            n = 0
            while n < limit and s.tokens[n] == tokens[n]:
                n += 1
            if n < s.n_past:
                if not self.can_trim:
                    n = 0
                elif self.n_swa > 0:
                    pos_min = llama_memory_seq_pos_min(self.mem, i)
                    if pos_min > 0 and pos_min >= max(0, n - self.n_swa):
                        n = 0
            if n > best_n:
                best, best_n = i, n
        return best, best_n

    def open(self, int slot, uint64_t handle, prompt, params, *, int reuse=0, int source=MULLAMA_KV_IN_PLACE,
             int evicted=0, uint64_t arrival_ns=0, int priority=0, int shift_keep=-1, adapters=(), prepared=None):
        """Start a request in a free or retained slot, keeping ``reuse`` tokens of what the slot retains.

        For its profile: ``source``, where they came from (abi.KV_SOURCES), and ``evicted``, the cached tokens of others
        that were given up for it. ``shift_keep`` of 0 or more: when the context is full, go on without half of
        the tokens that come after so many at the start. ``adapters``: pairs of Adapter and scale that compute it; what
        is reused must have been computed with the same. ``prepared``: the Sampling of ``params``, if there is one.
        Raises InvalidRequest for numbers out of range, and leaves the slot as it was.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.open():
            raise RuntimeError(f"slot {slot} is in use")
        cdef vector[llama_token] tokens = prompt
        cdef vector[llama_logit_bias] bias
        cdef vector[string] stops
        cdef size_t i
        if tokens.empty() or <int> tokens.size() >= self.n_ctx + 1:
            raise InvalidRequest(f"a prompt must have 1 to {self.n_ctx} tokens, got {tokens.size()}", param="prompt")
        for i in range(tokens.size()):
            if not 0 <= tokens[i] < self.model.n_vocab:
                raise InvalidRequest(f"token id {tokens[i]} is outside the vocabulary (0 to {self.model.n_vocab - 1})",
                                     param="prompt")
        if not 0 <= reuse < <int> tokens.size() or reuse > s.n_past:
            raise ValueError("reuse must leave one token to compute and be no more than the slot retains")
        for i in range(reuse):
            if s.tokens[i] != tokens[i]:
                raise ValueError("the retained tokens are not a prefix of the prompt")
        if shift_keep >= 0 and not self.can_shift:
            raise InvalidRequest("this model's context cannot be shifted", param="context_policy")
        for stop in params.stop:
            stops.push_back(stop.encode("utf-8", "surrogatepass"))
        cdef LoraSetPtr lora = build_set(self.model, adapters)
        cdef Sampling sampling = prepared_for(self.model, params, prepared)
        cdef Chain chain = build_chain(sampling, params, self.n_ctx, bias)
        reuse = self.keep_head(slot, reuse)
        s.n_past = reuse
        s.tokens.swap(tokens)
        s.state = MULLAMA_SLOT_PREFILL
        s.handle = handle
        s.n_prompt = <int32_t> s.tokens.size()
        s.n_generated = 0
        s.shift_keep = min(shift_keep, s.n_prompt) if shift_keep >= 0 else -1
        s.shifted = 0
        room = max(1, self.n_ctx - s.n_prompt) if s.shift_keep < 0 else 1 << 30
        s.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        s.min_tokens = min(params.min_tokens, s.max_tokens)
        s.ignore_eos = params.ignore_eos
        s.poisoned = False
        s.lora = lora
        s.chain = chain.ptr
        s.greedy = chain.greedy
        s.top_k_first = chain.top_k_first
        s.bias.swap(bias)
        s.gate.stops.swap(stops)
        self.begin_text(s)
        if s.chain is not NULL:
            with nogil:
                accept_all(s.chain, s.tokens, chain.look_back)
        memset(&s.row, 0, sizeof(mullama_row))
        s.row.handle = handle
        s.row.arrival_ns = arrival_ns
        s.row.opened_ns = now_ns()
        s.row.prompt_tokens = s.n_prompt
        s.row.kv_cache_hit = reuse
        s.row.kv_cache_miss = s.n_prompt - reuse
        s.row.kv_cache_evict = evicted
        s.row.kv_source = source if reuse > 0 else MULLAMA_KV_NONE
        s.row.priority = priority
        self.counters.opened += 1
        self.counters.kv_hit_tokens += reuse
        self.counters.kv_miss_tokens += s.n_prompt - reuse
        self.site(MULLAMA_SITE_OPEN, slot, handle, s.n_prompt, reuse)

    def cancel(self, int slot):
        """End the request in a slot (finish record CANCELLED) and free its cells. Harmless when it has ended."""
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.state == MULLAMA_SLOT_PREFILL or s.state == MULLAMA_SLOT_DECODE:
            with nogil:  # a full ring waits for its reader, who needs the GIL
                self.finish(s, slot, MULLAMA_FINISH_CANCELLED, -1, 0)
                self.wake.signal()
        if s.state == MULLAMA_SLOT_DONE:
            self.clear_slot(slot)
            self.publish()

    cdef void begin_text(self, Slot * s) noexcept nogil:
        """Tell the gate how the prompt ends: a list of token ids may end in the middle of a character."""
        cdef string end
        cdef char piece[MAX_PIECE]
        cdef size_t i = s.tokens.size()
        cdef int32_t n
        while i > 0 and end.size() < 3:  # more of a character cannot be there without its last byte
            i -= 1
            n = llama_token_to_piece(self.model.vocab, s.tokens[i], piece, MAX_PIECE, 0, False)
            if n <= 0:
                break  # a control token, behind which a character begins
            end.insert(0, piece, n)
        s.gate.begin(end)

    cdef void finish(self, Slot * s, int slot, uint32_t reason, int stop_index, int error) noexcept nogil:
        """End a request: let its last text out and hand over its row, whole, with the finish record.

        ``slot`` is -1 for a preempted sequence.
        """
        cdef RecordHeader header
        cdef FinishBody body
        if reason == MULLAMA_FINISH_STOP or reason == MULLAMA_FINISH_LENGTH:
            if stop_index < 0:
                stop_index = s.gate.flush(self.released)
                if stop_index >= 0:
                    reason = MULLAMA_FINISH_STOP
                s.pending_text.append(self.released)
            # A character that was cut is left out. Of what went out before, none was.
            s.pending_text.resize(s.pending_text.size() - utf8_incomplete_tail(s.pending_text))
            self.flush_text(s, 1)
        s.state = MULLAMA_SLOT_DONE
        self.changed = True
        s.row.state = MULLAMA_SLOT_DONE
        s.row.slot = slot
        s.row.cells = s.n_past
        s.row.finish_reason = reason
        s.row.finished_ns = now_ns()
        if reason == MULLAMA_FINISH_STOP:
            self.counters.finished_stop += 1
        elif reason == MULLAMA_FINISH_LENGTH:
            self.counters.finished_length += 1
        elif reason == MULLAMA_FINISH_CANCELLED:
            self.counters.cancelled += 1
        else:
            self.counters.failed += 1
        header.kind = RECORD_FINISH
        header.n_tokens = 0
        header.handle = s.handle
        body.reason = reason
        body.stop_index = stop_index
        body.error = error
        body.unused = 0
        self.push(header, &body, sizeof(FinishBody), &s.row, sizeof(mullama_row))
        self.site(MULLAMA_SITE_FINISH, slot, s.handle, reason, s.n_generated)

    def close_slot(self, int slot, *, bint retain=True):
        """After a finish: keep the slot's KV as a prefix for later prompts, or free it. Returns tokens retained."""
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.state != MULLAMA_SLOT_DONE:
            raise RuntimeError(f"slot {slot} has no finished request")
        cdef uint64_t handle = s.handle
        if retain and not s.poisoned and s.shifted == 0 and s.n_past > 0:
            s.tokens.resize(s.n_past)
            s.end_request()
            s.state = MULLAMA_SLOT_RETAINED
            s.last_used = self.counters.steps
        else:
            self.clear_slot(slot)
        self.site(MULLAMA_SITE_CLOSE, slot, handle, s.n_past, 0)
        return s.n_past

    cdef void clear_slot(self, int slot) noexcept nogil:
        cdef Slot * s = &self.slots[slot]
        if s.poisoned:
            guarded_wipe(self.ctx, slot, self.guard)  # else the next sequence in these cells would have it
        self.cut(slot, 0)
        s.tokens.clear()
        s.n_past = 0
        s.end_request()
        s.state = MULLAMA_SLOT_FREE

    cdef bint cut(self, int slot, int n) noexcept nogil:
        """Remove the KV of a slot from position ``n`` on. False where llama.cpp cannot."""
        return llama_memory_seq_rm(self.mem, slot, n if n > 0 else -1, -1)

    cdef int keep_head(self, int slot, int n) noexcept:
        """Keep the KV of the first ``n`` tokens of a slot, or none where that cannot be done. Returns those kept."""
        cdef Slot * s = &self.slots[slot]
        if n > 0 and s.n_past > n and not self.cut(slot, n):
            n = 0
        if n == 0:
            self.cut(slot, 0)
        s.n_past = n
        return n

    def evict(self, int slot, int lost=-1):
        """Drop a retained prefix. Returns the number of tokens (cells) freed.

        ``lost``: how many of them are cached nowhere else, for the counter of evicted tokens; -1: all.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        cdef int n = s.n_past
        if s.state != MULLAMA_SLOT_RETAINED:
            return 0
        self.clear_slot(slot)
        self.counters.kv_evict_tokens += n if lost < 0 else lost
        self.site(MULLAMA_SITE_EVICT, slot, 0, n, 0)
        return n

    def note_evicted(self, int tokens):
        """Count cached tokens that were given up elsewhere than in a slot."""
        self.counters.kv_evict_tokens += tokens

    def exchange(self, int a, int b):
        """Swap the contents of two slots, whatever they hold; KV is copied bit by bit. Returns bytes moved.

        Running slots have to be a gap-free range of the lowest ids for a decode to be one ubatch.
        Raises ComputeFailed when llama.cpp does not take the state back; the sequences involved are then lost.
        """
        self.check_slot(a)
        self.check_slot(b)
        if a == b:
            return 0
        cdef uint64_t start = now_ns()
        cdef size_t n_a = 0, n_b = 0
        cdef bint ok = True
        cdef int i
        cdef bint a_moved = self.move_rows(a, b), b_moved = not a_moved and self.move_rows(b, a)
        with nogil:
            if self.slots[a].n_past > 0 and not a_moved:
                n_a = llama_state_seq_get_size(self.ctx, a)
                if self.state_a.size() < n_a:
                    self.state_a.resize(n_a)
                n_a = llama_state_seq_get_data(self.ctx, self.state_a.data(), n_a, a)
                ok = ok and n_a > 0
            if self.slots[b].n_past > 0 and not b_moved:
                n_b = llama_state_seq_get_size(self.ctx, b)
                if self.state_b.size() < n_b:
                    self.state_b.resize(n_b)
                n_b = llama_state_seq_get_data(self.ctx, self.state_b.data(), n_b, b)
                ok = ok and n_b > 0
            if not a_moved and not b_moved:
                self.cut(a, 0)
                self.cut(b, 0)
            if n_a > 0:
                ok = llama_state_seq_set_data(self.ctx, self.state_a.data(), n_a, b) == n_a and ok
            if n_b > 0:
                ok = llama_state_seq_set_data(self.ctx, self.state_b.data(), n_b, a) == n_b and ok
        swap_slots(self.slots[a], self.slots[b])
        if not ok:
            for i in (a, b):
                with nogil:
                    self.lose(i)
            raise ComputeFailed("a sequence's KV could not be moved to another slot")
        for i in (a, b):
            if self.slots[i].open():
                self.slots[i].row.moves += 1
        if a_moved or b_moved:
            n_a = self.context.token_bytes * max(self.slots[a].n_past, self.slots[b].n_past)
        self.counters.kv_moves += 1
        self.counters.kv_move_bytes += n_a + n_b
        self.counters.kv_move_ns += now_ns() - start
        self.site(MULLAMA_SITE_MOVE, a, self.slots[a].handle, b, n_a + n_b)
        return n_a + n_b

    cdef bint move_rows(self, int src, int dst) except -1:
        """Move the KV of a slot to one that holds none, row by row: half the work of writing and reading its state.

        False, and nothing has changed: one of them is not so, or the KV cannot be had by the row.
        """
        cdef int n = self.slots[src].n_past
        cdef bint ok
        if not n or self.slots[dst].n_past or self.unified or self.context.needs_checkpoint \
                or not self.context.token_bytes:
            return False
        with nogil:
            self.cut(dst, 0)
            ok = llama_cells_carry_rows(self.ctx, src, self.ctx, dst, 0, 0, n)
            self.cut(src if ok else dst, 0)
        return ok

    cdef void lose(self, int slot) noexcept nogil:
        """The KV of a slot is gone: its request fails, a retained prefix is forgotten."""
        cdef Slot * s = &self.slots[slot]
        if s.state == MULLAMA_SLOT_PREFILL or s.state == MULLAMA_SLOT_DECODE:
            s.poisoned = True
            self.finish(s, slot, MULLAMA_FINISH_ERROR, -1, CORE_NO_KV)
            self.wake.signal()
        elif s.state == MULLAMA_SLOT_RETAINED:
            self.clear_slot(slot)

    def drop_adapters(self):
        """See that the context holds no adapter, so that one that no sequence uses can be closed."""
        self.check_slot(0)
        cdef LoraSetPtr none
        if self.in_charge.get() is not NULL:
            use_set(self.ctx, none)
            self.in_charge.reset()

    def cells(self):
        """llama.cpp's own count of KV cells, by slot: {"size", "caches", "used": [..a slot..], "recurrent": [..]}.

        ``used`` counts the full-attention cache (the sliding-window one holds fewer), ``recurrent`` the live states.
        """
        self.check_slot(0)
        cdef int i
        cdef int n_caches = llama_cells_n_caches(self.ctx)
        cdef vector[llama_seq_id] owner
        used = [0] * self.n_slots
        window = [0] * self.n_slots
        for i in range(self.n_slots):
            if n_caches > 0:
                used[i] = llama_cells_used(self.ctx, 0, 0 if self.unified else i, i)
            if n_caches > 1:
                window[i] = llama_cells_used(self.ctx, 1, 0 if self.unified else i, i)
        owner.resize(1024)
        n = llama_cells_recurrent(self.ctx, owner.data(), <uint32_t> owner.size())
        return {"caches": n_caches, "streams": llama_cells_n_streams(self.ctx, 0) if n_caches > 0 else 0,
                "total_used": sum(llama_cells_used(self.ctx, 0, i, -1)
                                  for i in range(llama_cells_n_streams(self.ctx, 0))) if n_caches > 0 else 0,
                "size": llama_cells_size(self.ctx, 0) if n_caches > 0 else 0,
                "used": used, "window": window, "recurrent": [owner[i] for i in range(n)]}

    def cell_map(self, int slot, int cache=0):
        """(position, owner) of every cell of a slot's stream; (-1, -1) for an empty one."""
        self.check_slot(slot)
        cdef uint32_t size = llama_cells_size(self.ctx, cache)
        cdef vector[llama_pos] pos
        cdef vector[llama_seq_id] owner
        pos.resize(size)
        owner.resize(size)
        cdef uint32_t n = llama_cells_read(self.ctx, cache, 0 if self.unified else slot, pos.data(), owner.data(), size)
        return [(pos[i], owner[i]) for i in range(n)]

    def cell_runs(self, int slot, int cache=0):
        """The same as runs of neighbouring cells: (first cell, number of cells, owner or -1), in order."""
        self.check_slot(slot)
        cdef uint32_t size = llama_cells_size(self.ctx, cache)
        cdef vector[llama_pos] pos
        cdef vector[llama_seq_id] owner
        cdef uint32_t first = 0, i, n
        pos.resize(size)
        owner.resize(size)
        with nogil:
            n = llama_cells_read(self.ctx, cache, 0 if self.unified else slot, pos.data(), owner.data(), size)
        runs = []
        for i in range(1, n + 1):
            if i == n or owner[i] != owner[first]:
                runs.append((first, i - first, owner[first]))
                first = i
        return runs

    def audit(self):
        """Compare the bookkeeping with llama.cpp's cells. Returns a list of differences, empty when all agree."""
        found = []
        truth = self.cells()
        for i in range(self.n_slots):
            n = self.slots[i].n_past
            if truth["caches"] > 0 and truth["used"][i] != n:
                found.append(f"slot {i}: {n} tokens are accounted for, llama.cpp holds {truth['used'][i]} cells")
            if self.slots[i].state == MULLAMA_SLOT_FREE and n != 0:
                found.append(f"slot {i} is free but has {n} tokens")
            if n > <int> self.slots[i].tokens.size():
                found.append(f"slot {i}: KV of {n} tokens, {self.slots[i].tokens.size()} known")
        return found

    def state_bytes(self, int slot):
        """Bytes that moving a slot's KV would copy."""
        self.check_slot(slot)
        cdef size_t n
        with nogil:
            n = llama_state_seq_get_size(self.ctx, slot)
        return n

    def is_switching(self):
        """Whether other weights have taken over and have not taken a step yet. Any thread."""
        return self.switched_ns != 0

    def inject_nan(self, int slot):
        """Fault injection for tests: the next logits of this slot hold a NaN."""
        self.check_slot(slot)
        self.fault_slot = slot

    def shifted(self, int slot):
        """Tokens that the sequence in a slot has dropped to go on; then its KV is not what its tokens would give."""
        self.check_slot(slot)
        return self.slots[slot].shifted
