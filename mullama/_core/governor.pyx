"""How many threads the next decode uses, from measured step times.

ggml's threads meet at a spinning barrier after every node, so one thread that loses its core stalls all of them: beside
a neighbour, two threads can be a hundred times slower than one. The governor sees that in the times of the decodes and
in the load that other processes put on the machine, drops to fewer threads, and tries more when the machine is free.

No clock and no thread inside: time (ns) and load (cores) are passed in. A change is always a *trial*: some decodes at
the new count, compared with what the old count costs now; the cheaper one stays.
"""

from libc.stdint cimport uint64_t

cdef enum:
    MAX_THREADS = 64
    N_SHAPES = 16
    FIRST_LARGE_SHAPE = 8      # shapes of more than 8 tokens hold ns a token
    TRIAL_DECODES = 3
    LOOKS_TO_ACT = 2

cdef uint64_t MS = 1000000
# The system counts CPU time in ticks of some 10 ms: a shorter window between looks would show noise.
cdef uint64_t LOOK_NS = 200 * MS
cdef uint64_t STRIKE_NS = 500 * MS
cdef uint64_t MIN_HOLD_NS = 250 * MS
cdef uint64_t MAX_HOLD_UP_NS = 1000 * MS     # a neighbour that left is noticed within two seconds
cdef uint64_t MAX_HOLD_DOWN_NS = 16000 * MS  # a neighbour that does no harm is not asked about again and again


cdef inline int shape_of(int n_tokens) noexcept nogil:
    """1 to 8 tokens have a shape each, then one a power of two."""
    cdef int shape = FIRST_LARGE_SHAPE
    cdef int upper = 16
    if n_tokens <= FIRST_LARGE_SHAPE:
        return n_tokens - 1 if n_tokens > 0 else 0
    while n_tokens > upper and shape < N_SHAPES - 1:
        upper *= 2
        shape += 1
    return shape


cdef inline double unit_of(int n_tokens) noexcept nogil:
    return 1.0 if n_tokens <= FIRST_LARGE_SHAPE else <double> n_tokens


