"""From SamplingParams to a llama.cpp sampler chain, every number checked.

Order of the chain, as llama.cpp's own tools have it: penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature,
then the draw; mirostat replaces what follows the penalties. Logit bias, ``ignore_eos`` and ``min_tokens`` are applied
to the logits themselves before the chain, which is what llama.cpp's logit-bias sampler does, without needing all
candidates to be built.
"""

from cython.operator cimport dereference
from libc.stdint cimport int32_t, uint32_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

import secrets

from mullama._core.constraint.grammars cimport Next, compile_for
from mullama._core.llama cimport *
from mullama._core.model.model cimport Model
from mullama.errors import InvalidRequest
from mullama.types import LOGPROBS_MODES, MAX_LOGPROBS

cdef enum:
    MAX_BREAKER_TOKENS = 1 << 15  # tokens that may hold a sequence breaker of one request; a sampler lists them
    MAX_KEPT_TOKENS = 1 << 19  # and of all breakers that a model remembers
    MAX_KEPT_BREAKERS = 1 << 10
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
        whole("max_tokens", 0, 1 << 30)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            whole(name, 0, MAX_LOGPROBS)
    if params.logprobs_mode not in LOGPROBS_MODES:
        raise InvalidRequest(f"logprobs_mode must be one of {', '.join(LOGPROBS_MODES)}, got {params.logprobs_mode!r}",
                             param="logprobs_mode")
    if params.seed is not None:
        whole("seed", -(1 << 63), (1 << 64) - 1)
    texts("stop", params.stop)
    texts("bad_words", params.bad_words)
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


cdef class Breaker:
    """The token sequences that one DRY sequence breaker may be. Immutable once found."""


cdef class BreakerTable:
    """What is known of a vocabulary's breakers: the texts of its tokens, and the last breakers that were looked for."""

    def __cinit__(self):
        self.known = {}
        self.n_kept = 0

    cdef Breaker find(self, Model model, str text):
        """The sequences of a breaker; the GIL is released. Raises InvalidRequest where there are too many."""
        cdef Breaker breaker = self.known.pop(text, None)
        cdef string data
        cdef cbool is_all
        if breaker is None:
            breaker = Breaker.__new__(Breaker)
            data = text.encode("utf-8")
            model.enter()
            try:
                with nogil:
                    is_all = find_breaker(model.vocab, self.pieces, data, MAX_BREAKER_TOKENS, breaker.found)
            finally:
                model.leave()
            if not is_all:
                raise _too_many_breakers()
            breaker.n = breaker.found.size()
        else:
            self.n_kept -= breaker.n
        if self.known.setdefault(text, breaker) is breaker:  # the newest last; another thread may have been quicker
            self.n_kept += breaker.n
        while self.known and (self.n_kept > MAX_KEPT_TOKENS or len(self.known) > MAX_KEPT_BREAKERS):
            self.n_kept -= (<Breaker> self.known.pop(next(iter(self.known)))).n
        return breaker


def _too_many_breakers():
    return InvalidRequest(
        f"dry_sequence_breakers: more than {MAX_BREAKER_TOKENS} tokens of this model hold one; give fewer or longer",
        param="dry_sequence_breakers")


cdef class Sampling:
    """What is dear about a request's sampling parameters, worked out for a model: made in any thread, used by any
    number of chains. Raises InvalidRequest, naming the field."""

    def __init__(self, Model model not None, params):
        cdef llama_logit_bias entry
        check_params(params)
        self.model = model
        self.need_rules(params)
        for token, value in params.logit_bias:
            entry.token = model.check_token(token, param="logit_bias")
            entry.bias = max(value, -1e9)
            self.bias.push_back(entry)
        if params.dry_multiplier > 0 and params.dry_base >= 1 and params.dry_penalty_last_n != 0:
            self.need_breakers(tuple(params.dry_sequence_breakers))
        if params.constraint is not None:
            self.grammar = compile_for(model, params.constraint)

    cdef int need_breakers(self, tuple texts) except -1:
        cdef BreakerTable table
        cdef Breaker breaker
        if self.model.breakers is None:
            self.model.breakers = BreakerTable()
        table = self.model.breakers
        for text in texts:
            breaker = table.find(self.model, text)
            with nogil:
                merge_breakers(self.breakers, breaker.found)
            if self.breakers.size() > MAX_BREAKER_TOKENS:
                raise _too_many_breakers()
        return 0

    cdef int need_rules(self, object params) except -1:
        cdef vector[llama_token] one
        for token in params.stop_token_ids:
            self.rules.ends.push_back(self.model.check_token(token, param="stop_token_ids"))
        for token in params.allowed_token_ids or ():
            self.rules.allowed.push_back(self.model.check_token(token, param="allowed_token_ids"))
        for text in params.bad_words:
            # A word has other tokens where it begins a text than behind a space.
            plain = self.model.tokenize(text.lstrip(), add_special=False, parse_special=False)
            spaced = self.model.tokenize(" " + text.lstrip(), add_special=False, parse_special=False)
            for tokens in (plain, spaced) if spaced[:1] != plain[:1] and len(spaced) == len(plain) else (plain,):
                if tokens:
                    one = tokens
                    self.rules.banned.push_back(one)
        return 0

    @property
    def breaker_sequences(self):
        """The token sequences that break a repetition for DRY, in order."""
        return self.breakers


cdef Sampling prepared_for(Model model, object params, object prepared):
    """``prepared``, where it was made for this model's vocabulary; else it is made now."""
    if prepared is not None and (<Sampling?> prepared).model is model:
        return prepared
    return Sampling(model, params)


cdef MatchingPtr begin_matching(Sampling prepared, Model model, const vector[llama_token] & known) except *:
    """What holds a text to its constraint, where it has one; ``known``: the tokens of it that are there already.

    Raises InvalidRequest where these are not what is allowed.
    """
    cdef MatchingPtr matching
    if prepared.grammar is not None:
        matching = prepared.grammar.begin()
        if dereference(matching).start(known, model.vocab) != Next.goes_on:
            raise InvalidRequest("the constraint allows nothing here", param="constraint")
    return matching


cdef Chain build_chain(Sampling prepared, object params, int32_t n_ctx, vector[llama_logit_bias] & bias) except *:
    """Build the chain of ``params``; the caller owns it. ``n_ctx`` stands for -1 in the look-back lengths."""
    cdef Chain chain
    cdef Model model = prepared.model
    chain.ptr = NULL
    chain.greedy = False
    chain.top_k_first = 0
    chain.look_back = 0
    bias = prepared.bias

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
    cdef float multiplier = params.dry_multiplier, base = params.dry_base
    cdef int32_t allowed_length = params.dry_allowed_length
    cdef llama_sampler * ptr = llama_sampler_chain_init(llama_sampler_chain_default_params())
    if penalties:
        llama_sampler_chain_add(ptr, llama_sampler_init_penalties(
            model.n_vocab, last_n, params.repeat_penalty, params.frequency_penalty, params.presence_penalty))
    if dry:
        with nogil:
            if prepared.breakers.empty():
                llama_sampler_chain_add(ptr, llama_sampler_init_dry(
                    model.vocab, multiplier, base, allowed_length, dry_last_n, NULL, 0))
            else:
                llama_sampler_chain_add(ptr, llama_sampler_init_dry_testing(
                    multiplier, base, allowed_length, dry_last_n, prepared.breakers))
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
    chain.look_back = max(last_n if penalties else 0, dry_last_n if dry else 0)
    return chain
