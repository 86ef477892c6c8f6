"""A Core without a context and weights: its slots keep their sequences, and their KV waits in host memory.

    Vacancy(core)        the KV of every slot is saved; nothing else has changed
    leave()              the context is freed, so that its model can be
    fill(context)        the core goes on with this one, on the KV that was saved

Everything belongs to the engine thread. Between ``leave`` and ``fill`` the core computes nothing, and of its methods
only those may be called that look at no KV: they raise, or leave out what a context would have to tell
(Core.is_vacant).
"""

from libc.stdint cimport uint64_t

from mullama._core.model.context cimport Context
from mullama._core.compute.governor cimport Governor
from mullama._core.llama cimport *
from mullama._core.output.clock cimport now_ns
from mullama._core.core.core cimport Core
from mullama.abi cimport *
from mullama.errors import ComputeFailed


cdef class Vacancy:
    """The time without weights of one Core."""

    def __init__(self, Core core not None):
        """Save the KV of all slots. Raises InvalidRequest while a Carrier is at work, ComputeFailed, MemoryError."""
        core.check_slot(0)
        core.check_unchanging()
        self.core = core
        self.held_ns = core.compute.busy_since if core.compute.busy_since != 0 else now_ns()
        self.states.resize(core.n_slots)
        self.save()

    cdef bint save(self) except -1:
        cdef Core core = self.core
        cdef int i
        cdef size_t size
        for i in range(core.n_slots):
            if core.slots.at(i).n_past == 0:
                continue
            if core.unified:  # cells may be shared: all or nothing
                size = llama_state_get_size(core.slots.ctx)
                self.states[0].resize(size)
                with nogil:
                    size = llama_state_get_data(core.slots.ctx, self.states[0].data(), size)
                self.states[0].resize(size)
                self.n_bytes = size
                if size == 0:
                    raise ComputeFailed("the KV could not be saved")
                return True
            size = llama_state_seq_get_size(core.slots.ctx, i)
            self.states[i].resize(size)
            with nogil:
                size = llama_state_seq_get_data(core.slots.ctx, self.states[i].data(), size, i)
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
        core.lose_context()
        self.has_left = True
        core.context.release()
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
        if not self.has_left or self.is_over or context.ctx is NULL:
            raise RuntimeError("this core is not vacant, or the context was closed")
        core.context.check_place(context)
        governor = core.governor.twin()
        core.compute.attach(context.ctx)
        try:
            core.compute.resume()
            core.warm_up(context, governor, True)
            self.restore(context)
        except BaseException:
            core.pause()
            llama_detach_threadpool(context.ctx)
            raise
        self.is_over = True
        core.go_on_with(context, governor)
        if is_swap:
            core.compute.set_switched(since_ns)
        core.note_weights(start, self.n_bytes, is_swap)
        self.states.clear()
        self.states.shrink_to_fit()
        return core.slots.n_open()

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
