"""A llama.cpp context.

nogil code never has a Context, only the address in ``ctx``, which whoever gave it keeps from being freed: a Core frees
its contexts on the engine thread when nothing runs. ``release`` takes the address out of reach before it lets go of
the GIL. All else is written once.
"""

from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.llama cimport *
from mullama._core.model.model cimport Model


cdef extern from "breakdown.h" namespace "mullama" nogil:
    cppclass BufferUse:
        string name
        cbool is_host
        size_t model, context, compute
    vector[BufferUse] memory_of(const llama_context * ctx) except +


cdef class Context:
    cdef readonly Model model
    cdef llama_context * ctx
    cdef llama_memory_t mem
    cdef readonly int n_slots
    cdef readonly int n_ctx            # tokens one slot may hold
    cdef readonly int n_batch
    cdef readonly bint embeds          # it gives the vectors of tokens, or what a head says of a prompt (``ranks``)
    cdef readonly bint ranks
    cdef readonly bint reference       # computes by the reference computations only
    cdef readonly bint unified         # one buffer of cells for all slots
    cdef readonly bint can_shift       # the oldest tokens of a sequence can make room for new ones
    cdef readonly bint needs_checkpoint  # its KV cannot be cut anywhere
    cdef readonly size_t token_bytes   # KV of one token in the full-attention cache, 0: it cannot be had by the row
    cdef bint can_trim                 # the tail of a sequence can be removed
    cdef bint counted                  # among the model's users
    cdef int pid                       # of the process that made it
    cdef int n_swa
    cdef dict wanted                   # what it was made with, for another one like it
    cdef vector[llama_token] eog

    cdef void release(self) noexcept
    cdef int check_place(self, Context other) except -1
