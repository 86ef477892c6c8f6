from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.adapters cimport LoraSetPtr
from mullama._core.arbiter cimport Arbiter, Flag
from mullama._core.context cimport Context
from mullama._core.governor cimport Governor
from mullama._core.llama cimport *
from mullama._core.model cimport Model
from mullama._core.page cimport Page
from mullama.abi cimport *


cdef enum:
    MAX_PIECE = 512  # bytes of a sane token's text

cdef extern from "text.h" namespace "mullama" nogil:
    cppclass TextGate:
        vector[string] stops
        void begin(const string & prompt_end)
        int push(const char * piece, size_t n, cbool check_stops, string & released)
        int flush(string & released)
    size_t utf8_incomplete_tail(const string & s)

cdef extern from "seq.h" namespace "mullama" nogil:
    cppclass Slot:
        uint32_t state
        vector[llama_token] tokens
        int32_t n_past
        uint64_t last_used
        uint64_t handle
        int32_t n_prompt, n_generated, max_tokens, min_tokens
        cbool ignore_eos, poisoned
        int32_t shift_keep, shifted
        llama_sampler * chain
        cbool greedy
        int32_t top_k_first
        vector[llama_logit_bias] bias
        LoraSetPtr lora
        TextGate gate
        string pending_text
        mullama_row row
        cbool open()
        void end_request()
    void swap_slots(Slot & a, Slot & b)

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
        uint32_t unused
    cppclass Ring:
        Ring(uint32_t capacity) except +
        cbool push(const RecordHeader & header, const void * body, uint32_t n, const void * tail, uint32_t n_tail)
        const RecordHeader * peek()
        void pop()
        uint64_t used()
        uint64_t capacity()

cdef extern from "wake.h" namespace "mullama" nogil:
    cppclass Wake:
        int read_fd
        int write_fd
        cbool open()
        void close()
        void signal()
        void clear()

cdef extern from "clock.h" namespace "mullama" nogil:
    uint64_t now_ns()
    void sleep_us(int us)
    cppclass OwnCores:
        OwnCores()
    cppclass NeighbourLoad:
        double read()
        uint64_t age_ns()
        int cores()

        @staticmethod
        cbool read_busy(const char * path, const OwnCores & own_cores, uint64_t & busy)
    cppclass Deadline:
        uint64_t at_ns
        Flag stop
        const Wake * wake

        @staticmethod
        cbool expired(void * self) noexcept

cdef extern from "guard.h" namespace "mullama" nogil:
    cdef enum:
        CORE_OK "mullama::CORE_OK"
        CORE_NOT_FINITE "mullama::CORE_NOT_FINITE"
        CORE_SAMPLER "mullama::CORE_SAMPLER"
        CORE_DECODE "mullama::CORE_DECODE"
        CORE_NO_KV "mullama::CORE_NO_KV"
        CORE_ADAPTER "mullama::CORE_ADAPTER"
        CORE_EXCEPTION "mullama::CORE_EXCEPTION"
    cppclass Guard:
        const char * message
    cbool guarded_wipe(llama_context * ctx, llama_seq_id seq, Guard & guard)
    int guarded_decode(llama_context * ctx, const llama_batch & batch, Guard & guard)
    llama_token guarded_sample(llama_sampler * chain, llama_token_data_array * candidates, Guard & guard)


cdef class Machine:
    cdef readonly Context context
    cdef readonly Model model          # of the context
    cdef Context target                # being prepared to take over (swap.pyx)
    cdef uint64_t switched_ns          # last step of the old weights ended; 0: the new ones have taken one
    cdef uint64_t reused_before        # graphs reused by contexts before this one
    cdef readonly Arbiter turns
    cdef readonly int seat             # of the arbiter
    cdef readonly Page page
    cdef readonly Governor governor
    cdef readonly int n_slots
    cdef readonly int n_ctx            # tokens one slot may hold
    cdef readonly int n_batch
    cdef llama_context * ctx
    cdef llama_memory_t mem
    cdef ggml_threadpool_t pool
    cdef int pid                       # of the process that made it
    cdef llama_batch batch
    cdef vector[Slot] slots
    cdef unique_ptr[Ring] ring
    cdef Wake wake
    cdef Deadline deadline
    cdef NeighbourLoad neighbours
    cdef Guard guard
    cdef Flag interrupted
    cdef mullama_counters counters
    cdef vector[llama_token] eog
    cdef vector[llama_token_data] candidates
    cdef vector[uint8_t] state_a
    cdef vector[uint8_t] state_b
    cdef string released
    cdef vector[char] long_piece
    cdef vector[int32_t] plan_decode   # in groups of one set of adapters each
    cdef vector[size_t] plan_ranges    # where ranges of it begin that are one ubatch each, and the end
    cdef vector[int32_t] plan_prefill
    cdef vector[int32_t] plan_chunk
    cdef LoraSetPtr in_charge          # the set of adapters that the context has now
    cdef int threads_set
    cdef int n_swa
    cdef readonly bint unified         # one buffer of cells for all slots
    cdef readonly bint can_shift       # the oldest tokens of a sequence can make room for new ones
    cdef bint can_trim                 # the tail of a sequence can be removed
    cdef bint can_abort
    cdef bint synchronous              # all compute is on the CPU
    cdef bint pool_paused
    cdef bint pushed                   # records since the last wake-up
    cdef bint changed                  # a sequence changed its state
    cdef int fault_slot                # fault injection: this slot's next logits become NaN
    cdef uint64_t waiting
    cdef uint64_t busy_since           # end of the last step; 0 after idling

    cdef void take_on(self, Context context) noexcept
    cdef void attach(self, llama_context * ctx) noexcept nogil
    cdef int set_up(self, page_path, bint page_needed, bint quick) except -1
    cdef void release(self) noexcept
    cdef int warm_up(self, llama_context * ctx, Governor governor, bint quick) except -1
    cdef bint take_turn(self) noexcept
    cdef bint try_threads(self, llama_context * ctx, Governor governor, int threads, int pos, int n_tokens,
                          bint note) except? True
    cdef void resume_pool(self) noexcept nogil
    cdef double load(self) noexcept nogil
    cdef void site(self, uint32_t kind, int32_t slot, uint64_t handle, int64_t a, int64_t b) noexcept nogil
    cdef void publish(self) noexcept nogil
    cdef bint push(self, const RecordHeader & header, const void * body, uint32_t n, const void * tail,
                   uint32_t n_tail) noexcept nogil
    cdef void flush_text(self, Slot * s, int n_tokens) noexcept nogil
    cdef int check_slot(self, int slot) except -1
