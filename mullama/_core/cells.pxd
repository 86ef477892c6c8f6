from mullama._core.loop cimport Core


cdef class Cells:
    cdef readonly Core core
    cdef readonly size_t token_bytes
    cdef readonly bint has_rows
    cdef readonly bint needs_checkpoint

    cdef int check_rows(self, int slot, int p0, int p1) except -1
    cdef int retain(self, int slot, int n_past) except -1
    cdef int lose_from(self, int slot, int n) except -1
