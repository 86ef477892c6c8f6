"""From SamplingParams to a llama.cpp sampler chain, every number checked.

Order of the chain, as llama.cpp's own tools have it: penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature,
then the draw; mirostat replaces what follows the penalties. Logit bias, ``ignore_eos`` and ``min_tokens`` are applied
to the logits themselves before the chain, which is what llama.cpp's logit-bias sampler does, without needing all
candidates to be built.
"""

from libc.stdint cimport int32_t, uint32_t
from libcpp.vector cimport vector

import secrets

from mullama._core.llama cimport *
from mullama._core.model cimport Model
from mullama.errors import InvalidRequest

cdef enum:
    MAX_SCANNED_TOP_K = 512  # above, building all candidates is no slower

#: Temperatures below draw the largest logit (vLLM's bound too): others differ by more than they leave a chance, and
#: logits divided by a denormal are infinite.
GREEDY_BELOW = 1e-5


def check_params(params):
    """Raise InvalidRequest, naming the field, unless every number is one that llama.cpp can take."""
    def number(name, low, high):
        value = getattr(params, name)
        # The comparison is false for NaN, and exact for whole numbers that no double holds.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise InvalidRequest(f"{name} must be a number from {low} to {high}, got {value!r}", param=name)

    def whole(name, low, high):
        value = getattr(params, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidRequest(f"{name} must be a whole number from {low} to {high}, got {value!r}", param=name)

    def texts(name, values):
        for value in values:
            if not isinstance(value, str) or not value:
                raise InvalidRequest(f"every text in {name} must have at least one character", param=name)
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise InvalidRequest(f"a text in {name} holds a lone surrogate, which is not valid Unicode",
                                     param=name) from None

    number("temperature", 0, 100)
    whole("top_k", -1, 1 << 30)
    number("top_p", 0, 1)
    number("min_p", 0, 1)
    number("typical_p", 0, 1)
    number("repeat_penalty", 1e-3, 100)
    whole("repeat_last_n", -1, 1 << 20)
    number("presence_penalty", -100, 100)
    number("frequency_penalty", -100, 100)
    number("dry_multiplier", 0, 100)
    number("dry_base", 0, 100)
    whole("dry_allowed_length", 0, 1 << 20)
    whole("dry_penalty_last_n", -1, 1 << 20)
    number("xtc_probability", 0, 1)
    number("xtc_threshold", 0, 1)
    whole("mirostat", 0, 2)
    number("mirostat_tau", 0, 1000)
    number("mirostat_eta", 0, 1)
    whole("min_tokens", 0, 1 << 30)
    if params.max_tokens is not None:
        whole("max_tokens", 1, 1 << 30)
    if params.seed is not None:
        whole("seed", -(1 << 63), (1 << 64) - 1)
    texts("stop", params.stop)
    texts("dry_sequence_breakers", params.dry_sequence_breakers)
    try:
        pairs = [(token, value) for token, value in params.logit_bias]
    except (TypeError, ValueError):
        raise InvalidRequest("logit_bias must be pairs of a token id and a number", param="logit_bias") from None
    for token, value in pairs:
        if isinstance(token, bool) or not isinstance(token, int) or isinstance(value, bool) \
                or not isinstance(value, (int, float)) or not value <= 1e4:
            raise InvalidRequest(f"logit_bias must pair token ids with numbers up to 10000, got {token!r}: {value!r}",
                                 param="logit_bias")


cdef Chain build_chain(Model model, object params, int32_t n_ctx, vector[llama_logit_bias] & bias) except *:
    """Build the chain of ``params``; the caller owns it. ``n_ctx`` stands for -1 in the look-back lengths."""
    cdef Chain chain
    cdef llama_logit_bias entry
    chain.ptr = NULL
    chain.greedy = False
    chain.top_k_first = 0
    check_params(params)
    bias.clear()
    for token, value in params.logit_bias:
        entry.token = model.check_token(token, param="logit_bias")
        entry.bias = max(value, -1e9)
        bias.push_back(entry)

    cdef int32_t last_n = n_ctx if params.repeat_last_n < 0 else params.repeat_last_n
    cdef int32_t dry_last_n = n_ctx if params.dry_penalty_last_n < 0 else params.dry_penalty_last_n
    cdef bint penalties = last_n > 0 and (params.repeat_penalty != 1 or params.frequency_penalty != 0
                                          or params.presence_penalty != 0)
    cdef bint dry = params.dry_multiplier > 0 and params.dry_base >= 1 and dry_last_n > 0
    cdef bint greedy = params.temperature < GREEDY_BELOW or params.top_k == 1
    if greedy and not penalties and not dry:
        chain.greedy = True
        return chain

    # 2^32 - 1 is llama.cpp's word for "a fresh one" (LLAMA_DEFAULT_SEED), so no seed may become it.
    cdef uint32_t seed = (secrets.randbits(32) if params.seed is None else params.seed) % 0xFFFFFFFF
    cdef vector[const char *] breakers
    cdef llama_sampler * ptr = llama_sampler_chain_init(llama_sampler_chain_default_params())
    if penalties:
        llama_sampler_chain_add(ptr, llama_sampler_init_penalties(
            model.n_vocab, last_n, params.repeat_penalty, params.frequency_penalty, params.presence_penalty))
    if dry:
        encoded = [text.encode("utf-8") for text in params.dry_sequence_breakers if text]
        for text in encoded:
            breakers.push_back(<const char *> text)
        llama_sampler_chain_add(ptr, llama_sampler_init_dry(
            model.vocab, params.dry_multiplier, params.dry_base, params.dry_allowed_length, dry_last_n,
            breakers.data(), breakers.size()))
    if greedy:
        llama_sampler_chain_add(ptr, llama_sampler_init_greedy())
    elif params.mirostat == 1:
        llama_sampler_chain_add(ptr, llama_sampler_init_temp(params.temperature))
        llama_sampler_chain_add(ptr, llama_sampler_init_mirostat(
            model.n_vocab, seed, params.mirostat_tau, params.mirostat_eta, 100))
    elif params.mirostat == 2:
        llama_sampler_chain_add(ptr, llama_sampler_init_temp(params.temperature))
        llama_sampler_chain_add(ptr, llama_sampler_init_mirostat_v2(seed, params.mirostat_tau, params.mirostat_eta))
    else:
        if params.top_k > 0:
            llama_sampler_chain_add(ptr, llama_sampler_init_top_k(min(params.top_k, model.n_vocab)))
            if not penalties and not dry and params.top_k <= MAX_SCANNED_TOP_K:
                chain.top_k_first = min(params.top_k, model.n_vocab)
        if params.typical_p < 1:
            llama_sampler_chain_add(ptr, llama_sampler_init_typical(params.typical_p, 1))
        if params.top_p < 1:
            llama_sampler_chain_add(ptr, llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            llama_sampler_chain_add(ptr, llama_sampler_init_min_p(params.min_p, 1))
        if params.xtc_probability > 0:
            llama_sampler_chain_add(ptr, llama_sampler_init_xtc(
                params.xtc_probability, params.xtc_threshold, 1, seed))
        llama_sampler_chain_add(ptr, llama_sampler_init_temp(params.temperature))
        llama_sampler_chain_add(ptr, llama_sampler_init_dist(seed))
    chain.ptr = ptr
    return chain
