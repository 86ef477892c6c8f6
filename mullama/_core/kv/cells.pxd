"""KV in and out of the slots. It belongs to the engine thread, also without the GIL: then it touches the two parts
of its Core alone, and nothing runs."""

from mullama._core.core.core cimport Core
from mullama._core.output.output cimport Output
from mullama._core.core.slots cimport Slots


cdef class Cells:
    cdef readonly Core core
    cdef Slots * slots                 # the core's, which is kept
    cdef Output * out
    cdef readonly size_t token_bytes
    cdef readonly bint has_rows
    cdef readonly bint needs_checkpoint

    cdef int check_rows(self, int slot, int p0, int p1) except -1
    cdef int lose_from(self, int slot, int n) except -1
