"""The hot loop of a Core.

nogil code: ``run`` and all that it calls belong to the engine thread. What they touch is numbers and vectors of the
Loop itself, and three C++ parts of its Core, whose addresses never change. Nothing in them is a Python object: what
stands in one (a Context's llama_context, a Governor's state, a Page's blocks) is there as an address, and the parts'
own .pxd say who keeps it alive and when it may change. The Loop is its Core's alone and goes with it.
"""

cimport cython
from libc.stdint cimport int32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.compute.compute cimport Compute
from mullama._core.llama cimport *
from mullama._core.output.output cimport Output
from mullama._core.core.slots cimport Slot, Slots

cdef extern from "scan.h" namespace "mullama" nogil:
    int32_t scan_argmax(const float * x, int32_t n)
    int32_t scan_top_k(const float * x, int32_t n, int32_t k, vector[llama_token_data] & out)
    int32_t scan_all(const float * x, int32_t n, vector[llama_token_data] & out)


@cython.final
cdef class Loop:
    cdef Output * out
    cdef Compute * compute
    cdef Slots * slots
    cdef const llama_vocab * vocab     # of the model in charge
    cdef int n_vocab
    cdef int n_batch                   # tokens of one decode at most
    cdef vector[llama_token] eog
    cdef vector[llama_token_data] candidates
    cdef string released
    cdef vector[char] long_piece
    cdef vector[int32_t] plan_decode   # in groups of one set of adapters each
    cdef vector[size_t] plan_ranges    # where ranges of it begin that are one ubatch each, and the end
    cdef vector[int32_t] plan_prefill
    cdef vector[int32_t] plan_chunk
    cdef int fault_slot                # fault injection: this slot's next logits become NaN

    cdef void connect(self, Output * out, Compute * compute, Slots * slots) noexcept
    cdef void take_on(self, const llama_vocab * vocab, const vector[llama_token] & eog) noexcept
    cdef bint run(self, vector[int32_t] & decode, vector[int32_t] & prefill, vector[int32_t] & chunks,
                  uint64_t max_steps, uint64_t until_ns) noexcept nogil
    cdef Slot * decoding(self, size_t i) noexcept nogil
    cdef Slot * filling(self, size_t i) noexcept nogil
    cdef void group_plan(self) noexcept nogil
    cdef size_t first_range(self) noexcept nogil
    cdef size_t first_chunk(self) noexcept nogil
    cdef void steps(self, uint64_t max_steps, uint64_t until_ns) noexcept nogil
    cdef int decode(self, int n_tokens, int n_seqs, uint64_t * ns) noexcept nogil
    cdef void shift(self, int slot) noexcept nogil
    cdef void decode_rows(self, size_t first, size_t last, bint is_extra) noexcept nogil
    cdef bint catch_up(self, size_t first, size_t last) noexcept nogil
    cdef bint comes_at_once(self, Slot * s) noexcept nogil
    cdef void prefill(self, int slot, int n) noexcept nogil
    cdef void fail_rows(self, const int32_t * which, size_t n, int rc) noexcept nogil
    cdef llama_token choose(self, int slot, int row, int * error) noexcept nogil
    cdef llama_token draw(self, Slot * s, const float * logits, int * error) noexcept nogil
    cdef void commit(self, int slot, int row) noexcept nogil
    cdef bint append(self, Slot * s, int slot, llama_token token, uint64_t start, uint64_t sampled) noexcept nogil
