"""The hot loop: fill a batch, decode, sample, commit text and KV bookkeeping, again, without the GIL.

A slot in prefill computes until n_past reaches the end of its tokens (slots.h), and samples there.

Every llama_decode call is one ubatch of one shape: single tokens of a gap-free range of slots, or one prompt chunk.
All of its rows have one set of LoRA adapters, because llama.cpp applies adapters to the context. A step goes through
the sets in turn and begins with the one that is in charge already.
"""

cimport cython
from cython.operator cimport dereference
from libc.math cimport INFINITY, NAN
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libcpp.vector cimport vector

from mullama._core.lora.adapters cimport same_set
from mullama._core.constraint.grammars cimport Next, apply_mask
from mullama._core.output.clock cimport now_ns
from mullama._core.compute.compute cimport (
    CORE_ADAPTER, CORE_CONSTRAINT, CORE_DECODE, CORE_NO_KV, CORE_NOT_FINITE, CORE_SAMPLER, Compute, guarded_decode, guarded_sample)
from mullama._core.llama cimport *
from mullama._core.output.output cimport Output
from mullama._core.core.slots cimport MAX_PIECE, Slot, Slots
from mullama.abi cimport *

# A shorter idle time says too little of what others do.
cdef uint64_t IDLE_LOOK_NS = 200 * 1000 * 1000


