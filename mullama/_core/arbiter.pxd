from libc.stdint cimport uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.vector cimport vector


cdef extern from "clock.h" namespace "mullama" nogil:
    cppclass Flag:
        void set(int v)
        int get()

cdef extern from "arbiter.h" namespace "mullama" nogil:
    cppclass SeatUse:
        int id, priority
        double weight
        uint64_t used_ns, wait_ns, turns
        cbool is_waiting
    cppclass TurnTable:
        TurnTable()
        TurnTable(int taken)
        int taken()
        int join() except +
        void leave(int id)
        cbool acquire(int id, const Flag & stop)
        void release(int id, uint64_t used_ns)
        cbool contended()
        cbool busy_beside(int id, uint64_t ns)
        cbool share(int id, double weight, int priority)
        vector[SeatUse] uses() except +
        int get_policy "policy.load" ()
        void set_policy "policy.store" (int policy)


cdef class Arbiter:
    cdef unique_ptr[TurnTable] table

    cdef bint acquire(self, int seat, const Flag & stop) noexcept nogil
    cdef void release(self, int seat, uint64_t used_ns) noexcept nogil
