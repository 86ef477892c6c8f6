"""What the engine thread tells (output.h): the ring of records, the wake-up of its reader, the page.

nogil code: the engine thread may touch all of it. Other threads only ``ring`` (one reader at a time) and ``wake``,
which are made for that, and the page's memory through a Page. It lies in its Core and is never exchanged; the page's
blocks are there as long as the Core has its Page, which ``Core.close`` takes away when nothing runs any more.
"""

from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string

from mullama._core.output.clock cimport Flag
from mullama.abi cimport mullama_counters, mullama_event, mullama_row


cdef extern from "wakeup.h" namespace "mullama" nogil:
    cppclass Wake:
        int read_fd
        cbool open()
        void close()
        void signal()
        void clear()

cdef extern from "ring.h" namespace "mullama" nogil:
    cdef enum:
        RECORD_TEXT "mullama::RECORD_TEXT"
        RECORD_FINISH "mullama::RECORD_FINISH"
    cppclass RecordHeader:
        uint32_t size
        uint16_t kind
        uint16_t n_tokens
        uint64_t handle
    cppclass FinishBody:
        uint32_t reason
        int32_t stop_index
        int32_t error
    cppclass Ring:
        const RecordHeader * peek()
        void pop()
        uint64_t used()
        uint64_t capacity()

cdef extern from "output.h" namespace "mullama" nogil:
    cppclass PageBlocks:
        PageBlocks()
        mullama_counters * counters
        mullama_row * rows
        mullama_event * events
        uint32_t n_events
    cppclass Output:
        Ring ring
        Wake wake
        PageBlocks page
        mullama_counters counters
        cbool pushed
        const Flag * stop
        void put_counters()
        void site(uint32_t kind, int32_t slot, uint64_t handle, int64_t a, int64_t b)
