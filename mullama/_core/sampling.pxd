from libc.stdint cimport int32_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from mullama._core.llama cimport llama_logit_bias, llama_sampler
from mullama._core.model cimport Model


cdef struct Chain:
    llama_sampler * ptr      # NULL: argmax is enough
    cbool greedy
    int32_t top_k_first      # > 0: only the k largest logits matter to the chain

cdef Chain build_chain(Model model, object params, int32_t n_ctx, vector[llama_logit_bias] & bias) except *
