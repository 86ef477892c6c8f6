"""An embedding context with its threads and its page.

nogil code gets the ``parts``, which are C++ and have the same address until the Embedder goes; the context is freed
on the engine thread when nothing runs.
"""

cimport cython
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from mullama._core.compute.arbiter cimport Arbiter
from mullama._core.compute.compute cimport Compute
from mullama._core.compute.governor cimport Governor
from mullama._core.llama cimport llama_context, llama_token
from mullama._core.model.context cimport Context
from mullama._core.model.model cimport Model
from mullama._core.output.output cimport Output
from mullama._core.output.page cimport Page


cdef extern from "embedding_batch.h" namespace "mullama" nogil:
    cdef enum:
        POOL_NONE "mullama::POOL_NONE"
        POOL_RANK "mullama::POOL_RANK"
    cppclass Prompt:
        size_t at, size
        cbool is_finite
    cppclass EmbeddingBatch:
        vector[Prompt] prompts
        vector[float] values
        int n_tokens
        void clear()
        void begin(int pool, cbool normalised) except +
        void put(Compute & compute, llama_token token)
        int run(llama_context * ctx, Compute & compute, Output & out) except +
    cppclass EmbeddingParts:
        EmbeddingParts() except +
        Output out
        Compute compute
        EmbeddingBatch batch


@cython.final
cdef class Embedder:
    cdef readonly Context context
    cdef readonly Model model
    cdef readonly Governor governor
    cdef readonly Arbiter turns
    cdef readonly Page page
    cdef readonly int n_ctx            # tokens of one prompt
    cdef readonly int n_batch          # of a ubatch
    cdef readonly int n_slots        # most prompts of a ubatch
    cdef readonly int n_embd           # numbers of a vector
    cdef int pid                       # of the process that made it
    cdef int fault                     # for tests: the prompt of the next ubatch that becomes NaN; -1: none
    cdef EmbeddingParts * parts

    cdef int warm_up(self, bint quick) except -1
    cdef void publish(self, int n_running, int n_waiting) noexcept
    cdef void release(self) noexcept
