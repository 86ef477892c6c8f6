from libc.stdint cimport uint64_t


cdef class Governor:
    cdef readonly int n_max            # most threads it may choose
    cdef readonly int threads          # what it has settled on
    cdef public int n_cores            # cores that these threads and neighbours share
    cdef readonly bint fixed
    cdef readonly unsigned long long changes
    cdef readonly double neighbours    # cores that others use; -1: unknown
    # [threads][shape] ns a decode (small shapes) or ns a token (large ones); 0: unknown
    cdef double quiet[65][16]          # outliers left out: what a decode should cost
    cdef double recent[65][16]         # everything: what it costs now
    cdef int outliers[65][16]          # in a row
    cdef uint64_t next_look_ns
    cdef int crowded_looks             # looks in a row that wanted fewer threads
    cdef int free_looks                # looks in a row that allowed more
    cdef int trial                     # thread count on trial, 0: none
    cdef int trial_left                # decodes of the trial still to come
    cdef int trial_from                # the count to go back to
    cdef uint64_t hold_until_ns        # no trial of more threads before
    cdef uint64_t hold_down_until_ns   # no trial of fewer before
    cdef uint64_t hold_up_ns
    cdef uint64_t last_abort_ns
    cdef uint64_t hold_down_ns

    cdef int choose(self, int n_tokens) noexcept nogil
    cdef int room(self, double cores) noexcept nogil
    cdef double expected(self, int n_tokens, int threads) noexcept nogil
    cdef double single_bound(self, int n_tokens) noexcept nogil
    cdef uint64_t allowance(self, int n_tokens) noexcept nogil
    cdef void measured(self, int n_tokens, int threads, uint64_t ns, bint aborted, uint64_t now) noexcept nogil
    cdef void awake(self, double cores, uint64_t now) noexcept nogil
    cdef bint wants_look(self, uint64_t now) noexcept nogil
    cdef void look(self, double cores, uint64_t now) noexcept nogil
    cdef void start_trial(self, int threads) noexcept nogil
    cdef void end_trial(self, bint keep, uint64_t now) noexcept nogil
