"""The hot loop: fill a batch, decode, sample, commit text and KV bookkeeping, again, without the GIL.

A slot in prefill computes until n_past reaches the end of its tokens (slots.pyx), and samples there.

Every llama_decode call is one ubatch of one shape: single tokens of a gap-free range of slots, or one prompt chunk.
All of its rows have one set of LoRA adapters, because llama.cpp applies adapters to the context. A step goes through
the sets in turn and begins with the one that is in charge already.
"""

cimport cython
from cython.operator cimport dereference
from libc.math cimport NAN
from libc.stdint cimport int32_t, uint32_t, uint64_t

from mullama._core.adapters cimport same_set, use_set

# A shorter idle time says too little of what others do.
cdef uint64_t IDLE_LOOK_NS = 200 * 1000 * 1000


@cython.no_gc_clear  # the context must be freed before the model that it points into
cdef class Core(Parking):
    """One llama.cpp context with its slots, and the loop that computes them."""

    cdef bint put_in_charge(self, int slot) noexcept nogil:
        """See that the context computes with the adapters of a slot. False: one of them is gone."""
        if same_set(self.in_charge, self.slots[slot].lora):
            return True
        if not use_set(self.ctx, self.slots[slot].lora):
            return False
        self.in_charge = self.slots[slot].lora
        self.counters.adapter_switches += 1
        return True

    cdef void group_plan(self) noexcept nogil:
        """Bring slots with equal sets together, in the order in which the sets come first, and find the ranges."""
        cdef size_t i, j, n = self.plan_decode.size()
        cdef int32_t slot, n_tokens
        for i in range(1, n):
            if same_set(self.slots[self.plan_decode[i]].lora, self.slots[self.plan_decode[i - 1]].lora):
                continue
            for j in range(i + 1, n):
                if same_set(self.slots[self.plan_decode[j]].lora, self.slots[self.plan_decode[i - 1]].lora):
                    slot = self.plan_decode[j]
                    self.plan_decode.erase(self.plan_decode.begin() + j)
                    self.plan_decode.insert(self.plan_decode.begin() + i, slot)
                    break
        self.plan_ranges.clear()
        for i in range(n):
            if i == 0 or not same_set(self.slots[self.plan_decode[i]].lora, self.slots[self.plan_decode[i - 1]].lora) \
                    or not (self.unified or self.plan_decode[i] == self.plan_decode[i - 1] + 1):
                self.plan_ranges.push_back(i)
        if n > 0:
            self.plan_ranges.push_back(n)
        n = self.plan_prefill.size()
        for i in range(1, n):
            if same_set(self.slots[self.plan_prefill[i]].lora, self.slots[self.plan_prefill[i - 1]].lora):
                continue
            for j in range(i + 1, n):
                if same_set(self.slots[self.plan_prefill[j]].lora, self.slots[self.plan_prefill[i - 1]].lora):
                    slot, n_tokens = self.plan_prefill[j], self.plan_chunk[j]
                    self.plan_prefill.erase(self.plan_prefill.begin() + j)
                    self.plan_chunk.erase(self.plan_chunk.begin() + j)
                    self.plan_prefill.insert(self.plan_prefill.begin() + i, slot)
                    self.plan_chunk.insert(self.plan_chunk.begin() + i, n_tokens)
                    break

    cdef size_t first_range(self) noexcept nogil:
        """The first range of the set that is in charge; 0 when there is none."""
        cdef size_t i
        for i in range(self.plan_ranges.size() - 1):
            if same_set(self.slots[self.plan_decode[self.plan_ranges[i]]].lora, self.in_charge):
                return i
        return 0

    cdef size_t first_chunk(self) noexcept nogil:
        """The same among the prompt chunks."""
        cdef size_t i
        for i in range(self.plan_prefill.size()):
            if same_set(self.slots[self.plan_prefill[i]].lora, self.in_charge):
                return i
        return 0

    def run(self, decode, prefill, max_steps=0, until_ns=0):
        """Carry out a plan: one token of every slot in ``decode``, then the chunks (slot, n tokens) of ``prefill``.

        A plan without chunks is repeated until a sequence changes its state, ``interrupt`` is called, ``max_steps``
        (0: no limit) are done, or the clock shows ``until_ns`` (0: no limit). Returns True when a sequence changed its
        state.
        Raises ValueError for a plan that does not fit the slots' states.
        """
        self.plan_decode.clear()
        self.plan_prefill.clear()
        self.plan_chunk.clear()
        last = -1
        for slot in sorted(decode):
            self.check_slot(slot)
            if slot == last or self.slots[slot].state != MULLAMA_SLOT_DECODE:
                raise ValueError(f"slot {slot} cannot decode (listed twice, or not in that state)")
            last = slot
            self.plan_decode.push_back(slot)
        seen = set()
        for slot, n in prefill:
            self.check_slot(slot)
            left = <int> self.slots[slot].tokens.size() - self.slots[slot].n_past
            if slot in seen or self.slots[slot].state != MULLAMA_SLOT_PREFILL or not 1 <= n <= min(left, self.n_batch):
                raise ValueError(f"slot {slot} cannot prefill {n} tokens")
            seen.add(slot)
            self.plan_prefill.push_back(slot)
            self.plan_chunk.push_back(n)
        if self.plan_decode.empty() and self.plan_prefill.empty():
            return False
        self.group_plan()
        cdef uint64_t limit = max_steps
        cdef uint64_t until = until_ns
        cdef uint64_t released_at
        self.changed = False
        with nogil:
            self.steps(limit, until)
            released_at = now_ns()
        self.counters.gil_wait_ns += now_ns() - released_at
        return self.changed

    cdef void steps(self, uint64_t max_steps, uint64_t until_ns) noexcept nogil:
        cdef size_t i, j, k, n
        cdef uint64_t done = 0, start, now, turn
        cdef bint fresh = self.busy_since == 0
        cdef bint last
        self.resume_pool()
        # Plans and waits for the GIL between two runs are busy time too; only idling is not.
        start = now_ns() if fresh else self.busy_since
        if fresh and self.neighbours.age_ns() > IDLE_LOOK_NS:
            self.governor.awake(self.load(), start)
        while True:
            now = now_ns()
            if not self.turns.acquire(self.seat, self.deadline.stop):
                return
            turn = now_ns()
            self.counters.turn_wait_ns += turn - now
            if not self.plan_decode.empty():
                n = self.plan_ranges.size() - 1
                k = self.first_range()
                for i in range(n):
                    j = (k + i) % n
                    self.decode_rows(self.plan_ranges[j], self.plan_ranges[j + 1], i > 0)
            n = self.plan_prefill.size()
            k = self.first_chunk()
            for i in range(n):
                if self.deadline.stop.get():
                    break
                j = (k + i) % n
                self.prefill(self.plan_prefill[j], self.plan_chunk[j])
            self.counters.steps += 1
            done += 1
            now = now_ns()
            self.turns.release(self.seat, now - turn)
            self.counters.busy_ns += now - start
            for i in range(self.slots.size()):
                if self.slots[i].open():
                    self.slots[i].row.kv_cell_ns += self.slots[i].n_past * (now - start)
            start = self.busy_since = now
            self.publish()
            if self.governor.wants_look(now):
                self.governor.look(self.load(), now)
            last = self.changed or not self.plan_prefill.empty() or done == max_steps or self.interrupted.get() \
                or self.deadline.stop.get() or (until_ns != 0 and now >= until_ns)
            if self.pushed:
                self.pushed = False
                self.counters.wakeups += 1
                if last or not self.synchronous:
                    self.wake.signal()
                else:
                    self.deadline.wake = &self.wake  # from inside the next graph
            if last:
                return

    cdef int compute(self, int n_tokens, int n_seqs, uint64_t * ns) noexcept nogil:
        """Decode the batch, which is one ubatch. 0, or llama_decode's code; 2 only when told to stop."""
        cdef int rc, threads
        cdef uint64_t start, end, allowance
        cdef bint retry = False
        cdef bint is_new = self.in_charge.get() is not NULL and dereference(self.in_charge).is_new
        self.batch.n_tokens = n_tokens
        ns[0] = 0
        while True:
            threads = 1 if retry else self.governor.choose(n_tokens)
            if threads != self.threads_set:
                self.site(MULLAMA_SITE_THREADS, -1, 0, threads, self.threads_set)
                llama_set_n_threads(self.ctx, threads, threads)
                self.threads_set = threads
            # Buffers may have to grow for a set of adapters that is in charge for the first time.
            allowance = self.governor.allowance(n_tokens) if self.can_abort and not retry and not is_new else 0
            self.site(MULLAMA_SITE_UBATCH_BEGIN, self.batch.seq_id[0][0], 0, n_tokens, n_seqs)
            start = now_ns()
            if self.switched_ns != 0:
                self.counters.weight_pause_ns = start - self.switched_ns
            self.deadline.at_ns = start + allowance if allowance != 0 else 0
            rc = guarded_decode(self.ctx, self.batch, self.guard)
            if not self.synchronous:
                llama_synchronize(self.ctx)
            end = now_ns()
            if self.switched_ns != 0:
                self.counters.weight_first_ns = end
                self.switched_ns = 0
            ns[0] += end - start
            self.counters.decode_ns += end - start
            self.site(MULLAMA_SITE_UBATCH_END, self.batch.seq_id[0][0], 0, end - start, rc)
            if rc == 2 and not self.deadline.stop.get():
                # Given up at its deadline: somebody took a core. llama.cpp removed the ubatch's cells again.
                self.counters.decode_retries += 1
                self.governor.measured(n_tokens, threads, end - start, True, end)
                retry = True
                continue
            if rc == 0:
                if is_new:
                    dereference(self.in_charge).is_new = False
                else:
                    self.governor.measured(n_tokens, threads, end - start, False, end)
                self.counters.ubatches += 1
            return rc

    cdef void shift(self, int slot) noexcept nogil:
        """The context of a slot is full: keep the first ``shift_keep`` tokens and the newer half of the others."""
        cdef Slot * s = &self.slots[slot]
        cdef int keep = min(s.shift_keep, self.n_ctx // 2)
        cdef int drop = (s.n_past - keep) // 2
        llama_memory_seq_rm(self.mem, slot, keep, keep + drop)
        llama_memory_seq_add(self.mem, slot, keep + drop, s.n_past, -drop)
        s.tokens.erase(s.tokens.begin() + keep, s.tokens.begin() + keep + drop)
        s.n_past -= drop
        s.shifted += drop
        s.row.shifted += drop
        self.changed = True
        self.site(MULLAMA_SITE_SHIFT, slot, s.handle, drop, s.n_past)

    cdef void decode_rows(self, size_t first, size_t last, bint is_extra) noexcept nogil:
        """One token of each slot in plan_decode[first:last), a gap-free range of slots with one set of adapters.

        ``is_extra``: not the first of the step.
        """
        cdef size_t i
        cdef int row, rc, slot
        cdef Slot * s
        cdef uint64_t ns
        cdef int n = <int> (last - first)
        if self.deadline.stop.get():
            return
        if is_extra:
            if same_set(self.in_charge, self.slots[self.plan_decode[first]].lora):
                self.counters.split_ubatches += 1
            else:
                self.counters.adapter_ubatches += 1
        if not self.put_in_charge(self.plan_decode[first]):
            self.fail_rows(&self.plan_decode[first], n, CORE_ADAPTER)
            return
        for i in range(first, last):
            row = <int> (i - first)
            slot = self.plan_decode[i]
            s = &self.slots[slot]
            if s.n_past >= self.n_ctx and s.shift_keep >= 0:
                self.shift(slot)
            self.batch.token[row] = s.tokens[s.n_past]
            self.batch.pos[row] = s.n_past
            self.batch.n_seq_id[row] = 1
            self.batch.seq_id[row][0] = slot
            self.batch.logits[row] = 1
        rc = self.compute(n, n, &ns)
        if rc != 0:
            self.fail_rows(&self.plan_decode[first], n, rc)
            return
        self.counters.decode_tokens += n
        for i in range(first, last):
            s = &self.slots[self.plan_decode[i]]
            s.n_past += 1
            s.row.decode_ns += ns
            s.row.ubatches += 1
            s.row.batch_sum += n
            s.row.threads_min = min(s.row.threads_min, <uint32_t> self.threads_set)
            s.row.threads_max = max(s.row.threads_max, <uint32_t> self.threads_set)
        for i in range(first, last):
            self.commit(self.plan_decode[i], <int> (i - first))

    cdef void prefill(self, int slot, int n) noexcept nogil:
        """The next ``n`` prompt tokens of a slot; samples the first token when they are the last."""
        cdef Slot * s = &self.slots[slot]
        cdef int i, rc
        cdef uint64_t ns
        cdef int32_t which = slot
        cdef bint complete = s.n_past + n == <int> s.tokens.size()
        if not self.put_in_charge(slot):
            self.fail_rows(&which, 1, CORE_ADAPTER)
            return
        for i in range(n):
            self.batch.token[i] = s.tokens[s.n_past + i]
            self.batch.pos[i] = s.n_past + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = slot
            self.batch.logits[i] = 0
        if complete:
            self.batch.logits[n - 1] = 1
        if s.row.started_ns == 0:
            s.row.started_ns = now_ns()
        rc = self.compute(n, 1, &ns)
        if rc != 0:
            self.fail_rows(&which, 1, rc)
            return
        self.counters.prefill_tokens += n
        s.n_past += n
        s.row.prefill_ns += ns
        s.row.ubatches += 1
        s.row.batch_sum += 1
        if s.row.threads_min == 0:
            s.row.threads_min = self.threads_set
        s.row.threads_min = min(s.row.threads_min, <uint32_t> self.threads_set)
        s.row.threads_max = max(s.row.threads_max, <uint32_t> self.threads_set)
        if complete:
            s.state = MULLAMA_SLOT_DECODE
            self.changed = True
            self.commit(slot, n - 1)

    cdef void fail_rows(self, const int32_t * which, size_t n, int rc) noexcept nogil:
        """A decode failed for good: its sequences end with an error, nobody else notices."""
        cdef size_t i
        cdef int error = CORE_DECODE
        if rc == 2:
            return  # told to stop: the engine ends everything itself
        if rc == 1:
            error = CORE_NO_KV
        elif rc == CORE_ADAPTER:
            error = rc
        for i in range(n):
            self.slots[which[i]].poisoned = True
            self.finish(&self.slots[which[i]], which[i], MULLAMA_FINISH_ERROR, -1, error)

    cdef llama_token choose(self, int slot, int row, int * error) noexcept nogil:
        """Sample from the logits of a batch row. -1 with ``error`` set when that is not possible."""
        cdef Slot * s = &self.slots[slot]
        cdef float * logits = llama_get_logits_ith(self.ctx, row)
        cdef llama_token_data_array array
        cdef int32_t n
        cdef size_t i
        cdef llama_token token
        error[0] = CORE_NOT_FINITE
        if logits is NULL:
            error[0] = CORE_DECODE
            return -1
        if self.fault_slot == slot:
            self.fault_slot = -1
            logits[self.model.n_vocab // 2] = NAN
        # The row is ours until the next decode, so biases go straight into it.
        if s.ignore_eos or s.n_generated < s.min_tokens:
            for i in range(self.eog.size()):
                logits[self.eog[i]] = -1e30
        for i in range(s.bias.size()):
            logits[s.bias[i].token] += s.bias[i].bias
        if s.greedy:
            return scan_argmax(logits, self.model.n_vocab)
        if s.top_k_first > 0:
            n = scan_top_k(logits, self.model.n_vocab, s.top_k_first, self.candidates)
        else:
            n = scan_all(logits, self.model.n_vocab, self.candidates)
        if n < 0:
            return -1
        array.data = self.candidates.data()
        array.size = n
        array.selected = -1
        array.sorted = s.top_k_first > 0
        token = guarded_sample(s.chain, &array, self.guard)
        if token < 0:
            error[0] = CORE_SAMPLER
        return token

    cdef void commit(self, int slot, int row) noexcept nogil:
        """Sample the next token of a slot and let its text out; decides whether the request ends with it."""
        cdef Slot * s = &self.slots[slot]
        cdef int error = 0, stop = -1
        cdef uint64_t start = now_ns(), sampled, end
        cdef llama_token token = self.choose(slot, row, &error)
        cdef char piece[MAX_PIECE]
        cdef int32_t n = 0
        cdef size_t i
        cdef bint eog = False
        sampled = now_ns()
        s.row.sample_ns += sampled - start
        self.counters.sample_ns += sampled - start
        if token < 0:
            s.poisoned = True
            self.finish(s, slot, MULLAMA_FINISH_ERROR, -1, error)
            return
        self.counters.sampled_tokens += 1
        self.site(MULLAMA_SITE_SAMPLE, slot, s.handle, token, sampled - start)
        s.tokens.push_back(token)
        s.n_generated += 1
        s.row.completion_tokens += 1
        s.row.last_token_ns = sampled
        if s.row.first_token_ns == 0:
            s.row.first_token_ns = sampled
        for i in range(self.eog.size()):
            if self.eog[i] == token:
                eog = True
                break
        if not eog:
            n = llama_token_to_piece(self.model.vocab, token, piece, MAX_PIECE, 0, False)
            if n < 0:
                # A piece longer than any sane one: the negated length is what it needs.
                self.long_piece.resize(-n)
                n = llama_token_to_piece(self.model.vocab, token, &self.long_piece[0], -n, 0, False)
                stop = s.gate.push(&self.long_piece[0], max(n, 0), s.n_generated >= s.min_tokens, self.released)
            else:
                stop = s.gate.push(piece, n, s.n_generated >= s.min_tokens, self.released)
            s.pending_text.append(self.released)
        if eog or stop >= 0:
            self.finish(s, slot, MULLAMA_FINISH_STOP, stop, 0)
        elif s.n_generated >= s.max_tokens:
            self.finish(s, slot, MULLAMA_FINISH_LENGTH, -1, 0)
        else:
            self.flush_text(s, 1)
        end = now_ns()
        self.counters.commit_ns += end - sampled
