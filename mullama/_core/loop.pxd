from libc.stdint cimport int32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from mullama._core.llama cimport *
from mullama._core.machine cimport *
from mullama._core.parking cimport Parked, Parking
from mullama.abi cimport *

cdef extern from "scan.h" namespace "mullama" nogil:
    int32_t scan_argmax(const float * x, int32_t n)
    int32_t scan_top_k(const float * x, int32_t n, int32_t k, vector[llama_token_data] & out)
    int32_t scan_all(const float * x, int32_t n, vector[llama_token_data] & out)


cdef class Core(Parking):
    cdef bint put_in_charge(self, int slot) noexcept nogil
    cdef void group_plan(self) noexcept nogil
    cdef size_t first_range(self) noexcept nogil
    cdef size_t first_chunk(self) noexcept nogil
    cdef void steps(self, uint64_t max_steps, uint64_t until_ns) noexcept nogil
    cdef int compute(self, int n_tokens, int n_seqs, uint64_t * ns) noexcept nogil
    cdef void shift(self, int slot) noexcept nogil
    cdef void decode_rows(self, size_t first, size_t last, bint is_extra) noexcept nogil
    cdef void prefill(self, int slot, int n) noexcept nogil
    cdef void fail_rows(self, const int32_t * which, size_t n, int rc) noexcept nogil
    cdef llama_token choose(self, int slot, int row, int * error) noexcept nogil
    cdef void commit(self, int slot, int row) noexcept nogil
