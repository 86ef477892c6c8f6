"""Clocks, flags and the machine's load (clock.h). A Flag may be set and read by any thread, without the GIL."""

from libc.stdint cimport uint64_t
from libcpp cimport bool as cbool


cdef extern from "clock.h" namespace "mullama" nogil:
    uint64_t now_ns()
    cppclass Flag:
        void set(int v)
        int get()
    cppclass OwnCores:
        OwnCores()
    cppclass NeighbourLoad:
        uint64_t age_ns()
        int cores()

        @staticmethod
        cbool read_busy(const char * path, const OwnCores & own_cores, uint64_t & busy)
    cppclass Deadline:
        uint64_t at_ns
        Flag stop
        const void * wake
