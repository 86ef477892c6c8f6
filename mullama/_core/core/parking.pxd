"""A sequence outside its slot. It belongs to the engine thread; without the GIL it is touched only while that thread
copies its KV, when nothing runs."""

from libc.stdint cimport uint8_t, uint64_t
from libcpp.vector cimport vector

cimport cython

from mullama._core.model.model cimport Model
from mullama._core.core.slots cimport Slot, Slots


@cython.final
cdef class Parked:
    cdef Slot slot
    cdef vector[uint8_t] state
    cdef readonly bint saved
    cdef int computed                  # tokens that were in the KV cache
    cdef uint64_t since_ns
    cdef Model model                   # its sampler may point into the vocabulary

    cdef int take_from(self, Slots * slots, int slot, bint save) except -1
    cdef int put_into(self, Slots * slots, int slot, int reuse) except -1
    cdef int adopt(self, Model model, int n_ctx, uint64_t handle, tokens, int n_prompt, params,
                   adapters) except -1
    cdef void drop(self, Slots * slots) noexcept
    cdef void forget(self, Slots * slots) noexcept
