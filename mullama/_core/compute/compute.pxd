"""What computes (compute.h): the thread pool, the turn among engines, the governor, the deadline.

nogil code: the engine thread may touch all of it; any thread may set ``deadline.stop`` and ``interrupted``, and read
``switched_ns``. It lies in its Core and is never exchanged. Two addresses in it are of parts of Python objects: the
``governor`` is the state of Core.governor, ``turns`` the table of Core.turns. The Core keeps both objects alive, and
exchanges the first only together with the address (Core.go_on_with), on the engine thread, when nothing runs.
"""

from libc.stdint cimport uint64_t
from libcpp cimport bool as cbool

from mullama._core.compute.arbiter cimport TurnTable
from mullama._core.constraint.grammars cimport MaskWorker
from mullama._core.output.clock cimport Deadline, Flag, NeighbourLoad
from mullama._core.compute.governor cimport GovernorState
from mullama._core.llama cimport *


cdef extern from "guard.h" namespace "mullama" nogil:
    cdef enum:
        CORE_NOT_FINITE "mullama::CORE_NOT_FINITE"
        CORE_SAMPLER "mullama::CORE_SAMPLER"
        CORE_DECODE "mullama::CORE_DECODE"
        CORE_NO_KV "mullama::CORE_NO_KV"
        CORE_ADAPTER "mullama::CORE_ADAPTER"
        CORE_CONSTRAINT "mullama::CORE_CONSTRAINT"
    cppclass Guard:
        const char * message
    int guarded_decode(llama_context * ctx, const llama_batch & batch, Guard & guard)
    llama_token guarded_sample(llama_sampler * chain, llama_token_data_array * candidates, Guard & guard)

cdef extern from "compute.h" namespace "mullama" nogil:
    cdef enum class Trial:
        done
        given_up
        stopped
        failed
    cppclass Compute:
        Deadline deadline
        Flag interrupted
        GovernorState * governor
        TurnTable * turns
        int seat
        int threads
        cbool can_abort
        cbool synchronous
        llama_batch batch
        Guard guard
        NeighbourLoad neighbours
        MaskWorker masks
        uint64_t busy_since
        uint64_t switched_ns "switched_ns.load" ()
        void set_switched "switched_ns.store" (uint64_t ns)
        int code
        cbool open(int n_threads, int n_batch)
        void close()
        void attach(llama_context * ctx)
        void resume()
        void pause()
        cbool take_turn()
        void give_turn(uint64_t used_ns)
        double load()
        Trial try_threads(llama_context * ctx, GovernorState & on, int n_threads, int pos, int n_tokens, cbool note)
        Trial warm_up(llama_context * ctx, GovernorState & on, cbool quick)
        void put_token(int row, llama_token token, llama_pos pos, llama_seq_id seq, cbool logits)
