"""Grammars of llguidance for a model's vocabulary, and matchers that hold texts to them.

nogil code has a Matching by a shared pointer that a slot owns (matching.h says who may touch it when), and compiles in
``compile_grammar``, which touches no Python. A vocabulary and a grammar are never changed once they are made, but for
caches of the library, behind a lock of the grammar.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.llama cimport llama_token, llama_vocab
from mullama._core.model.model cimport Model


cdef extern from "llguidance.h" namespace "mullama" nogil:
    cppclass LlgLimits:
        size_t items_in_row, step_items, lexer_states, grammar_size
        uint64_t initial_fuel, step_fuel
        cbool precompute_large, verbose_errors
    cppclass LlgInit:
        LlgLimits limits
    cppclass Llg:
        string open(const char * path) except +
        LlgInit init(const void * tokenizer)


cdef extern from "matching.h" namespace "mullama" nogil:
    cdef enum class Next "mullama::Matching::Next":
        goes_on
        complete
        failed
    cppclass Beginning:
        vector[string] after, triggers
    cppclass Matching:
        cbool is_open()
        cbool may_end()
        Next start(const vector[llama_token] & known, const llama_vocab * vocab) except +
        cbool has_forced()
        llama_token take_forced()
        size_t n_forced()
        cbool may_come(llama_token token, const llama_vocab * vocab) noexcept
        Next seen(llama_token token, const llama_vocab * vocab) noexcept
        const uint32_t * mask() noexcept
        cbool wants_mask()
    ctypedef shared_ptr[Matching] MatchingPtr "mullama::MatchingPtr"
    cppclass MaskWorker:
        void add(const MatchingPtr & matching) noexcept
        void start() noexcept
        void close()
    void apply_mask(float * logits, int32_t n, const uint32_t * mask)


cdef extern from "grammars.h" namespace "mullama" nogil:
    cppclass CVocabulary "mullama::Vocabulary":
        CVocabulary(const Llg & llg)
        string read(const llama_vocab * vocab) except +
        uint32_t n_tokens
    ctypedef shared_ptr[CVocabulary] VocabularyPtr "mullama::VocabularyPtr"
    cppclass CGrammar "mullama::Grammar":
        MatchingPtr begin() except +
    ctypedef shared_ptr[CGrammar] GrammarPtr "mullama::GrammarPtr"
    GrammarPtr compile_grammar "mullama::compile" (
        VocabularyPtr vocabulary, const string & kind, const string & text, const LlgLimits & limits,
        const Beginning & beginning, int quick_ms, int most_ms, int most_threads, string & error) except +


cdef class Grammar:
    cdef GrammarPtr native

    cdef MatchingPtr begin(self) except *


cdef class Vocabulary:
    cdef VocabularyPtr native
    cdef object lock
    cdef object known      # what was compiled, the latest last: by kind, text and beginning a Grammar with its time
    cdef size_t n_bytes    # of their texts

    cdef Grammar find(self, tuple key)
    cdef int keep(self, tuple key, Grammar grammar) except -1


cdef Grammar compile_for(Model model, object constraint)
