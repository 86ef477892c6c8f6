"""For tests only: parts of the core alone, which no other module uses in this form. The gate that text passes, the
scans of a row of logits, how far two rows are apart, the reading of the machine's load, and llama.cpp called
directly."""

from libc.stdint cimport int32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.weights.divergence cimport kl_divergence
from mullama._core.compute.compute cimport Guard, guarded_decode
from mullama._core.llama cimport *
from mullama._core.output.clock cimport NeighbourLoad, OwnCores
from mullama._core.core.loop cimport Scorer, scan_argmax, scan_top_k
from mullama._core.model.model cimport Model
from mullama._core.core.slots cimport TextGate


cdef class StopText:
    """The text gate alone, for tests: pieces in, final bytes out."""

    cdef TextGate gate
    cdef readonly int ended_by  # index of the stop string that ended the text, or -1

    def __init__(self, stops=()):
        self.ended_by = -1
        for stop in stops:
            if not stop:
                raise ValueError("a stop string needs a character")
            self.gate.stops.push_back(stop.encode("utf-8"))

    def begin(self, bytes prompt_end):
        """Before the first piece: how the prompt ends."""
        self.gate.begin(prompt_end)

    def push(self, bytes piece, *, bint check_stops=True):
        """Returns (final bytes, index of the stop string that ended the text or -1)."""
        cdef string released
        cdef const char * data = piece
        self.ended_by = self.gate.push(data, len(piece), check_stops, released)
        return <bytes> released, self.ended_by

    def flush(self):
        """End of text: the bytes still held back, up to a stop string among them (``ended_by``)."""
        cdef string released
        self.ended_by = self.gate.flush(released)
        return <bytes> released


def scan(logits, int k=0):
    """The scans alone, for tests: argmax of a sequence of floats (k = 0), else the ids of the k largest, or None."""
    cdef vector[float] x = logits
    cdef vector[llama_token_data] out
    cdef int32_t n
    if k == 0:
        n = scan_argmax(x.data(), <int32_t> x.size())
        return None if n < 0 else n
    n = scan_top_k(x.data(), <int32_t> x.size(), k, out)
    return None if n < 0 else [out[i].id for i in range(n)]


def kl(p, q):
    """(divergence in nats, whether both have the same largest one) of two rows of logits; None: not all are usable."""
    cdef vector[float] a = p, b = q
    cdef double found = 0
    cdef cbool same_top = False
    if a.size() != b.size() or a.empty():
        raise ValueError("two rows of the same length are compared")
    if not kl_divergence(a.data(), b.data(), <int32_t> a.size(), found, same_top):
        return None
    return found, bool(same_top)


def busy_ticks(path):
    """Ticks that this process's cores were busy, by a file like ``/proc/stat``; None: it does not say."""
    cdef OwnCores own_cores
    cdef uint64_t busy = 0
    cdef bytes name = str(path).encode()
    return busy if NeighbourLoad.read_busy(name, own_cores, busy) else None


def score(logits, int token, int k):
    """(rank of the token, its log-probability, [(token, log-probability) of the ``k`` most likely]); None: unusable."""
    cdef vector[float] row = logits
    cdef Scorer scorer
    if not scorer.score_row(row.data(), <int32_t> row.size(), token, k):
        return None
    found = [(entry.token, entry.logprob) for entry in scorer.entries]
    return scorer.rank, found[0][1], found[1:]


def logits_of(Model model not None, tokens, int chunk=512):
    """The rows of logits behind each token, as llama.cpp gives them to who calls it directly: 32-bit floats, as bytes.

    ``chunk``: tokens of one llama_decode.
    """
    cdef vector[llama_token] given = tokens
    cdef int32_t n = <int32_t> given.size(), i, first
    cdef llama_context_params params = llama_context_default_params()
    params.n_ctx = (n + 255) // 256 * 256
    params.n_batch = params.n_ubatch = max(chunk, 32)
    params.n_outputs_max = params.n_batch
    params.n_seq_max = 1
    cdef llama_context * ctx = llama_init_from_model(model.ptr, params)
    cdef llama_batch batch = llama_batch_init(chunk, 0, 1)
    cdef Guard guard
    rows = []
    try:
        for first in range(0, n, chunk):
            batch.n_tokens = min(chunk, n - first)
            for i in range(batch.n_tokens):
                batch.token[i] = given[first + i]
                batch.pos[i] = first + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = True
            if ctx is NULL or guarded_decode(ctx, batch, guard) != 0:
                raise RuntimeError("llama.cpp did not decode")
            for i in range(batch.n_tokens):
                rows.append((<const char *> llama_get_logits_ith(ctx, i))[:model.n_vocab * sizeof(float)])
        return b"".join(rows)
    finally:
        llama_batch_free(batch)
        llama_free(ctx)
