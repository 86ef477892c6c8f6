"""Two models compared. Each Divergence belongs to one thread, which alone uses its two contexts.

nogil code touches the batch, which is its own, and the address of a llama_context, taken with the GIL; ``old`` and
``new`` are set once.
"""

from libc.stdint cimport int32_t
from libcpp cimport bool as cbool

from mullama._core.model.context cimport Context
from mullama._core.llama cimport *

cdef extern from "kl.h" namespace "mullama" nogil:
    cbool kl_divergence(const float * p, const float * q, int32_t n, double & kl, cbool & same_top)


cdef class Divergence:
    cdef Context old
    cdef Context new
    cdef int n_batch
    cdef llama_batch batch

    cdef bint decode(self, Context context, const llama_token * tokens, int pos, int n) except -1
    cdef bint carry_over(self) except -1
