"""For tests only: parts of the core alone, which no other module uses in this form. The gate that text passes, the
scans of a row of logits, how far two rows are apart, and the reading of the machine's load."""

from libc.stdint cimport int32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.weights.divergence cimport kl_divergence
from mullama._core.llama cimport *
from mullama._core.output.clock cimport NeighbourLoad, OwnCores
from mullama._core.core.loop cimport scan_argmax, scan_top_k
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
