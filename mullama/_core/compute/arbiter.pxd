"""The turn among the engines of a process. Its table (arbiter.h) is C++ with a lock of its own.

nogil code: engine threads have the table's address from their Core, which keeps the Arbiter. ``renew`` exchanges the
table in a child process alone, where no engine thread of the parent runs, and never frees the one before.
"""

from libc.stdint cimport uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.vector cimport vector


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
        cbool busy_beside(int id, uint64_t ns)
        cbool share(int id, double weight, int priority)
        vector[SeatUse] uses() except +
        int get_policy "policy.load" ()
        void set_policy "policy.store" (int policy)


cdef class Arbiter:
    cdef unique_ptr[TurnTable] table