cdef class Governor:
    """Chooses between 1 and ``n_max`` threads (at most 64). ``fixed`` always answers ``n_max``.

    ``n_cores``: those that the process may use, 0: unknown. Where there are more than threads, neighbours have room.
    """

    def __cinit__(self, int n_max, bint fixed=False, int n_cores=0):
        cdef int t, s
        self.n_max = min(max(n_max, 1), MAX_THREADS)
        self.n_cores = n_cores if n_cores > 0 else self.n_max
        self.threads = self.n_max
        self.fixed = fixed or self.n_max == 1
        self.changes = 0
        self.neighbours = -1.0
        self.next_look_ns = 0
        self.crowded_looks = self.free_looks = 0
        self.trial = self.trial_left = self.trial_from = 0
        self.hold_until_ns = 0
        self.hold_down_until_ns = 0
        self.last_abort_ns = 0
        self.hold_up_ns = self.hold_down_ns = MIN_HOLD_NS
        for t in range(MAX_THREADS + 1):
            for s in range(N_SHAPES):
                self.quiet[t][s] = self.recent[t][s] = 0.0
                self.outliers[t][s] = 0

    # -- the engine's side, without the GIL ----------------------------------------------------------

    cdef int choose(self, int n_tokens) noexcept nogil:
        # PERF: fewer threads are tried with single tokens only; a prompt chunk on one thread can cost half a second.
        if self.trial > self.threads or (self.trial != 0 and n_tokens <= FIRST_LARGE_SHAPE):
            return self.trial
        return self.threads

    cdef int room(self, double cores) noexcept nogil:
        """Threads that have a core each beside a load of ``cores``; small loads (clients, the system) are shared."""
        return min(max(self.n_cores - <int> (cores + 0.35), 1), self.n_max)

    cdef double expected(self, int n_tokens, int threads) noexcept nogil:
        """Ns that a decode should cost; 0 when nothing is known of the shape."""
        return self.quiet[threads][shape_of(n_tokens)] * unit_of(n_tokens)

    cdef uint64_t allowance(self, int n_tokens) noexcept nogil:
        """Ns after which a decode should be given up and run again with one thread; 0: never."""
        cdef int threads = self.choose(n_tokens)
        if self.fixed or threads == 1:
            return 0
        cdef double usual = self.expected(n_tokens, threads)
        if threads == self.trial and self.recent[self.trial_from][shape_of(n_tokens)] > 0:
            usual = self.recent[self.trial_from][shape_of(n_tokens)] * unit_of(n_tokens)
            return <uint64_t> (usual * 1.5) + 2 * MS
        if usual <= 0:
            usual = self.expected(n_tokens, 1)
        if usual <= 0:
            # Nothing is known of this shape: so many single tokens on one thread cost no less.
            return <uint64_t> (self.single_bound(n_tokens) * 1.5) + (10 * MS if self.single_bound(n_tokens) > 0 else 0)
        return <uint64_t> (usual * 3.0) + 10 * MS

    cdef double single_bound(self, int n_tokens) noexcept nogil:
        """Ns that ``n_tokens`` should cost at most, by the nearest smaller shape known on one thread; 0: none is."""
        cdef int s = shape_of(n_tokens)
        while s >= 0:
            if self.quiet[1][s] > 0:
                return self.quiet[1][s] / (s + 1.0 if s < FIRST_LARGE_SHAPE else 1.0) * n_tokens
            s -= 1
        return 0.0

    cdef void awake(self, double cores, uint64_t now) noexcept nogil:
        """Work begins after idling, while others used ``cores`` (-1: unknown): take all the threads there was room for.

        Never fewer: who was busy a moment ago may have waited for this very answer. If they are busy still, the first
        decode's allowance tells.
        """
        if self.fixed or cores < 0 or self.trial != 0:
            return
        self.neighbours = cores
        self.next_look_ns = now + LOOK_NS
        self.crowded_looks = self.free_looks = 0
        if self.room(cores) > self.threads:
            self.threads = self.room(cores)
            self.changes += 1

    cdef void measured(self, int n_tokens, int threads, uint64_t ns, bint aborted, uint64_t now) noexcept nogil:
        cdef int s = shape_of(n_tokens)
        cdef double cost = <double> ns / unit_of(n_tokens)
        cdef double old = self.quiet[threads][s]
        cdef bint outlier = old > 0 and cost > 1.6 * old
        cdef double before, single
        if aborted:
            if self.trial != 0:
                self.end_trial(False, now)
            if threads == self.threads and threads > 1 and now - self.last_abort_ns < STRIKE_NS:
                # Given up twice in a short time: leave at once, without a trial. Once may be anything.
                self.threads = 1
                self.changes += 1
                self.hold_until_ns = now + MIN_HOLD_NS
                self.free_looks = 0
                self.quiet[threads][s] = self.recent[threads][s] = 0.0  # out of date
            self.last_abort_ns = now
            return
        self.recent[threads][s] = cost if self.recent[threads][s] == 0 else \
            self.recent[threads][s] + 0.3 * (cost - self.recent[threads][s])
        if old == 0:
            self.quiet[threads][s] = cost
            self.outliers[threads][s] = 0
        elif outlier:
            self.outliers[threads][s] += 1
            if self.outliers[threads][s] >= 16:
                # Not a spell: the work itself grew (a longer context).
                self.quiet[threads][s] = self.recent[threads][s]
                self.outliers[threads][s] = 0
        else:
            self.quiet[threads][s] += 0.1 * (cost - old)
            self.outliers[threads][s] = 0
        if self.fixed:
            return
        if self.trial != 0 and threads == self.trial:
            self.trial_left -= 1
            if self.trial_left <= 0:
                before = self.recent[self.trial_from][s]
                self.end_trial(before == 0 or self.recent[self.trial][s] < before * 0.99, now)
        elif self.trial == 0 and threads > 1 and threads == self.threads and now >= self.hold_down_until_ns:
            single = self.quiet[1][s] if self.quiet[1][s] > 0 else self.single_bound(n_tokens) / unit_of(n_tokens)
            if self.outliers[threads][s] >= 3 or (single > 0 and self.recent[threads][s] > 1.3 * single):
                self.start_trial(1)

    cdef bint wants_look(self, uint64_t now) noexcept nogil:
        return not self.fixed and now >= self.next_look_ns

    cdef void look(self, double cores, uint64_t now) noexcept nogil:
        """Take note of the cores that other processes kept busy since the last look; -1 when unknown."""
        cdef int room
        self.next_look_ns = now + LOOK_NS
        self.neighbours = cores
        if self.trial != 0 or self.fixed:
            return
        room = self.room(max(cores, 0.0))  # unknown: only trials tell
        if room < self.threads:
            self.free_looks = 0
            self.crowded_looks += 1
            if self.crowded_looks >= LOOKS_TO_ACT and now >= self.hold_down_until_ns:
                self.crowded_looks = 0
                self.start_trial(room)
        elif room > self.threads:
            self.crowded_looks = 0
            self.free_looks += 1
            if self.free_looks >= LOOKS_TO_ACT and now >= self.hold_until_ns:
                self.free_looks = 0
                self.start_trial(room)
        else:
            self.crowded_looks = self.free_looks = 0

    cdef void start_trial(self, int threads) noexcept nogil:
        cdef int s
        self.trial = threads
        self.trial_from = self.threads
        self.trial_left = TRIAL_DECODES
        # What this count cost in other times says nothing of now.
        for s in range(N_SHAPES):
            self.recent[threads][s] = 0.0

    cdef void end_trial(self, bint keep, uint64_t now) noexcept nogil:
        if keep:
            self.threads = self.trial
            self.changes += 1
            self.hold_up_ns = self.hold_down_ns = MIN_HOLD_NS
        elif self.trial > self.trial_from:
            self.hold_up_ns = min(self.hold_up_ns * 2, MAX_HOLD_UP_NS)
        else:
            self.hold_down_ns = min(self.hold_down_ns * 2, MAX_HOLD_DOWN_NS)
        self.hold_until_ns = now + self.hold_up_ns
        self.hold_down_until_ns = now + self.hold_down_ns
        self.trial = 0
        self.crowded_looks = self.free_looks = 0

    # -- for tests and snapshots ----------------------------------------------------------------------

    def pick(self, int n_tokens=1):
        """Threads for the next decode, of ``n_tokens``."""
        return self.choose(n_tokens)

    def allow(self, int n_tokens):
        """Ns the next decode of ``n_tokens`` may take before it is given up; 0: any."""
        return self.allowance(n_tokens)

    def record(self, int n_tokens, int threads, ns, now, *, bint aborted=False):
        """Report a decode: its tokens, threads, duration and the time it ended, in ns."""
        if not 1 <= threads <= self.n_max or n_tokens < 1:
            raise ValueError("threads must be 1 to n_max and n_tokens at least 1")
        self.measured(n_tokens, threads, ns, aborted, now)

    def see(self, double cores, now):
        """Report the cores that other processes use (-1: unknown)."""
        self.look(cores, now)

    def wake(self, double cores, now):
        """Report the cores that others used while there was nothing to do (-1: unknown)."""
        self.awake(cores, now)

    def cost(self, int n_tokens):
        """Ns that a decode of ``n_tokens`` costs on the present threads, by the nearest shape known; 0: none is."""
        cdef int wanted = shape_of(n_tokens)
        cdef int s, away
        cdef double known
        for away in range(N_SHAPES):
            for s in (wanted - away, wanted + away):
                known = self.recent[self.threads][s] if 0 <= s < N_SHAPES else 0.0
                if known > 0:
                    if s == wanted:
                        return known * unit_of(n_tokens)
                    return known / (s + 1.0 if s < FIRST_LARGE_SHAPE else 1.0) * n_tokens
        return 0.0

    def snapshot(self):
        """Decision and costs (ns a decode up to 8 tokens, ns a token above), for GET /internal/scheduler."""
        costs = {}
        cdef int t, s
        for t in range(1, self.n_max + 1):
            known = {}
            for s in range(N_SHAPES):
                if self.recent[t][s] > 0:
                    name = str(s + 1) if s < FIRST_LARGE_SHAPE else f"<={16 << (s - FIRST_LARGE_SHAPE)}"
                    known[name] = int(self.recent[t][s])
            if known:
                costs[t] = known
        return {"threads": self.threads, "threads_max": self.n_max, "fixed": bool(self.fixed),
                "cores": self.n_cores, "changes": self.changes, "on_trial": self.trial != 0,
                "neighbour_cores": None if self.neighbours < 0 else round(self.neighbours, 2), "cost_ns": costs}
