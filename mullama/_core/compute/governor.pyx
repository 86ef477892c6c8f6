"""How many threads the next decode uses, from measured step times.

ggml's threads meet at a spinning barrier after every node, so one thread that loses its core stalls all of them: beside
a neighbour, two threads can be a hundred times slower than one. The governor sees that in the times of the decodes and
in the load that other processes put on the machine, drops to fewer threads, and tries more when the machine is free.

No clock and no thread inside: time (ns) and load (cores) are passed in. A change is a *trial*, some decodes at the new
count that are compared with what the old count costs now, and the cheaper one stays; but for two cases: two decodes
that were given up shortly after each other leave for one thread at once, and work that begins after idling takes all
the threads there was room for.
"""

cimport cython


@cython.final
cdef class Governor:
    """Chooses between 1 and ``n_max`` threads (at most 64). ``fixed`` always answers ``n_max``.

    ``n_cores``: those that the process may use, 0: unknown. Where there are more than threads, neighbours have room.
    ``snapshot``, ``threads`` and ``changes`` may be asked for from any thread, all else belongs to the engine thread.
    """

    def __cinit__(self, int n_max, bint fixed=False, int n_cores=0):
        self.state.reset(new GovernorState(n_max, fixed, n_cores))

    @property
    def n_max(self):
        """Most threads it may choose."""
        return self.state.get().n_max

    @property
    def fixed(self):
        """Whether it always chooses as many."""
        return bool(self.state.get().fixed)

    @property
    def threads(self):
        """What it has settled on."""
        return self.state.get().view().threads

    @property
    def changes(self):
        """How often it has settled on another number."""
        return self.state.get().view().changes

    @property
    def n_cores(self):
        """Cores that its threads and neighbours share."""
        return self.state.get().view().n_cores

    @n_cores.setter
    def n_cores(self, int n):
        self.state.get().set_cores(n)

    def twin(self):
        """Another one for the same threads and cores, which knows no costs yet."""
        return Governor(self.n_max, self.fixed, self.n_cores)

    def threads_for(self, int n_tokens=1):
        """Threads for the next decode, of ``n_tokens``."""
        return self.state.get().threads_for(n_tokens)

    def allowance(self, int n_tokens):
        """Ns the next decode of ``n_tokens`` may take before it is given up and run on one thread; 0: any."""
        return self.state.get().allowance(n_tokens)

    def record(self, int n_tokens, int threads, ns, now, *, bint aborted=False):
        """Report a decode: its tokens, threads, duration and the time it ended, in ns."""
        if not 1 <= threads <= self.n_max or n_tokens < 1:
            raise ValueError("threads must be 1 to n_max and n_tokens at least 1")
        self.state.get().record(n_tokens, threads, ns, aborted, now)

    def look(self, double cores, now):
        """Report the cores that other processes use (-1: unknown)."""
        self.state.get().look(cores, now)

    def wake(self, double cores, now):
        """Report the cores that others used while there was nothing to do (-1: unknown)."""
        self.state.get().wake(cores, now)

    def cost(self, int n_tokens):
        """Ns that a decode of ``n_tokens`` costs on the present threads, by the nearest shape known; 0: none is."""
        return self.state.get().cost(n_tokens)

    def snapshot(self):
        """Decision and costs of one moment (ns a decode up to 8 tokens, ns a token above), for
        GET /internal/scheduler."""
        cdef GovernorView view = self.state.get().view()
        cdef int t, s
        costs = {}
        for t in range(1, self.n_max + 1):
            known = {}
            for s in range(<int> N_SHAPES):
                if view.cost[t][s] > 0:
                    name = str(s + 1) if s < FIRST_LARGE_SHAPE else f"<={16 << (s - FIRST_LARGE_SHAPE)}"
                    known[name] = int(view.cost[t][s])
            if known:
                costs[t] = known
        return {"threads": view.threads, "threads_max": self.n_max, "fixed": self.fixed,
                "cores": view.n_cores, "changes": view.changes, "on_trial": bool(view.on_trial),
                "neighbour_cores": None if view.neighbours < 0 else round(view.neighbours, 2), "cost_ns": costs}
