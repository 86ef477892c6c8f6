"""A Core without weights. It belongs to the engine thread.

nogil code copies between ``states``, which are the Vacancy's own, and a context that the method that runs holds.
"""

from libc.stdint cimport uint8_t, uint64_t
from libcpp.vector cimport vector

from mullama._core.model.context cimport Context
from mullama._core.core.core cimport Core


cdef class Vacancy:
    cdef readonly Core core
    cdef vector[vector[uint8_t]] states  # of each slot, as llama.cpp saves it; unified: the first is of all
    cdef readonly bint has_left        # the context before has been freed
    cdef readonly bint is_over         # another one is there
    cdef readonly uint64_t held_ns     # when the last step ended, or it was made
    cdef readonly size_t n_bytes       # of the states

    cdef bint save(self) except -1
    cdef bint restore(self, Context context) except -1
