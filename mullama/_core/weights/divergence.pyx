"""How far two models of one vocabulary are apart: their distributions of the next token, compared on given tokens.

    Divergence(old, new)         two contexts of one slot each, which nobody else uses
    measure(tokens, n_tail)      the old model reads everything; the new one too, or goes on from the old one's KV

It computes on one thread, the caller's, and takes no turn among engines: with a low priority it steps back for
them, and a graph on one thread waits at no barrier for a core that it has lost.
"""

from libc.stdint cimport uint8_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from mullama._core.model.context cimport Context
from mullama._core.llama cimport *
from mullama._core.compute.compute cimport Guard, guarded_decode
from mullama.errors import ComputeFailed, InvalidRequest

cdef class Divergence:
    """Compares the model of ``new`` with that of ``old``. Raises InvalidRequest when their vocabularies differ."""

    def __cinit__(self):
        self.batch.token = NULL

    def __init__(self, Context old not None, Context new not None):
        if old.ctx is NULL or new.ctx is NULL:
            raise RuntimeError("a context was closed")
        if old.model.n_vocab != new.model.n_vocab or old.model.vocab_digest() != new.model.vocab_digest():
            raise InvalidRequest("the two models have different vocabularies: their answers cannot be compared",
                                 param="kl")
        self.old = old
        self.new = new
        self.n_batch = min(old.n_batch, new.n_batch)
        self.batch = llama_batch_init(self.n_batch, 0, 1)
        llama_set_n_threads(old.ctx, 1, 1)
        llama_set_n_threads(new.ctx, 1, 1)

    def __dealloc__(self):
        if self.batch.token is not NULL:
            llama_batch_free(self.batch)

    def measure(self, tokens, int n_tail, *, bint carry=False, goes_on=None):
        """The divergence at each of the last ``n_tail`` tokens, and at how many both models would choose the same one.

        In nats, D(old || new), the tokens before being given. ``carry``: the new model goes on from the KV that the
        old one made of what comes before the tail, as a carried sequence does; else it computes that itself.
        ``goes_on()`` is asked between decodes; False gives up, and the answer is None. Raises InvalidRequest for
        tokens that do not fit, ComputeFailed when a model cannot compute them.
        """
        cdef vector[llama_token] text = tokens
        cdef int n = <int> text.size(), head = n - n_tail - 1, i, n_same = 0
        cdef double kl = 0
        cdef cbool same_top = False
        cdef size_t at
        if not 1 <= n_tail < n <= min(self.old.n_ctx, self.new.n_ctx):
            raise InvalidRequest(f"a comparison takes 2 to {min(self.old.n_ctx, self.new.n_ctx)} tokens and a tail "
                                 f"shorter than that, got {n} and {n_tail}")
        for at in range(text.size()):
            if not 0 <= text[at] < self.old.model.n_vocab:
                raise InvalidRequest(
                    f"token id {text[at]} is outside the vocabulary (0 to {self.old.model.n_vocab - 1})")
        llama_memory_clear(self.old.mem, False)
        llama_memory_clear(self.new.mem, False)
        for context in (self.old,) if carry else (self.old, self.new):
            for i in range(0, head, self.n_batch):
                if goes_on is not None and not goes_on():
                    return None
                self.decode(context, text.data() + i, i, min(self.n_batch, head - i))
        if carry and head > 0:
            self.carry_over()
        found = []
        for i in range(head, n - 1):
            if goes_on is not None and not goes_on():
                return None
            self.decode(self.old, text.data() + i, i, 1)
            self.decode(self.new, text.data() + i, i, 1)
            if not kl_divergence(llama_get_logits_ith(self.old.ctx, 0), llama_get_logits_ith(self.new.ctx, 0),
                                 self.old.model.n_vocab, kl, same_top):
                raise ComputeFailed("logits that are not finite: the models cannot be compared")
            found.append(kl)
            n_same += same_top
        return found, n_same

    cdef bint decode(self, Context context, const llama_token * tokens, int pos, int n) except -1:
        """Compute ``n`` tokens from ``pos`` on; the logits of the last one can be had."""
        cdef int i, rc
        cdef Guard guard
        cdef llama_context * ctx = context.ctx
        if ctx is NULL:
            raise RuntimeError("a context was closed")
        for i in range(n):
            self.batch.token[i] = tokens[i]
            self.batch.pos[i] = pos + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = i == n - 1
        self.batch.n_tokens = n
        with nogil:
            rc = guarded_decode(ctx, self.batch, guard)
            llama_synchronize(ctx)
        if rc != 0:
            raise ComputeFailed(f"{context.model.path}: a decode failed with code {rc} {guard.message.decode()}")
        return True

    cdef bint carry_over(self) except -1:
        """Give the new context the old one's KV."""
        cdef vector[uint8_t] state
        cdef size_t size = llama_state_seq_get_size(self.old.ctx, 0)
        state.resize(size)
        if llama_state_seq_get_data(self.old.ctx, state.data(), size, 0) != size \
                or llama_state_seq_set_data(self.new.ctx, state.data(), size, 0) != size:
            raise ComputeFailed("the KV of the old model does not fit the new one")
        return True
