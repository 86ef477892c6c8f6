"""The slots of a context and the law of their KV (slots.h).

nogil code: the engine thread may touch all of it, and nobody else may touch any of it while ``Core.run`` runs. It lies
in its Core and is never exchanged; ``ctx`` is the context of Core.context, which the Core keeps alive and exchanges
only together with the address (Core.go_on_with, Core.lose_context), on the engine thread, when nothing runs.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.constraint.grammars cimport MatchingPtr
from mullama._core.lora.adapters cimport LoraSetPtr
from mullama._core.compute.compute cimport Compute, Guard
from mullama._core.llama cimport *
from mullama._core.output.output cimport Output
from mullama.abi cimport mullama_row


cdef extern from "text.h" namespace "mullama" nogil:
    cppclass TextGate:
        vector[string] stops
        void begin(const string & prompt_end)
        int push(const char * piece, size_t n, cbool check_stops, string & released)
        int flush(string & released)

cdef extern from "slots.h" namespace "mullama" nogil:
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
        vector[llama_token] shown
        MatchingPtr matching
        TextGate gate
        string pending_text
        mullama_row row
        cbool shows(llama_token token)
        cbool open()
        cbool runs()
        void end_request()
    cdef enum:
        MAX_PIECE "mullama::MAX_PIECE"
    void swap_slots(Slot & a, Slot & b)
    cppclass Slots:
        llama_context * ctx
        llama_memory_t mem
        int n_ctx
        cbool unified
        cbool needs_checkpoint
        size_t token_bytes
        LoraSetPtr in_charge
        cbool changed
        uint64_t waiting
        uint64_t reused_before
        Output * out
        Guard * guard
        void resize(int n)
        int size()
        Slot * at(int slot)
        void take_on(llama_context * context)
        void let_go_of_context()
        cbool put_in_charge(const LoraSetPtr & set)
        int n_open()
        cbool cut(int slot, int n)
        int keep_head(int slot, int n)
        void retain(int slot, int n_past)
        void clear(int slot)
        void lose(int slot)
        cbool exchange(int a, int b, size_t & n_bytes)
        uint8_t * staging(size_t n)
        size_t staging_bytes()
        void begin_text(Slot * s)
        void flush_text(Slot * s)
        void finish(Slot * s, int slot, uint32_t reason, int stop_index, int error)
        void publish(const Compute & compute)
