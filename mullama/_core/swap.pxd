from mullama._core.context cimport Context
from mullama._core.governor cimport Governor
from mullama._core.llama cimport *
from mullama._core.loop cimport Core


cdef class Carrier:
    cdef Core core
    cdef readonly Context target
    cdef Governor governor
    cdef bint by_rows                  # KV is copied ahead token by token; else whole, when the weights change
    cdef bint committed
    cdef int warmed                    # decodes of warm() done
    cdef bint is_clear                 # no KV of warm() is in the target

    cdef void clear(self) noexcept
    cdef bint carry_states(self) except -1
    cdef bint carry_all(self) except -1