@cython.final
cdef class Loop:
    """The steps of one Core. It has no Python face: Core.run checks a plan and hands it over."""

    def __cinit__(self):
        self.fault_slot = -1

    cdef void connect(self, Output * out, Compute * compute, Slots * slots) noexcept:
        """The parts of the Core that has this loop."""
        self.out = out
        self.compute = compute
        self.slots = slots

    cdef void take_on(self, const llama_vocab * vocab, const vector[llama_token] & eog) noexcept:
        """Sample for this vocabulary from now on, whose Model the Core keeps."""
        self.vocab = vocab
        self.n_vocab = llama_vocab_n_tokens(vocab)
        self.eog = eog

    cdef bint run(self, vector[int32_t] & decode, vector[int32_t] & prefill, vector[int32_t] & chunks,
                  uint64_t max_steps, uint64_t until_ns) noexcept nogil:
        """Carry out a plan that fits the states of the slots (see Core.run). Whether a sequence changed its state."""
        self.plan_decode.swap(decode)
        self.plan_prefill.swap(prefill)
        self.plan_chunk.swap(chunks)
        self.group_plan()
        self.slots.changed = False
        self.steps(max_steps, until_ns)
        return self.slots.changed

    cdef inline Slot * decoding(self, size_t i) noexcept nogil:
        """The slot of an entry of the plan's decodes."""
        return self.slots.at(self.plan_decode[i])

    cdef inline Slot * filling(self, size_t i) noexcept nogil:
        """The slot of an entry of the plan's chunks."""
        return self.slots.at(self.plan_prefill[i])

    cdef void group_plan(self) noexcept nogil:
        """Bring slots with equal sets together, in the order in which the sets come first, and find the ranges."""
        cdef size_t i, j, n = self.plan_decode.size()
        cdef int32_t slot, n_tokens
        for i in range(1, n):
            if same_set(self.decoding(i).lora, self.decoding(i - 1).lora):
                continue
            for j in range(i + 1, n):
                if same_set(self.decoding(j).lora, self.decoding(i - 1).lora):
                    slot = self.plan_decode[j]
                    self.plan_decode.erase(self.plan_decode.begin() + j)
                    self.plan_decode.insert(self.plan_decode.begin() + i, slot)
                    break
        self.plan_ranges.clear()
        for i in range(n):
            if i == 0 or not same_set(self.decoding(i).lora, self.decoding(i - 1).lora) \
                    or not (self.slots.unified or self.plan_decode[i] == self.plan_decode[i - 1] + 1):
                self.plan_ranges.push_back(i)
        if n > 0:
            self.plan_ranges.push_back(n)
        n = self.plan_prefill.size()
        for i in range(1, n):
            if same_set(self.filling(i).lora, self.filling(i - 1).lora):
                continue
            for j in range(i + 1, n):
                if same_set(self.filling(j).lora, self.filling(i - 1).lora):
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
            if same_set(self.decoding(self.plan_ranges[i]).lora, self.slots.in_charge):
                return i
        return 0

    cdef size_t first_chunk(self) noexcept nogil:
        """The same among the prompt chunks."""
        cdef size_t i
        for i in range(self.plan_prefill.size()):
            if same_set(self.filling(i).lora, self.slots.in_charge):
                return i
        return 0

    cdef void steps(self, uint64_t max_steps, uint64_t until_ns) noexcept nogil:
        cdef size_t i, j, k, n
        cdef uint64_t done = 0, start, now, turn
        cdef bint fresh = self.compute.busy_since == 0
        cdef bint last
        self.compute.resume()
        # Plans and waits for the GIL between two runs are busy time too; only idling is not.
        start = now_ns() if fresh else self.compute.busy_since
        if fresh and self.compute.neighbours.age_ns() > IDLE_LOOK_NS:
            self.compute.governor.wake(self.compute.load(), start)
        while True:
            now = now_ns()
            if not self.compute.take_turn():
                return
            turn = now_ns()
            self.out.counters.turn_wait_ns += turn - now
            if not self.plan_decode.empty():
                n = self.plan_ranges.size() - 1
                k = self.first_range()
                for i in range(n):
                    j = (k + i) % n
                    self.decode_rows(self.plan_ranges[j], self.plan_ranges[j + 1], i > 0)
            n = self.plan_prefill.size()
            k = self.first_chunk()
            for i in range(n):
                if self.compute.deadline.stop.get():
                    break
                j = (k + i) % n
                self.prefill(self.plan_prefill[j], self.plan_chunk[j])
            self.out.counters.steps += 1
            done += 1
            now = now_ns()
            self.compute.give_turn(now - turn)
            self.out.counters.busy_ns += now - start
            for i in range(self.slots.size()):
                if self.slots.at(i).open():
                    self.slots.at(i).row.kv_cell_ns += self.slots.at(i).n_past * (now - start)
            start = self.compute.busy_since = now
            self.slots.publish(self.compute[0])
            if self.compute.governor.wants_look(now):
                self.compute.governor.look(self.compute.load(), now)
            last = self.slots.changed or not self.plan_prefill.empty() or done == max_steps \
                or (until_ns != 0 and now >= until_ns) \
                or self.compute.interrupted.get() or self.compute.deadline.stop.get()
            if self.out.pushed:
                self.out.pushed = False
                self.out.counters.wakeups += 1
                if last or not self.compute.synchronous:
                    self.out.wake.signal()
                else:
                    self.compute.deadline.wake = &self.out.wake  # from inside the next graph
            if last:
                return

    cdef int decode(self, int n_tokens, int n_seqs, uint64_t * ns) noexcept nogil:
        """Decode the batch, which is one ubatch. 0, or llama_decode's code; 2 only when told to stop."""
        cdef int rc, threads
        cdef uint64_t start, end, allowance, switched_ns
        cdef bint retry = False
        cdef bint is_new = self.slots.in_charge.get() is not NULL and dereference(self.slots.in_charge).is_new
        self.compute.batch.n_tokens = n_tokens
        self.compute.masks.start()
        ns[0] = 0
        while True:
            threads = 1 if retry else self.compute.governor.threads_for(n_tokens)
            if threads != self.compute.threads:
                self.out.site(MULLAMA_SITE_THREADS, -1, 0, threads, self.compute.threads)
                llama_set_n_threads(self.slots.ctx, threads, threads)
                self.compute.threads = threads
            # Buffers may have to grow for a set of adapters that is in charge for the first time.
            allowance = 0
            if self.compute.can_abort and not retry and not is_new:
                allowance = self.compute.governor.allowance(n_tokens)
            self.out.site(MULLAMA_SITE_UBATCH_BEGIN, self.compute.batch.seq_id[0][0], 0, n_tokens, n_seqs)
            start = now_ns()
            switched_ns = self.compute.switched_ns()
            if switched_ns != 0:
                self.out.counters.weight_pause_ns = start - switched_ns
            self.compute.deadline.at_ns = start + allowance if allowance != 0 else 0
            rc = guarded_decode(self.slots.ctx, self.compute.batch, self.compute.guard)
            if not self.compute.synchronous:
                llama_synchronize(self.slots.ctx)
            end = now_ns()
            if switched_ns != 0:
                self.out.counters.weight_first_ns = end
                self.compute.set_switched(0)
            ns[0] += end - start
            self.out.counters.decode_ns += end - start
            self.out.site(MULLAMA_SITE_UBATCH_END, self.compute.batch.seq_id[0][0], 0, end - start, rc)
            if rc == 2 and not self.compute.deadline.stop.get():
                # Given up at its deadline: somebody took a core. llama.cpp removed the ubatch's cells again.
                self.out.counters.decode_retries += 1
                self.compute.governor.record(n_tokens, threads, end - start, True, end)
                retry = True
                continue
            if rc == 0:
                if is_new:
                    dereference(self.slots.in_charge).is_new = False
                else:
                    self.compute.governor.record(n_tokens, threads, end - start, False, end)
                self.out.counters.ubatches += 1
            return rc

    cdef void shift(self, int slot) noexcept nogil:
        """The context of a slot is full: keep the first ``shift_keep`` tokens and the newer half of the others."""
        cdef Slot * s = self.slots.at(slot)
        cdef int keep = min(s.shift_keep, self.slots.n_ctx // 2)
        cdef int drop = (s.n_past - keep) // 2
        llama_memory_seq_rm(self.slots.mem, slot, keep, keep + drop)
        llama_memory_seq_add(self.slots.mem, slot, keep + drop, s.n_past, -drop)
        s.tokens.erase(s.tokens.begin() + keep, s.tokens.begin() + keep + drop)
        s.n_past -= drop
        s.shifted += drop
        s.row.shifted += drop
        self.slots.changed = True
        self.out.site(MULLAMA_SITE_SHIFT, slot, s.handle, drop, s.n_past)

    cdef void decode_rows(self, size_t first, size_t last, bint is_extra) noexcept nogil:
        """One token of each slot in plan_decode[first:last), a gap-free range of slots with one set of adapters.

        ``is_extra``: not the first of the step.
        """
        cdef size_t i
        cdef int row, rc, slot
        cdef Slot * s
        cdef uint64_t ns
        cdef int n = <int> (last - first), n_tokens = n, j
        if self.compute.deadline.stop.get() or not self.catch_up(first, last):
            return
        if is_extra:
            if same_set(self.slots.in_charge, self.decoding(first).lora):
                self.out.counters.split_ubatches += 1
            else:
                self.out.counters.adapter_ubatches += 1
        if not self.slots.put_in_charge(self.decoding(first).lora):
            self.fail_rows(&self.plan_decode[first], n, CORE_ADAPTER)
            return
        for i in range(first, last):
            row = <int> (i - first)
            slot = self.plan_decode[i]
            s = self.slots.at(slot)
            if s.n_past >= self.slots.n_ctx and s.shift_keep >= 0:
                self.shift(slot)
            if n == 1:
                n_tokens = <int> s.tokens.size() - s.n_past
                for j in range(n_tokens):
                    self.compute.put_token(j, s.tokens[s.n_past + j], s.n_past + j, slot, j == n_tokens - 1)
            else:
                self.compute.put_token(row, s.tokens[s.n_past], s.n_past, slot, True)
        rc = self.decode(n_tokens, n, &ns)
        if rc != 0:
            self.fail_rows(&self.plan_decode[first], n, rc)
            return
        self.out.counters.decode_tokens += n_tokens
        for i in range(first, last):
            s = self.decoding(i)
            s.n_past += n_tokens if n == 1 else 1
            s.row.decode_ns += ns
            s.row.ubatches += 1
            s.row.batch_sum += n
            s.row.threads_min = min(s.row.threads_min, <uint32_t> self.compute.threads)
            s.row.threads_max = max(s.row.threads_max, <uint32_t> self.compute.threads)
        for i in range(first, last):
            self.commit(self.plan_decode[i], n_tokens - 1 if n == 1 else <int> (i - first))

    cdef bint catch_up(self, size_t first, size_t last) noexcept nogil:
        """Compute what slots of a range have to compute beside their last token: tokens that a grammar forced. One that
        is alone in its range computes them together with that.

        False: one failed, and the range is none any more.
        """
        cdef size_t i
        cdef int j, n, rc, most = self.n_batch if last - first == 1 else 1
        cdef uint64_t ns
        cdef Slot * s
        for i in range(first, last):
            s = self.decoding(i)
            while <int> s.tokens.size() - s.n_past > most:
                n = min(<int> s.tokens.size() - s.n_past - 1, self.n_batch)
                if not self.slots.put_in_charge(s.lora):
                    self.fail_rows(&self.plan_decode[i], 1, CORE_ADAPTER)
                    return False
                for j in range(n):
                    self.compute.put_token(j, s.tokens[s.n_past + j], s.n_past + j, self.plan_decode[i], False)
                rc = self.decode(n, 1, &ns)
                if rc != 0:
                    self.fail_rows(&self.plan_decode[i], 1, rc)
                    return False
                self.out.counters.decode_tokens += n
                s.n_past += n
                s.row.decode_ns += ns
                s.row.ubatches += 1
                s.row.batch_sum += 1
        return True

    cdef bint comes_at_once(self, Slot * s) noexcept nogil:
        """Whether forced tokens are computed together, before the next step, because that costs less than their share
        of as many steps."""
        cdef int n = <int> dereference(s.matching).n_forced()
        cdef int rows = max(<int> self.plan_decode.size(), 1)
        cdef double alone = self.compute.governor.expected(n), together = self.compute.governor.expected(rows)
        if s.shift_keep >= 0 or n < 2:
            return False
        if alone <= 0 or together <= 0:
            return n > rows
        return alone * rows < together * n

    cdef void prefill(self, int slot, int n) noexcept nogil:
        """The next ``n`` prompt tokens of a slot; samples the first token when they are the last."""
        cdef Slot * s = self.slots.at(slot)
        cdef int i, rc
        cdef uint64_t ns
        cdef int32_t which = slot
        cdef bint complete = s.n_past + n == <int> s.tokens.size()
        if not self.slots.put_in_charge(s.lora):
            self.fail_rows(&which, 1, CORE_ADAPTER)
            return
        for i in range(n):
            self.compute.put_token(i, s.tokens[s.n_past + i], s.n_past + i, slot, complete and i == n - 1)
        if s.row.started_ns == 0:
            s.row.started_ns = now_ns()
        rc = self.decode(n, 1, &ns)
        if rc != 0:
            self.fail_rows(&which, 1, rc)
            return
        self.out.counters.prefill_tokens += n
        s.n_past += n
        s.row.prefill_ns += ns
        s.row.ubatches += 1
        s.row.batch_sum += 1
        if s.row.threads_min == 0:
            s.row.threads_min = self.compute.threads
        s.row.threads_min = min(s.row.threads_min, <uint32_t> self.compute.threads)
        s.row.threads_max = max(s.row.threads_max, <uint32_t> self.compute.threads)
        if complete:
            s.state = MULLAMA_SLOT_DECODE
            self.slots.changed = True
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
            self.slots.at(which[i]).poisoned = True
            self.slots.finish(self.slots.at(which[i]), which[i], MULLAMA_FINISH_ERROR, -1, error)

    cdef llama_token choose(self, int slot, int row, int * error) noexcept nogil:
        """Sample from the logits of a batch row. -1 with ``error`` set when that is not possible."""
        cdef Slot * s = self.slots.at(slot)
        cdef float * logits = llama_get_logits_ith(self.slots.ctx, row)
        cdef const uint32_t * mask
        cdef size_t i
        cdef llama_token token
        error[0] = CORE_NOT_FINITE
        if logits is NULL:
            error[0] = CORE_DECODE
            return -1
        if self.fault_slot == slot:
            self.fault_slot = -1
            logits[self.n_vocab // 2] = NAN
        # The row is ours until the next decode, so masks and biases go straight into it.
        if s.matching.get() is not NULL and not dereference(s.matching).is_open():
            mask = dereference(s.matching).mask()
            if mask is NULL:
                error[0] = CORE_CONSTRAINT
                return -1
            apply_mask(logits, self.n_vocab, mask)
        if s.ignore_eos or s.n_generated < s.min_tokens \
                or (s.matching.get() is not NULL and not dereference(s.matching).may_end()):
            for i in range(self.eog.size()):
                logits[self.eog[i]] = -1e30
        for i in range(s.bias.size()):
            logits[s.bias[i].token] += s.bias[i].bias
        while True:
            token = self.draw(s, logits, error)
            if token < 0 or s.matching.get() is NULL or dereference(s.matching).may_come(token, self.vocab):
                return token
            logits[token] = -INFINITY

    cdef llama_token draw(self, Slot * s, const float * logits, int * error) noexcept nogil:
        """Sample from a row that is as it should be."""
        cdef llama_token_data_array array
        cdef int32_t n
        cdef llama_token token
        if s.greedy:
            return scan_argmax(logits, self.n_vocab)
        if s.top_k_first > 0:
            n = scan_top_k(logits, self.n_vocab, s.top_k_first, self.candidates)
        else:
            n = scan_all(logits, self.n_vocab, self.candidates)
        if n < 0:
            return -1
        array.data = self.candidates.data()
        array.size = n
        array.selected = -1
        array.sorted = s.top_k_first > 0
        token = guarded_sample(s.chain, &array, self.compute.guard)
        if token < 0:
            error[0] = CORE_SAMPLER
        return token

    cdef void commit(self, int slot, int row) noexcept nogil:
        """Sample the next token of a slot and let its text out; decides whether the request ends with it."""
        cdef Slot * s = self.slots.at(slot)
        cdef int error = 0
        cdef uint64_t start = now_ns(), sampled
        cdef llama_token token
        if s.matching.get() is not NULL and dereference(s.matching).has_forced():
            token = dereference(s.matching).take_forced()
        else:
            token = self.choose(slot, row, &error)
        sampled = now_ns()
        s.row.sample_ns += sampled - start
        self.out.counters.sample_ns += sampled - start
        if token < 0:
            s.poisoned = True
            self.slots.finish(s, slot, MULLAMA_FINISH_ERROR, -1, error)
            return
        if self.append(s, slot, token, start, sampled) and s.matching.get() is not NULL and self.comes_at_once(s):
            while dereference(s.matching).has_forced():
                start = now_ns()
                if not self.append(s, slot, dereference(s.matching).take_forced(), start, start):
                    break
        self.out.counters.commit_ns += now_ns() - sampled

    cdef bint append(self, Slot * s, int slot, llama_token token, uint64_t start, uint64_t sampled) noexcept nogil:
        """A token of a slot is chosen: let its text out. Whether the request goes on."""
        cdef int stop = -1
        cdef Next next = Next.goes_on
        cdef char piece[MAX_PIECE]
        cdef int32_t n = 0
        cdef size_t i
        cdef bint eog = False, shows = False
        self.out.counters.sampled_tokens += 1
        self.out.site(MULLAMA_SITE_SAMPLE, slot, s.handle, token, sampled - start)
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
            shows = s.shows(token)
            n = llama_token_to_piece(self.vocab, token, piece, MAX_PIECE, 0, shows)
            if n < 0:
                # A piece longer than any sane one: the negated length is what it needs.
                self.long_piece.resize(-n)
                n = llama_token_to_piece(self.vocab, token, &self.long_piece[0], -n, 0, shows)
                stop = s.gate.push(&self.long_piece[0], max(n, 0), s.n_generated >= s.min_tokens, self.released)
            else:
                stop = s.gate.push(piece, n, s.n_generated >= s.min_tokens, self.released)
            s.pending_text.append(self.released)
        if not eog and stop < 0 and s.matching.get() is not NULL:
            next = dereference(s.matching).seen(token, self.vocab)
            if next == Next.goes_on and dereference(s.matching).wants_mask():
                self.compute.masks.add(s.matching)
        if eog or stop >= 0 or next == Next.complete:
            self.slots.finish(s, slot, MULLAMA_FINISH_STOP, stop, 0)
        elif next == Next.failed:
            self.slots.finish(s, slot, MULLAMA_FINISH_ERROR, -1, CORE_CONSTRAINT)
        elif s.n_generated >= s.max_tokens:
            self.slots.finish(s, slot, MULLAMA_FINISH_LENGTH, -1, 0)
        else:
            self.slots.flush_text(s)
            return True
        return False
