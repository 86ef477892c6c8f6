"""A running sequence out of its slot: preempted, or on its way to another core."""

cimport cython
from libc.stdint cimport uint64_t

from mullama._core.constraint.grammars cimport MatchingPtr
from mullama._core.lora.adapters cimport LoraSetPtr, build_set
from mullama._core.output.clock cimport now_ns
from mullama._core.llama cimport *
from mullama._core.sampling.chain cimport Chain, Sampling, accept_all, begin_matching, build_chain, prepared_for
from mullama._core.core.slots cimport Slot, Slots, swap_slots
from mullama.abi cimport *
from mullama.errors import InvalidRequest


@cython.final
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

    cdef int take_from(self, Slots * slots, int slot, bint save) except -1:
        """Be what runs in a slot, which retains its KV as a prefix when that is not saved, or could not be."""
        cdef Slot * s = slots.at(slot)
        cdef size_t n = 0
        cdef int n_past = s.n_past
        self.since_ns = now_ns()
        self.computed = n_past
        if save and n_past > 0:
            with nogil:
                n = llama_state_seq_get_size(slots.ctx, slot)
                self.state.resize(n)
                n = llama_state_seq_get_data(slots.ctx, self.state.data(), n, slot)
            self.saved = n > 0
        if not self.saved:
            self.state.clear()
        self.state.shrink_to_fit()
        s.row.preemptions += 1
        swap_slots(s[0], self.slot)
        # The page's row still shows the sequence that left: no slot is -1, so the next publish replaces it.
        s.row.slot = -1
        if not self.saved:
            self.slot.n_past = 0
        if not self.saved and n_past > 0 and not self.slot.poisoned and self.slot.shifted == 0:
            s.tokens.assign(self.slot.tokens.begin(), self.slot.tokens.begin() + n_past)
            slots.retain(slot, n_past)
        else:
            slots.clear(slot)
        slots.out.counters.preemptions += 1
        slots.out.counters.parked += 1
        slots.out.counters.parked_bytes += n
        if self.saved:
            slots.out.counters.swap_bytes += n
            slots.out.counters.swap_ns += now_ns() - self.since_ns
        slots.out.site(MULLAMA_SITE_PREEMPT, slot, self.slot.handle, n_past, n)
        return 0

    cdef int put_into(self, Slots * slots, int slot, int reuse) except -1:
        """Go on in a free or retained slot, on ``reuse`` tokens of what it retains where the KV was not saved."""
        cdef Slot * s = slots.at(slot)
        cdef uint64_t start = now_ns()
        cdef size_t n = self.state.size()
        cdef int i
        cdef bint restored = False
        if not 0 <= reuse < <int> self.slot.tokens.size() or reuse > s.n_past:
            raise ValueError("reuse must leave one token to compute and be no more than the slot retains")
        for i in range(reuse):
            if s.tokens[i] != self.slot.tokens[i]:
                raise ValueError("the retained tokens are not a prefix of the sequence")
        if self.saved:
            reuse = self.slot.n_past
            slots.keep_head(slot, 0)
            with nogil:
                restored = llama_state_seq_set_data(slots.ctx, self.state.data(), n, slot) == n
            if not restored:
                slots.cut(slot, 0)
                reuse = 0
            slots.out.counters.swap_bytes += n
            slots.out.counters.swap_ns += now_ns() - start
        else:
            reuse = slots.keep_head(slot, reuse)
        swap_slots(s[0], self.slot)
        self.slot.end_request()
        self.slot.tokens.clear()
        s.n_past = reuse
        s.row.slot = slot
        s.row.preempted_ns += start - self.since_ns
        s.row.recomputed += max(self.computed - reuse, 0)
        s.state = MULLAMA_SLOT_DECODE if s.n_generated > 0 and reuse == <int> s.tokens.size() - 1 \
            else MULLAMA_SLOT_PREFILL
        self.forget(slots)
        slots.out.site(MULLAMA_SITE_RESUME, slot, s.handle, reuse, n)
        return 0

    cdef int adopt(self, Model model, int n_ctx, uint64_t handle, tokens, int n_prompt, params,
                   adapters) except -1:
        """Become a sequence of another model (see Core.take_in)."""
        cdef vector[llama_token] known = self.slot.tokens if tokens is None else tokens
        cdef vector[llama_logit_bias] bias
        cdef vector[llama_token] answer
        cdef Sampling sampling
        cdef MatchingPtr matching
        cdef Chain chain
        cdef LoraSetPtr lora = build_set(model, adapters)
        cdef size_t i
        if known.empty() or <int> known.size() > n_ctx:
            raise InvalidRequest(f"{known.size()} tokens do not fit this model's context of {n_ctx}")
        for i in range(known.size()):
            model.check_token(known[i])
        if tokens is not None:
            sampling = prepared_for(model, params, None)
            answer = tokens[n_prompt:]
            matching = begin_matching(sampling, model, answer)
            chain = build_chain(sampling, params, n_ctx, bias)
            if self.slot.chain is not NULL:
                llama_sampler_free(self.slot.chain)
            self.slot.chain = chain.ptr
            self.slot.greedy = chain.greedy
            self.slot.top_k_first = chain.top_k_first
            self.slot.bias.swap(bias)
            self.slot.shown = model.controls_of(params.shown)
            self.slot.matching = matching
            self.slot.tokens.swap(known)
            if chain.ptr is not NULL:
                with nogil:
                    accept_all(chain.ptr, self.slot.tokens, chain.look_back)
        self.slot.max_tokens = min(
            self.slot.max_tokens,
            self.slot.n_generated + max(1, n_ctx - <int> self.slot.tokens.size() + 1))
        self.slot.handle = self.slot.row.handle = handle
        self.computed = 0
        self.model = model
        self.slot.lora = lora
        return 0

    cdef void drop(self, Slots * slots) noexcept:
        """Give up the saved KV."""
        slots.out.counters.parked_bytes -= self.state.size()
        self.state.clear()
        self.state.shrink_to_fit()
        self.saved = False

    cdef void forget(self, Slots * slots) noexcept:
        """It has left host memory."""
        slots.out.counters.parked -= 1
        self.drop(slots)
