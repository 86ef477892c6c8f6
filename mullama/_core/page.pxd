from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from mullama.abi cimport mullama_counters, mullama_event, mullama_header, mullama_row


cdef class Page:
    cdef object mapping              # mmap.mmap
    cdef object view                 # keeps the buffer exported
    cdef readonly str path           # "" for a private page
    cdef object file                 # its descriptor, which holds the lock; None for a private page
    cdef mullama_header * header
    cdef mullama_counters * counters
    cdef mullama_row * rows
    cdef mullama_event * events
    cdef uint32_t n_rows
    cdef uint32_t n_events

    cdef void put_counters(self, const mullama_counters & values) noexcept nogil
    cdef void put_row(self, uint32_t index, const mullama_row & values) noexcept nogil
    cdef void put_event(self, uint64_t index, const mullama_event & event) noexcept nogil
