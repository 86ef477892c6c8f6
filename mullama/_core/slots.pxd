from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.llama cimport *
from mullama._core.machine cimport *
from mullama._core.model cimport Model
from mullama.abi cimport *


cdef class Slots(Machine):
    cdef void begin_text(self, Slot * s) noexcept nogil
    cdef void finish(self, Slot * s, int slot, uint32_t reason, int stop_index, int error) noexcept nogil
    cdef void clear_slot(self, int slot) noexcept nogil
    cdef bint cut(self, int slot, int n) noexcept nogil
    cdef int keep_head(self, int slot, int n) noexcept
    cdef bint move_rows(self, int src, int dst) except -1
    cdef void lose(self, int slot) noexcept nogil
