"""The core of an engine: what Python calls, and what the modules beside it may use of it.

nogil code gets the three parts, never the Core: their .pxd say what may be touched. They are made with the Core and
have the same addresses until it goes. Python objects in it (context, model, governor, page) are exchanged only by the
engine thread with the GIL, when nothing runs, in ``go_on_with`` and ``lose_context``, which exchange the addresses in
the parts with them. Another thread that asks a Core for one of them, with the GIL, has the one before or the one after,
and keeps it alive.
"""

cimport cython
from libc.stdint cimport uint64_t

from mullama._core.compute.arbiter cimport Arbiter
from mullama._core.compute.compute cimport Compute
from mullama._core.model.context cimport Context
from mullama._core.compute.governor cimport Governor
from mullama._core.core.loop cimport Loop
from mullama._core.model.model cimport Model
from mullama._core.output.output cimport Output
from mullama._core.output.page cimport Page
from mullama._core.core.slots cimport Slots


@cython.final
cdef class Core:
    cdef readonly Context context
    cdef readonly Model model          # of the context
    cdef readonly Governor governor    # of what is computed with it
    cdef readonly Arbiter turns
    cdef readonly Page page
    cdef readonly int n_slots
    cdef readonly int n_batch
    cdef readonly bint unified         # one buffer of cells for all slots
    cdef int pid                       # of the process that made it

    cdef void release(self) noexcept

    # For the modules that move and exchange what is in it (cells, carrier, vacancy).
    cdef Output out
    cdef Compute compute
    cdef Slots slots
    cdef Loop loop
    cdef Context target                # being prepared to take over
    cdef int check_slot(self, int slot) except -1
    cdef int check_unchanging(self) except -1
    cdef void publish(self) noexcept
    cdef void go_on_with(self, Context context, Governor governor) noexcept
    cdef void lose_context(self) noexcept
    cdef object first_decode_failed(self)
    cdef int warm_up(self, Context context, Governor governor, bint quick) except -1
    cdef void note_weights(self, uint64_t start_ns, size_t n_bytes, bint is_swap) noexcept
