"""The thread governor. Its numbers are a C++ object (governor.h), which knows nothing of Python.

nogil code: the engine thread has the address of ``state``, which is a part of the Governor and lives as long. A Core
exchanges both at once, on the engine thread, between two runs (Core.go_on_with).
"""

from libc.stdint cimport uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr

cimport cython


cdef extern from "governor.h" namespace "mullama" nogil:
    cdef enum:
        FIRST_LARGE_SHAPE "mullama::Governor::FIRST_LARGE_SHAPE"
        N_SHAPES "mullama::Governor::N_SHAPES"
    cppclass GovernorView "mullama::Governor::View":
        int threads, n_cores
        uint64_t changes
        cbool on_trial
        double neighbours
        double cost[65][16]
    cppclass GovernorState "mullama::Governor":
        GovernorState(int n_max, cbool fixed, int n_cores) except +
        int n_max
        cbool fixed
        int threads_for(int n_tokens)
        double expected(int n_tokens)
        uint64_t allowance(int n_tokens)
        void wake(double cores, uint64_t now)
        void record(int n_tokens, int on, uint64_t ns, cbool aborted, uint64_t now)
        cbool wants_look(uint64_t now)
        void look(double cores, uint64_t now)
        void set_cores(int n)
        double cost(int n_tokens)
        uint64_t n_changes()
        GovernorView view()


@cython.final
cdef class Governor:
    cdef unique_ptr[GovernorState] state  # made once, never exchanged
