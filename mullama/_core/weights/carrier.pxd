"""A change of weights. It belongs to the engine thread.

nogil code decodes with the target: it has the addresses of its llama_context and of the Core's Compute, taken with the
GIL; the Carrier holds both objects, and nobody exchanges them in them meanwhile.
"""

from mullama._core.model.context cimport Context
from mullama._core.compute.governor cimport Governor
from mullama._core.llama cimport *
from mullama._core.core.core cimport Core


cdef class Carrier:
    cdef Core core
    cdef readonly Context target
    cdef Context old                   # after the commit, until somebody takes it
    cdef Governor governor
    cdef bint committed
    cdef int warmed                    # decodes of warm() done
    cdef bint is_clear                 # no KV of warm() is in the target

    cdef void clear(self) noexcept
    cdef bint copy_each(self) except -1
    cdef bint copy_all(self) except -1
    cdef size_t bytes_of(self, int slot) noexcept
