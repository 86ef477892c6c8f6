"""Other weights under a running Core: a step boundary is all it takes, and no KV is copied.

    Carrier(core, context)       the target is there; nothing has changed
    warm()                       its first decodes, one at a time
    commit()                     the target takes the KV over, and the next step uses the new weights
    finish()                     the old context, for its last user to free

Everything belongs to the engine thread. The two contexts have the same sizes, so that they can exchange the buffers
their KV lies in (llama_memory_exchange, a patch): afterwards the new one has all that the old one had, running
sequences and retained prefixes, in a time that does not depend on how much it is. Where they cannot (layers of the new
weights lie on other devices, or it is a kind of memory that the patch does not know), all is copied at that boundary.
"""

from libc.stdint cimport uint8_t, uint64_t
from libcpp.vector cimport vector

from mullama._core.model.context cimport Context
from mullama._core.compute.governor cimport GovernorState
from mullama._core.llama cimport *
from mullama._core.output.clock cimport now_ns
from mullama._core.compute.compute cimport Compute, Trial
from mullama._core.core.core cimport Core
from mullama.abi cimport *
from mullama.errors import ComputeFailed

cdef enum:
    WARM_DECODES = 2    # on one thread, and on all


cdef class Carrier:
    """The change of a Core's context to ``target``. One at a time. Raises InvalidRequest when their shapes differ."""

    def __init__(self, Core core not None, Context target not None):
        core.check_unchanging()
        if target.ctx is NULL or core.is_vacant:
            raise RuntimeError("a context was closed")
        core.context.check_place(target)
        self.core = core
        self.target = target
        self.governor = core.governor.twin()
        self.committed = False
        self.is_clear = True
        core.compute.attach(target.ctx)
        core.target = target

    def warm(self):
        """One of the first decodes of the new weights, before any KV is there. Returns whether there are more to do.

        They show what these weights cost on one thread and on all. Raises ModelLoadError when they fail.
        """
        cdef GovernorState * governor = self.governor.state.get()
        cdef Compute * compute = &self.core.compute
        cdef llama_context * ctx = self.target.ctx
        cdef int n_decodes = WARM_DECODES if governor.fixed else 2 * WARM_DECODES
        cdef int i = self.warmed, threads = 1
        cdef uint64_t start
        cdef bint got_turn
        cdef Trial got
        if i >= n_decodes:
            return False
        if governor.fixed or i >= WARM_DECODES:
            threads = governor.n_max
        compute.resume()
        with nogil:
            got_turn = compute.take_turn()
        if not got_turn:
            return False
        start = now_ns()
        if i % WARM_DECODES == 0:
            self.clear()
        with nogil:
            got = compute.try_threads(ctx, governor[0], threads, i % WARM_DECODES, 1, i % WARM_DECODES > 0)
            compute.give_turn(now_ns() - start)
        self.is_clear = False
        if got == Trial.failed:
            raise self.core.first_decode_failed()
        # Given up: somebody takes a core, and the governor knows.
        self.warmed = i + 1 if got == Trial.done else n_decodes
        return self.warmed < n_decodes

    cdef void clear(self) noexcept:
        """Empty the target of what ``warm`` left in it."""
        if not self.is_clear:
            llama_memory_clear(self.target.mem, False)
            self.is_clear = True

    def commit(self, *, bint with_kv=True, bint by_copy=False):
        """Let the new weights take the next step. Returns (running sequences, bytes of KV that they go on with).

        Without ``with_kv`` no slot may hold anything. ``by_copy``, for tests: also where nothing had to be copied.
        Raises ComputeFailed when llama.cpp does not take the KV over: then the old weights stay in charge, and
        ``abandon`` should follow.
        """
        cdef Core core = self.core
        cdef uint64_t start = now_ns()
        cdef int i, n_running = core.slots.n_open()
        cdef size_t n_bytes = 0
        if self.committed:
            raise RuntimeError("the new weights are in charge already")
        self.clear()
        for i in range(core.n_slots):
            if not with_kv and core.slots.at(i).n_past > 0:
                raise RuntimeError(f"slot {i} still holds KV of the old weights")
            if core.slots.at(i).n_past > 0:
                n_bytes += self.bytes_of(i)
        if with_kv and (by_copy or not llama_memory_exchange(core.slots.ctx, self.target.ctx)):
            self.copy_all() if core.unified else self.copy_each()
        self.committed = True
        core.lose_context()
        self.old = core.context
        core.target = None
        core.go_on_with(self.target, self.governor)
        if n_running > 0 or (not with_kv and core.compute.busy_since != 0):
            core.compute.set_switched(core.compute.busy_since if core.compute.busy_since != 0 else start)
        core.note_weights(start, n_bytes, True)
        return n_running, n_bytes

    cdef size_t bytes_of(self, int slot) noexcept:
        """KV of a slot."""
        if self.core.context.token_bytes == 0 or self.core.context.needs_checkpoint:
            return llama_state_seq_get_size(self.core.slots.ctx, slot)
        return self.core.slots.at(slot).n_past * self.core.context.token_bytes

    cdef bint copy_each(self) except -1:
        """Every slot's KV, as llama.cpp saves it."""
        cdef Core core = self.core
        cdef int i
        cdef size_t size
        cdef uint8_t * state
        for i in range(core.n_slots):
            if core.slots.at(i).n_past == 0:
                continue
            size = llama_state_seq_get_size(core.slots.ctx, i)
            state = core.slots.staging(size)
            if llama_state_seq_get_data(core.slots.ctx, state, size, i) != size \
                    or llama_state_seq_set_data(self.target.ctx, state, size, i) != size:
                raise ComputeFailed(f"the KV of slot {i} could not be copied to the new weights")
        return True

    cdef bint copy_all(self) except -1:
        """The whole memory, with the cells that sequences share."""
        cdef Core core = self.core
        cdef size_t size = llama_state_get_size(core.slots.ctx)
        cdef vector[uint8_t] state
        state.resize(size)
        size = llama_state_get_data(core.slots.ctx, state.data(), size)
        if size == 0 or llama_state_set_data(self.target.ctx, state.data(), size) != size:
            raise ComputeFailed("the KV could not be copied to the new weights")
        return True

    def finish(self):
        """Let go of the old context, which holds no KV any more, and return it: whoever holds it last frees it."""
        if not self.committed:
            raise RuntimeError("the old weights are still in charge")
        found, self.old = self.old, None
        return found

    def abandon(self):
        """Stay with the old weights, before ``commit``. Returns the target, to be freed."""
        if self.committed:
            raise RuntimeError("the new weights are in charge already")
        llama_detach_threadpool(self.target.ctx)
        self.core.target = None
        self.committed = True
        return self.target
