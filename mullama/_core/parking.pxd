from libc.stdint cimport uint8_t, uint64_t
from libcpp.vector cimport vector

from mullama._core.llama cimport *
from mullama._core.machine cimport *
from mullama._core.model cimport Model
from mullama._core.slots cimport Slots
from mullama.abi cimport *


cdef class Parked:
    cdef Slot slot
    cdef vector[uint8_t] state
    cdef readonly bint saved
    cdef int computed                  # tokens that were in the KV cache
    cdef uint64_t since_ns
    cdef Model model                   # its sampler may point into the vocabulary


cdef class Parking(Slots):
    cdef void forget(self, Parked parked) noexcept
