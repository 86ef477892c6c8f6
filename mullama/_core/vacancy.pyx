"""A Core without a context and weights: its slots keep their sequences, and their KV waits in host memory.

    Vacancy(core)        the KV of every slot is saved; nothing else has changed
    leave()              the context is freed, so that its model can be
    fill(context)        the core goes on with this one, on the KV that was saved

Everything belongs to the engine thread. Between ``leave`` and ``fill`` the core computes nothing, and of its methods
only those may be called that look at no KV: they raise, or leave out what a context would have to tell
(Core.is_vacant).
"""

from libc.stdint cimport uint64_t

from mullama._core.context cimport Context
from mullama._core.governor cimport Governor
from mullama._core.llama cimport *
from mullama._core.loop cimport Core, now_ns
from mullama.abi cimport *
from mullama.errors import ComputeFailed, InvalidRequest


cdef class Vacancy:
    """The time without weights of one Core."""

    def __init__(self, Core core not None):
        """Save the KV of all slots. Raises InvalidRequest while a Carrier is at work, ComputeFailed, MemoryError."""
        core.check_slot(0)
        if core.target is not None:
            raise InvalidRequest("the weights are being changed already")
        self.core = core
        self.held_ns = core.busy_since if core.busy_since != 0 else now_ns()
        self.states.resize(core.n_slots)
        self.save()

    cdef bint save(self) except -1:
        cdef Core core = self.core
        cdef int i
        cdef size_t size
        for i in range(core.n_slots):
            if core.slots[i].n_past == 0:
                continue
            if core.unified:  # cells may be shared: all or nothing
                size = llama_state_get_size(core.ctx)
                self.states[0].resize(size)
                with nogil:
                    size = llama_state_get_data(core.ctx, self.states[0].data(), size)
                self.states[0].resize(size)
                self.n_bytes = size
                if size == 0:
                    raise ComputeFailed("the KV could not be saved")
                return True
            size = llama_state_seq_get_size(core.ctx, i)
            self.states[i].resize(size)
            with nogil:
                size = llama_state_seq_get_data(core.ctx, self.states[i].data(), size, i)
            if size == 0 or size != self.states[i].size():
                raise ComputeFailed(f"the KV of slot {i} could not be saved")
            self.n_bytes += size
        return True

    def leave(self):
        """Free the context. Returns it, closed, for ``like`` and for what it was made with. The model may be closed."""
        cdef Core core = self.core
        if self.has_left:
            raise RuntimeError("the context has been left already")
        core.pause()
        core.reused_before += llama_perf_context(core.ctx).n_reused
        llama_detach_threadpool(core.ctx)
        self.has_left = True
        core.ctx = NULL
        core.mem = NULL
        core.context.release()
        core.in_charge.reset()  # adapters may go now
        core.publish()
        return core.context

    def fill(self, Context context not None, *, uint64_t since_ns=0, bint is_swap=False):
        """Go on with a context of the same sizes. Returns the sequences that do.

        ``since_ns``: when the last step of the weights before ended, where somebody has waited since.
        ``is_swap``: it counts as a change of weights.

        Raises InvalidRequest when the shapes differ, ModelLoadError when the first decodes fail, ComputeFailed when it
        does not take the KV: then the core is as vacant as before, and another context may be tried.
        """
        cdef Core core = self.core
        cdef Governor governor
        cdef uint64_t start = now_ns()
        cdef int i, n_running = 0
        if not self.has_left or self.is_over or context.ctx is NULL:
            raise RuntimeError("this core is not vacant, or the context was closed")
        core.context.check_place(context)
        governor = Governor(core.governor.n_max, core.governor.fixed, core.governor.n_cores)
        core.attach(context.ctx)
        try:
            core.resume_pool()
            core.warm_up(context.ctx, governor, True)
            self.restore(context)
        except BaseException:
            core.pause()
            llama_detach_threadpool(context.ctx)
            raise
        self.is_over = True
        core.governor = governor
        core.take_on(context)
        for i in range(core.n_slots):
            n_running += core.slots[i].open()
        if is_swap:
            core.counters.weight_swaps += 1
            core.counters.weight_swap_bytes += self.n_bytes
            core.counters.weight_swap_ns += now_ns() - start
            core.switched_ns = since_ns
        core.site(MULLAMA_SITE_WEIGHTS, -1, 0, n_running, self.n_bytes)
        self.states.clear()
        self.states.shrink_to_fit()
        core.publish()
        return n_running

    cdef bint restore(self, Context context) except -1:
        cdef Core core = self.core
        cdef int i
        cdef size_t size, taken
        for i in range(core.n_slots):
            size = self.states[i].size()
            if size == 0:
                continue
            with nogil:
                if core.unified:
                    taken = llama_state_set_data(context.ctx, self.states[i].data(), size)
                else:
                    taken = llama_state_seq_set_data(context.ctx, self.states[i].data(), size, i)
            if taken != size:
                raise ComputeFailed(f"the KV of slot {i} could not be restored")
        return True
