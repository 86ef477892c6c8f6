"""From a request's parameters to a sampler chain.

nogil code reads a Sampling's and a Breaker's vectors, which nobody changes once they are made, and looks for breakers
in ``pieces``, which have a lock of their own (dry.h). ``known`` and ``n_kept`` are touched with the GIL alone.
"""

from libc.stdint cimport int32_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.constraint.grammars cimport Grammar, MatchingPtr
from mullama._core.llama cimport llama_logit_bias, llama_sampler, llama_token, llama_vocab
from mullama._core.model.model cimport Model


cdef struct Chain:
    llama_sampler * ptr      # NULL: argmax is enough
    cbool greedy
    int32_t top_k_first      # > 0: only the k largest logits matter to the chain
    int32_t look_back        # only the last tokens of a text matter to the chain: so many


cdef extern from "dry.h" namespace "mullama" nogil:
    ctypedef vector[llama_token] TokenSequence
    cppclass Pieces:
        pass
    cbool find_breaker(const llama_vocab * vocab, Pieces & pieces, string breaker, size_t most,
                       vector[TokenSequence] & found) except +
    void merge_breakers(vector[TokenSequence] & all, const vector[TokenSequence] & more) except +
    void accept_all(llama_sampler * chain, const vector[llama_token] & tokens, size_t look_back) except +


cdef extern from "dry.h" nogil:
    llama_sampler * llama_sampler_init_dry_testing(float multiplier, float base, int32_t allowed_length,
                                                   int32_t penalty_last_n,
                                                   const vector[TokenSequence] & breakers) except +


cdef class Breaker:
    cdef vector[TokenSequence] found
    cdef size_t n


cdef class BreakerTable:
    cdef Pieces pieces
    cdef dict known
    cdef size_t n_kept

    cdef Breaker find(self, Model model, str text)


cdef class Sampling:
    cdef readonly Model model
    cdef vector[llama_logit_bias] bias
    cdef vector[TokenSequence] breakers
    cdef Grammar grammar     # None: the text is free

    cdef int need_breakers(self, tuple texts) except -1


cdef Sampling prepared_for(Model model, object params, object prepared)
cdef MatchingPtr begin_matching(Sampling prepared, Model model, const vector[llama_token] & known) except *
cdef Chain build_chain(Sampling prepared, object params, int32_t n_ctx, vector[llama_logit_bias] & bias) except *
