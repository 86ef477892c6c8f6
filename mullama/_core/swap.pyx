"""Other weights under a running Core: KV is copied ahead while the old ones serve, and a step boundary is all it takes.

    Carrier(core, context)       the target is there; nothing has changed
    warm()                       its first decodes, one at a time
    ahead(budget_ns)             KV goes over in slices between two steps, running sequences first
    commit()                     what is left of the running ones goes over, and the next step uses the new weights
    follow(budget_ns)            retained prefixes that stayed behind come over, in slices or when they are asked for
    finish()                     the old context, for its last user to free

Everything belongs to the engine thread. KV is append-only: what was copied of a sequence stays right until it is cut or
shifted, and the Core takes note of both (Core.cut, Core.shift). Where KV has no rows (sliding windows, recurrent state)
or is shared between sequences (the unified layout), it goes over whole in ``commit``, and the pause grows with it.
"""

from libc.stdint cimport uint8_t, uint64_t
from libcpp.vector cimport vector

from mullama._core.context cimport Context
from mullama._core.governor cimport Governor
from mullama._core.llama cimport *
from mullama._core.loop cimport Core, now_ns
from mullama.abi cimport *
from mullama.errors import ComputeFailed, InvalidRequest

cdef enum:
    SLICE_TOKENS = 256  # between two looks at the clock
    WARM_DECODES = 2    # on one thread, and on all


