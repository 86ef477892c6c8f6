"""What computes and tells: a context with its threads, its turn among engines, the page and the ring of records.

A Core (loop.pyx) is built in layers, one a file: Machine, Slots on it, Parking on those, and the loop itself. The
engine thread owns it: every method is called from that thread, except ``interrupt``, ``abort``, ``wake_reader``,
``drain_records`` and ``wake_fd``.
"""

cimport cython
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset

from mullama._core.arbiter cimport Arbiter
from mullama._core.context cimport Context
from mullama._core.arbiter import arbiter as default_arbiter
from mullama.errors import ModelLoadError

cdef enum:
    RING_BYTES = 1 << 20
    WARM_UP_PREFILL = 16       # tokens

# What drain_records() yields first in each tuple.
TEXT = RECORD_TEXT
FINISH = RECORD_FINISH


@cython.no_gc_clear  # the context must be freed before the model that it points into
cdef class Machine:
    """A context, and all that it takes to compute with it and to tell of it."""

    def __cinit__(self):
        self.ctx = NULL
        self.pool = NULL
        self.fault_slot = -1
        memset(&self.batch, 0, sizeof(llama_batch))
        memset(&self.counters, 0, sizeof(mullama_counters))

    def __init__(self, Model model not None, *, int n_threads=1, bint threads_fixed=False, page_path=None,
                 bint page_needed=True, Arbiter turns=None, bint quick=False, **sizes):
        """Make a Context (``sizes`` are its arguments) and all that it takes to compute with it.

        ``page_needed``: without it, a page that cannot be a file is private memory (``page_path`` is empty then).
        ``quick``: somebody waits, so that only the decodes are run that the governor cannot do without.
        ``turns`` is the arbiter that the engines of a process share. Raises ModelLoadError when it does not fit.
        """
        if not 1 <= n_threads <= 512:
            raise ModelLoadError("n_batch must be 32 to 16384, n_ctx 16 to 16777216, n_threads 1 to 512")
        self.turns = turns or default_arbiter
        self.pid = process_id()
        self.deadline.at_ns = 0
        cdef Context context = Context(model, **sizes)
        self.n_slots = context.n_slots
        self.n_batch = context.n_batch
        self.unified = context.unified
        # An idle pool sleeps at once (poll 0): a spinning one takes the event loop's core.
        cdef ggml_threadpool_params pool_params = ggml_threadpool_params_default(n_threads)
        pool_params.poll = 0
        pool_params.paused = True
        self.pool_paused = True
        with nogil:
            self.pool = pool_new(&pool_params)
        if self.pool is NULL:
            raise ModelLoadError("the thread pool could not be created")
        self.threads_set = n_threads
        self.neighbours.read()
        self.governor = Governor(n_threads, threads_fixed, self.neighbours.cores())
        self.synchronous = not llama_supports_gpu_offload()
        self.seat = self.turns.table.get().join()
        self.take_on(context)
        try:
            self.set_up(page_path, page_needed, quick)
        except BaseException:
            self.close()
            raise

    cdef void take_on(self, Context context) noexcept:
        """Compute with this context from now on."""
        self.context = context
        self.model = context.model
        self.ctx = context.ctx
        self.mem = context.mem
        self.n_ctx = context.n_ctx
        self.n_swa = context.n_swa
        self.can_trim = self.can_abort = context.can_trim
        self.can_shift = context.can_shift
        self.eog = context.eog
        self.in_charge.reset()
        self.attach(context.ctx)

    cdef void attach(self, llama_context * ctx) noexcept nogil:
        """Give a context this core's threads, deadline and thread count."""
        llama_attach_threadpool(ctx, self.pool, self.pool)
        llama_set_abort_callback(ctx, Deadline.expired, &self.deadline)
        llama_set_n_threads(ctx, self.threads_set, self.threads_set)

    cdef int set_up(self, page_path, bint page_needed, bint quick) except -1:
        """The rest of __init__, once the context exists."""
        self.batch = llama_batch_init(self.n_batch, 0, 1)
        self.slots.resize(self.n_slots)
        self.ring.reset(new Ring(RING_BYTES))
        if not self.wake.open():
            raise ModelLoadError("no file descriptor left for the wake-up")
        try:
            self.page = Page(self.n_slots, page_path)
        except OSError as error:
            if page_needed:
                raise ModelLoadError(f"the instrumentation page {page_path} cannot be made: {error.strerror}") from None
            self.page = Page(self.n_slots)
        self.warm_up(self.ctx, self.governor, quick)
        self.publish()
        return 0

    def __dealloc__(self):
        self.release()
        if self.batch.token is not NULL:
            llama_batch_free(self.batch)

    def close(self):
        """Free the context, the threads and the descriptors. Idempotent; no other method may be called after it."""
        self.release()
        if self.page is not None:
            self.page.close()

    cdef void release(self) noexcept:
        cdef size_t i
        if self.pid != process_id():
            return  # a child of the process whose threads these are
        for i in range(self.slots.size()):
            self.slots[i].end_request()
        self.ctx = NULL
        self.mem = NULL
        for context in (self.context, self.target):
            if context is not None:
                (<Context> context).release()
        self.target = None  # the first stays, freed: what it was made with may still be asked for
        self.in_charge.reset()
        if self.pool is not NULL:
            with nogil:
                pool_free(self.pool)
            self.pool = NULL
        if self.seat != 0:
            self.turns.table.get().leave(self.seat)
            self.seat = 0
        self.wake.close()

    cdef int warm_up(self, llama_context * ctx, Governor governor, bint quick) except -1:
        """Fault the weights in and give the governor its first figures: single tokens, on one thread and on all.

        One thread comes first and needs no luck; its cost is the measure that all threads must keep, also here. The
        context must be empty, and is so again.
        """
        cdef int i, n = 2 if quick else 3
        cdef llama_memory_t mem = llama_get_memory(ctx)
        cdef uint64_t start
        if not self.take_turn():
            raise ModelLoadError("loading was given up")
        start = now_ns()
        try:
            if not governor.fixed:
                for i in range(n):
                    self.try_threads(ctx, governor, 1, i, 1, i > 0)
                if not quick:
                    self.try_threads(ctx, governor, 1, n, min(WARM_UP_PREFILL, self.n_batch), True)
                llama_memory_clear(mem, False)
            for i in range(n):
                if not self.try_threads(ctx, governor, governor.n_max, i, 1, i > 0):
                    break
            llama_memory_clear(mem, False)
        finally:
            self.turns.release(self.seat, now_ns() - start)
        return 0

    cdef bint take_turn(self) noexcept:
        """Wait for the turn without the GIL, for decodes outside ``run``. False: told to stop."""
        cdef bint got
        with nogil:
            got = self.turns.acquire(self.seat, self.deadline.stop)
        return got

    cdef bint try_threads(self, llama_context * ctx, Governor governor, int threads, int pos, int n_tokens,
                          bint note) except? True:
        """Decode ``n_tokens`` from ``pos`` on as sequence 0. False: given up, since it took too long on these threads.

        The caller has the turn.
        """
        cdef int i, rc
        cdef uint64_t start, end
        cdef const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx))
        for i in range(n_tokens):
            self.batch.token[i] = max(llama_vocab_bos(vocab), 0)
            self.batch.pos[i] = pos + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = i == n_tokens - 1
        self.batch.n_tokens = n_tokens
        llama_set_n_threads(ctx, threads, threads)
        cdef uint64_t allowance = governor.allowance(n_tokens) if threads > 1 and self.can_abort else 0
        with nogil:
            start = now_ns()
            self.deadline.at_ns = start + allowance if allowance != 0 else 0
            rc = guarded_decode(ctx, self.batch, self.guard)
            llama_synchronize(ctx)
            end = now_ns()
            self.deadline.at_ns = 0
        llama_set_n_threads(ctx, self.threads_set, self.threads_set)
        if rc == 2 and allowance != 0:
            governor.measured(n_tokens, threads, end - start, True, end)
            return False
        if rc != 0:
            raise ModelLoadError(f"the first decode failed with code {rc} {self.guard.message.decode()}")
        if note:
            governor.measured(n_tokens, threads, end - start, False, end)
        return True

    cdef void resume_pool(self) noexcept nogil:
        if self.pool_paused:
            pool_resume(self.pool)
            self.pool_paused = False

    cdef double load(self) noexcept nogil:
        """Cores that neighbours kept busy since the last look (-1: unknown); the governor learns how many there are."""
        cdef double cores = self.neighbours.read()
        if self.neighbours.cores() > 0:
            self.governor.n_cores = self.neighbours.cores()
        return cores

    def pause(self):
        """Put the compute threads to sleep; ``run`` wakes them."""
        if not self.pool_paused:
            with nogil:
                pool_pause(self.pool)
            self.pool_paused = True

    cdef void site(self, uint32_t kind, int32_t slot, uint64_t handle, int64_t a, int64_t b) noexcept nogil:
        """A named call site: writes the event. Hooks attach here and nowhere else."""
        cdef mullama_event event
        event.time_ns = now_ns()
        event.handle = handle
        event.kind = kind
        event.slot = slot
        event.a = a
        event.b = b
        self.page.put_event(self.counters.events, event)
        self.counters.events += 1

    cdef void publish(self) noexcept nogil:
        """Bring the page up to date: gauges, counters and the rows of open slots."""
        cdef int i
        cdef uint64_t running = 0, retained = 0, cells = 0
        for i in range(self.n_slots):
            cells += self.slots[i].n_past
            if self.slots[i].open():
                running += 1
            elif self.slots[i].state == MULLAMA_SLOT_RETAINED:
                retained += 1
            if self.slots[i].open() or self.slots[i].row.state != self.slots[i].state \
                    or self.slots[i].row.cells != <uint32_t> self.slots[i].n_past or self.slots[i].row.slot != i:
                self.slots[i].row.state = self.slots[i].state
                self.slots[i].row.slot = i
                self.slots[i].row.cells = self.slots[i].n_past
                self.page.put_row(i, self.slots[i].row)
        self.counters.running = running
        self.counters.retained = retained
        self.counters.cells_used = cells
        self.counters.waiting = self.waiting
        self.counters.threads = self.threads_set
        self.counters.thread_changes = self.governor.changes
        self.counters.graphs_reused = self.reused_before
        if self.ctx is not NULL:  # else it has no weights for now (vacancy.pyx)
            self.counters.graphs_reused += llama_perf_context(self.ctx).n_reused
        self.counters.heartbeat_ns = now_ns()
        self.page.put_counters(self.counters)

    def note_plan(self, uint64_t plan_ns, uint64_t waiting, int n_decode, int n_prefill):
        """Account a plan the scheduler made, and the length of the admission queue."""
        self.counters.plans += 1
        self.counters.plan_ns += plan_ns
        self.waiting = waiting
        self.site(MULLAMA_SITE_PLAN, -1, 0, n_decode, n_prefill)

    def refresh_page(self, uint64_t waiting):
        """Bring the page up to date between runs: what nobody computes for would stand in it as it was."""
        self.waiting = waiting
        self.publish()

    def note_idle(self, uint64_t ns, uint64_t waiting):
        """Account a wait for commands; keeps the heartbeat fresh."""
        self.waiting = waiting
        self.busy_since = 0
        self.site(MULLAMA_SITE_IDLE, -1, 0, ns, 0)
        self.publish()

    cdef bint push(self, const RecordHeader & header, const void * body, uint32_t n, const void * tail,
                   uint32_t n_tail) noexcept nogil:
        """Put a record into the ring; a full ring stalls the engine (counted), it never drops. False: told to stop."""
        cdef uint64_t start
        self.pushed = True
        if self.ring.get().push(header, body, n, tail, n_tail):
            return True
        start = now_ns()
        self.counters.ring_stalls += 1
        while not self.ring.get().push(header, body, n, tail, n_tail):
            if self.deadline.stop.get():
                return False
            self.wake.signal()
            sleep_us(100)
        self.counters.ring_stall_ns += now_ns() - start
        self.site(MULLAMA_SITE_RING_STALL, -1, header.handle, now_ns() - start, 0)
        return True

    cdef void flush_text(self, Slot * s, int n_tokens) noexcept nogil:
        cdef RecordHeader header
        header.kind = RECORD_TEXT
        header.n_tokens = n_tokens
        header.handle = s.handle
        # Records are padded to 8 bytes, so the text's own length goes first.
        cdef uint32_t size = <uint32_t> s.pending_text.size()
        self.push(header, &size, sizeof(size), s.pending_text.data(), size)
        s.pending_text.clear()

    def wake_fd(self):
        """File descriptor that becomes readable when records wait."""
        return self.wake.read_fd

    def drain_records(self, int limit=4096):
        """Take records off the ring; call from one reader at a time. Returns a list of tuples:

        (TEXT, handle, text, n_tokens) and (FINISH, handle, reason, stop_index, error, row as bytes).
        """
        self.wake.clear()
        out = []
        cdef const RecordHeader * header
        cdef const char * body
        cdef const FinishBody * finish
        cdef Py_ssize_t n
        while len(out) < limit:
            header = self.ring.get().peek()
            if header is NULL:
                break
            body = <const char *> header + sizeof(RecordHeader)
            if header.kind == RECORD_TEXT:
                n = (<const uint32_t *> body)[0]
                out.append((TEXT, header.handle, PyUnicode_DecodeUTF8(body + 4, n, "replace"), header.n_tokens))
            else:
                finish = <const FinishBody *> body
                out.append((FINISH, header.handle, finish.reason, finish.stop_index, finish.error,
                            (body + sizeof(FinishBody))[:sizeof(mullama_row)]))
            self.ring.get().pop()
        if len(out) == limit:
            self.wake.signal()
        return out

    def wake_reader(self):
        """Make ``wake_fd`` readable. Any thread."""
        self.wake.signal()

    def interrupt(self):
        """Make ``run`` return after the current step. Any thread."""
        self.interrupted.set(1)

    def rearm(self):
        """Forget an interrupt. Call before looking for commands, so that one that comes meanwhile is not lost."""
        self.interrupted.set(0)

    def abort(self):
        """Give up the running decode and every stall; ``run`` returns at once and must not be called again."""
        self.deadline.stop.set(1)
        self.interrupted.set(1)

    cdef int check_slot(self, int slot) except -1:
        if self.ctx is NULL:
            raise RuntimeError("this core was closed, or has no weights now")
        if not 0 <= slot < self.n_slots:
            raise ValueError(f"slot {slot} is out of range (0 to {self.n_slots - 1})")
        return 0

    def steps_done(self):
        """Steps since the core was made."""
        return self.counters.steps

    def kv_costs(self):
        """Measured ns a byte of KV ``save``d, ``restore``d and ``copy``-ed (see Cells); 0 before the first one."""
        cdef mullama_counters * c = &self.counters
        return {
            "save": <double> c.kv_store_ns / c.kv_store_bytes if c.kv_store_bytes else 0.0,
            "restore": <double> c.kv_restore_ns / c.kv_restore_bytes if c.kv_restore_bytes else 0.0,
            "copy": <double> c.kv_copy_ns / c.kv_copy_bytes if c.kv_copy_bytes else 0.0,
        }

    @property
    def is_vacant(self):
        """Whether it has no context, for now (vacancy.pyx) or for good. Any thread."""
        return self.ctx is NULL

    def counters_dict(self):
        """The counters as the engine thread has them now."""
        self.publish()
        from mullama.abi import Reader, as_dict
        return as_dict(Reader(self.page.buffer()).counters())

    def ring_usage(self):
        """(bytes used, capacity) of the token ring."""
        return self.ring.get().used(), self.ring.get().capacity()

    def memory(self):
        """Bytes allocated, by part and kind of buffer (see Context.memory)."""
        self.check_slot(0)
        return self.context.memory()

    def staging_bytes(self):
        """Host memory in which states wait while they move from slot to slot; it is kept for the next time."""
        return self.state_a.size() + self.state_b.size()  # what is reserved beyond that was never touched
