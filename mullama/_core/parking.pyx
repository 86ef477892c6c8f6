"""Running sequences out of their slots and back in: preemption, and the way to another core."""

cimport cython
from libc.stdint cimport uint64_t

from mullama._core.adapters cimport LoraSetPtr, build_set
from mullama._core.sampling cimport Chain, accept_all, build_chain, prepared_for
from mullama.errors import InvalidRequest


cdef class Parked:
    """A preempted sequence: all of its slot, and its KV when that was saved. Made by ``Core.preempt``."""

    def __dealloc__(self):
        self.slot.end_request()

    @property
    def n_bytes(self):
        """Host memory its saved KV takes."""
        return self.state.size()

    def tokens(self):
        """Its prompt and what it generated, as a list."""
        return list(self.slot.tokens)

    def left(self):
        """Tokens to compute before it decodes, when no prefix is found: 0 when its KV was saved while it decoded."""
        cdef int n = <int> self.slot.tokens.size() - self.slot.n_past
        return 0 if self.saved and self.slot.n_generated > 0 and n == 1 else n


@cython.no_gc_clear  # the context must be freed before the model that it points into
cdef class Parking(Slots):
    """Slots whose sequences can be taken out while they run."""

    def preempt(self, int slot, *, bint save):
        """Take a running sequence out of its slot, sampler, held-back text and all. Returns it Parked.

        ``save``: its KV goes to host memory, for ``resume`` to restore bit by bit. Otherwise (and when llama.cpp does
        not hand the state out) the slot retains it as a prefix like any other, and what is gone when the sequence
        comes back is computed again.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.state != MULLAMA_SLOT_PREFILL and s.state != MULLAMA_SLOT_DECODE:
            raise RuntimeError(f"slot {slot} has no running sequence")
        cdef uint64_t start = now_ns()
        cdef Parked parked = Parked.__new__(Parked)
        cdef size_t n = 0
        cdef int n_past = s.n_past
        parked.model = self.model
        if save and n_past > 0:
            with nogil:
                n = llama_state_seq_get_size(self.ctx, slot)
                parked.state.resize(n)
                n = llama_state_seq_get_data(self.ctx, parked.state.data(), n, slot)
            parked.saved = n > 0
        if not parked.saved:
            parked.state.clear()
        parked.state.shrink_to_fit()
        parked.since_ns = start
        parked.computed = n_past
        s.row.preemptions += 1
        swap_slots(self.slots[slot], parked.slot)
        # The page's row still shows the sequence that left: no slot is -1, so the next publish replaces it.
        s.row.slot = -1
        if not parked.saved:
            parked.slot.n_past = 0
        if not parked.saved and n_past > 0 and not parked.slot.poisoned and parked.slot.shifted == 0:
            s.tokens.assign(parked.slot.tokens.begin(), parked.slot.tokens.begin() + n_past)
            s.n_past = n_past
            s.state = MULLAMA_SLOT_RETAINED
            s.last_used = self.counters.steps
        else:
            self.clear_slot(slot)
        self.counters.preemptions += 1
        self.counters.parked += 1
        self.counters.parked_bytes += n
        if parked.saved:
            self.counters.swap_bytes += n
            self.counters.swap_ns += now_ns() - start
        self.site(MULLAMA_SITE_PREEMPT, slot, parked.slot.handle, n_past, n)
        return parked

    def resume(self, int slot, Parked parked not None, *, int reuse=0, int evicted=0):
        """Put a preempted sequence into a free or retained slot, where it goes on as if nothing had happened.

        ``reuse``: tokens of what the slot retains that are its own (see match), when its KV was not saved;
        ``evicted``: cached tokens given up for it. ``parked`` is empty afterwards.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.open():
            raise RuntimeError(f"slot {slot} is in use")
        if parked.slot.handle == 0:
            raise RuntimeError("this sequence has been resumed or ended already")
        cdef uint64_t start = now_ns()
        cdef size_t n = parked.state.size()
        cdef int i
        cdef bint restored = False
        if not 0 <= reuse < <int> parked.slot.tokens.size() or reuse > s.n_past:
            raise ValueError("reuse must leave one token to compute and be no more than the slot retains")
        for i in range(reuse):
            if s.tokens[i] != parked.slot.tokens[i]:
                raise ValueError("the retained tokens are not a prefix of the sequence")
        if parked.saved:
            reuse = parked.slot.n_past
            self.keep_head(slot, 0)
            with nogil:
                restored = llama_state_seq_set_data(self.ctx, parked.state.data(), n, slot) == n
            if not restored:
                self.cut(slot, 0)
                reuse = 0
            self.counters.swap_bytes += n
            self.counters.swap_ns += now_ns() - start
        else:
            reuse = self.keep_head(slot, reuse)
        swap_slots(self.slots[slot], parked.slot)
        parked.slot.end_request()
        parked.slot.tokens.clear()
        s.n_past = reuse
        s.row.slot = slot
        s.row.preempted_ns += start - parked.since_ns
        s.row.recomputed += max(parked.computed - reuse, 0)
        s.row.kv_cache_evict += evicted
        s.state = MULLAMA_SLOT_DECODE if s.n_generated > 0 and reuse == <int> s.tokens.size() - 1 \
            else MULLAMA_SLOT_PREFILL
        self.forget(parked)
        self.site(MULLAMA_SITE_RESUME, slot, s.handle, reuse, n)

    def cancel_parked(self, Parked parked not None):
        """End a preempted sequence (finish record CANCELLED). Harmless when it was resumed or has ended."""
        if parked.slot.handle == 0:
            return
        parked.slot.row.preempted_ns += now_ns() - parked.since_ns
        parked.slot.n_past = 0
        with nogil:
            self.finish(&parked.slot, -1, MULLAMA_FINISH_CANCELLED, -1, 0)
            self.wake.signal()
        parked.slot.end_request()
        self.forget(parked)
        self.publish()

    def let_go(self, Parked parked not None):
        """Give up a preempted sequence whose KV was not saved: another core takes it in."""
        if parked.saved or parked.slot.handle == 0:
            raise ValueError("only a preempted sequence without saved KV can change its core")
        self.counters.parked -= 1

    def take_in(self, Parked parked not None, uint64_t handle, tokens=None, params=None, adapters=()):
        """Know a preempted sequence that another core has let go by ``handle``; ``resume`` goes on with it.

        Where the other model's token ids mean something else, ``tokens`` are the sequence's text in this vocabulary
        and ``params`` the request's sampling parameters, of which the sampler is made anew. ``adapters`` are this
        core's. Raises InvalidRequest when it does not fit; then the sequence is as it was.
        """
        cdef vector[llama_token] known = parked.slot.tokens if tokens is None else tokens
        cdef vector[llama_logit_bias] bias
        cdef Chain chain
        cdef LoraSetPtr lora = build_set(self.model, adapters)
        cdef size_t i
        if known.empty() or <int> known.size() > self.n_ctx:
            raise InvalidRequest(f"{known.size()} tokens do not fit this model's context of {self.n_ctx}")
        for i in range(known.size()):
            self.model.check_token(known[i])
        if tokens is not None:
            chain = build_chain(prepared_for(self.model, params, None), params, self.n_ctx, bias)
            if parked.slot.chain is not NULL:
                llama_sampler_free(parked.slot.chain)
            parked.slot.chain = chain.ptr
            parked.slot.greedy = chain.greedy
            parked.slot.top_k_first = chain.top_k_first
            parked.slot.bias.swap(bias)
            parked.slot.tokens.swap(known)
            if chain.ptr is not NULL:
                with nogil:
                    accept_all(chain.ptr, parked.slot.tokens, chain.look_back)
        parked.slot.max_tokens = min(
            parked.slot.max_tokens,
            parked.slot.n_generated + max(1, self.n_ctx - <int> parked.slot.tokens.size() + 1))
        parked.slot.handle = parked.slot.row.handle = handle
        parked.computed = 0
        parked.model = self.model
        parked.slot.lora = lora
        self.counters.parked += 1

    def drop_saved(self, Parked parked not None):
        """Give up the saved KV of a preempted sequence; it is computed again when the sequence comes back."""
        if parked.saved:
            self.counters.parked_bytes -= parked.state.size()
            parked.state.clear()
            parked.state.shrink_to_fit()
            parked.saved = False
            parked.slot.n_past = 0

    cdef void forget(self, Parked parked) noexcept:
        """A preempted sequence has left host memory."""
        self.counters.parked -= 1
        self.counters.parked_bytes -= parked.state.size()
        parked.state.clear()
        parked.state.shrink_to_fit()
        parked.saved = False

    def parked_bytes(self):
        """Host memory of the saved KV of preempted sequences."""
        return self.counters.parked_bytes

    def damage_parked(self, Parked parked not None):
        """Fault injection for tests: the saved KV of a preempted sequence no longer is what llama.cpp wrote."""
        cdef size_t n = parked.state.size() // 2
        self.counters.parked_bytes -= parked.state.size() - n
        parked.state.resize(n)