cdef class Carrier:
    """The change of a Core's context to ``target``. One at a time. Raises InvalidRequest when their shapes differ."""

    def __init__(self, Core core not None, Context target not None):
        if core.target is not None or core.source is not None:
            raise InvalidRequest("the weights are being changed already")
        if target.ctx is NULL or core.ctx is NULL:
            raise RuntimeError("a context was closed")
        core.context.check_place(target)
        cdef int i
        self.core = core
        self.target = target
        self.governor = Governor(core.governor.n_max, core.governor.fixed)
        self.by_rows = target.token_bytes > 0 and not target.needs_checkpoint and not target.unified
        self.committed = False
        self.is_clear = True
        core.attach(target.ctx)
        core.target = target
        for i in range(core.n_slots):
            core.ahead[i] = 0

    def warm(self):
        """One of the first decodes of the new weights, before any KV is there. Returns whether there are more to do.

        They show what these weights cost on one thread and on all. Raises ModelLoadError when they fail.
        """
        cdef int i = self.warmed
        cdef bint single = not self.governor.fixed and i < WARM_DECODES
        if i >= (WARM_DECODES if self.governor.fixed else 2 * WARM_DECODES):
            return False
        self.core.resume_pool()
        cdef uint64_t start
        if not self.core.take_turn():
            return False
        start = now_ns()
        if i % WARM_DECODES == 0:
            self.clear()
        try:
            if self.core.try_threads(self.target.ctx, self.governor, 1 if single else self.governor.n_max,
                                     i % WARM_DECODES, 1, i % WARM_DECODES > 0):
                self.warmed += 1
            else:
                self.warmed = 2 * WARM_DECODES  # somebody takes a core: the governor knows
        finally:
            self.core.turns.release(self.core.seat, now_ns() - start)
            self.is_clear = False
        return self.warmed < (WARM_DECODES if self.governor.fixed else 2 * WARM_DECODES)

    cdef void clear(self) noexcept:
        """Empty the target of what ``warm`` left in it."""
        if not self.is_clear:
            llama_memory_clear(self.target.mem, False)
            self.is_clear = True

    def ahead(self, uint64_t budget_ns, *, bint retained=True):
        """Copy KV to the target for about ``budget_ns``. Returns the tokens that are still to be copied.

        Running sequences come first; ``retained`` prefixes are left for ``follow`` when it is not set.
        """
        cdef Core core = self.core
        cdef uint64_t start = now_ns()
        cdef int kind, i, end
        cdef uint64_t left = 0
        cdef bint ok
        if not self.by_rows or self.committed:
            return 0
        self.clear()
        for kind in range(2 if retained else 1):
            for i in range(core.n_slots):
                if (kind == 0) != core.slots[i].open() or core.slots[i].poisoned:
                    continue
                while core.ahead[i] < core.slots[i].n_past:
                    if now_ns() - start >= budget_ns:
                        left += core.slots[i].n_past - core.ahead[i]
                        break
                    end = min(core.ahead[i] + <int> SLICE_TOKENS, core.slots[i].n_past)
                    with nogil:
                        ok = core.carry_rows(core.ctx, self.target.ctx, i, core.ahead[i], end)
                    if not ok:
                        raise ComputeFailed(f"the KV of slot {i} could not be copied to the new weights")
                    core.ahead[i] = end
        core.counters.weight_swap_ns += now_ns() - start
        return left

    def commit(self, *, bint with_kv=True):
        """Let the new weights take the next step. Returns (running sequences carried over, bytes copied just now).

        Without ``with_kv`` no slot may hold anything. Raises ComputeFailed when llama.cpp does not take the KV over:
        then the old weights stay in charge, and ``abandon`` should follow.
        """
        cdef Core core = self.core
        cdef uint64_t start = now_ns(), bytes_before = core.counters.weight_swap_bytes
        cdef int i, n_running = 0
        if self.committed:
            raise RuntimeError("the new weights are in charge already")
        self.clear()
        for i in range(core.n_slots):
            if core.slots[i].open():
                n_running += 1
            if not with_kv and core.slots[i].n_past > 0:
                raise RuntimeError(f"slot {i} still holds KV of the old weights")
        if with_kv and not self.by_rows:
            if core.unified:
                self.carry_all()
            else:
                self.carry_states()
        elif with_kv:
            for i in range(core.n_slots):
                if core.slots[i].open() and core.ahead[i] < core.slots[i].n_past:
                    if not core.carry_rows(core.ctx, self.target.ctx, i, core.ahead[i], core.slots[i].n_past):
                        raise ComputeFailed(f"the KV of slot {i} could not be copied to the new weights")
                    core.ahead[i] = core.slots[i].n_past
        self.committed = True
        core.reused_before += llama_perf_context(core.ctx).n_reused
        llama_detach_threadpool(core.ctx)
        core.source = core.context
        core.target = None
        core.governor = self.governor
        core.take_on(self.target)
        for i in range(core.n_slots):
            # NOTE: no conditional expression here: Cython 3 makes a dangling reference of a vector's element in one.
            core.away[i] = -1
            if self.by_rows and core.ahead[i] < core.slots[i].n_past:
                core.away[i] = core.ahead[i]
            core.ahead[i] = 0
        core.counters.weight_swaps += 1
        core.counters.weight_swap_ns += now_ns() - start
        if n_running > 0 or (not with_kv and core.busy_since != 0):
            core.switched_ns = core.busy_since if core.busy_since != 0 else start
        core.site(MULLAMA_SITE_WEIGHTS, -1, 0, n_running, core.counters.weight_swap_bytes - bytes_before)
        core.publish()
        return n_running, core.counters.weight_swap_bytes - bytes_before

    cdef bint carry_states(self) except -1:
        """Every slot's KV, whole, as llama.cpp saves it."""
        cdef Core core = self.core
        cdef int i
        cdef size_t size
        for i in range(core.n_slots):
            if core.slots[i].n_past == 0:
                continue
            size = llama_state_seq_get_size(core.ctx, i)
            if core.state_a.size() < size:
                core.state_a.resize(size)
            if llama_state_seq_get_data(core.ctx, core.state_a.data(), size, i) != size \
                    or llama_state_seq_set_data(self.target.ctx, core.state_a.data(), size, i) != size:
                raise ComputeFailed(f"the KV of slot {i} could not be copied to the new weights")
            core.counters.weight_swap_bytes += size
        return True

    cdef bint carry_all(self) except -1:
        """The whole memory, with the cells that sequences share."""
        cdef Core core = self.core
        cdef size_t size = llama_state_get_size(core.ctx)
        cdef vector[uint8_t] state
        state.resize(size)
        size = llama_state_get_data(core.ctx, state.data(), size)
        if size == 0 or llama_state_set_data(self.target.ctx, state.data(), size) != size:
            raise ComputeFailed("the KV could not be copied to the new weights")
        core.counters.weight_swap_bytes += size
        return True

    def follow(self, uint64_t budget_ns):
        """Bring retained prefixes over for about ``budget_ns``. Returns the tokens that are still left behind."""
        cdef Core core = self.core
        cdef uint64_t start = now_ns()
        cdef int i
        cdef uint64_t left = 0
        for i in range(core.n_slots):
            while core.away[i] >= 0:
                if now_ns() - start >= budget_ns:
                    left += core.slots[i].n_past - core.away[i]
                    break
                if not core.bring(i, min(core.away[i] + <int> SLICE_TOKENS, core.slots[i].n_past)):
                    core.lose(i)
        core.counters.weight_swap_ns += now_ns() - start
        return left

    def finish(self):
        """Let go of the old context and return it: whoever holds it last frees it. What is left behind is lost."""
        cdef Core core = self.core
        cdef int i
        if not self.committed:
            raise RuntimeError("the old weights are still in charge")
        for i in range(core.n_slots):
            if core.away[i] >= 0:
                core.lose(i)
        found = core.source
        core.source = None
        return found

    def abandon(self):
        """Stay with the old weights, before ``commit``. Returns the target, to be freed."""
        cdef Core core = self.core
        if self.committed:
            raise RuntimeError("the new weights are in charge already")
        cdef int i
        for i in range(core.n_slots):
            core.ahead[i] = 0
        llama_detach_threadpool(self.target.ctx)
        core.target = None
        self.committed = True
        return self.target
