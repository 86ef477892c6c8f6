"""The hot loop: fill a batch, decode, sample, commit text and KV bookkeeping, again, without the GIL.

A Core is one llama.cpp context with its slots. Slot i is llama.cpp's sequence id i. The engine thread owns it: every
method is called from that thread, except ``interrupt``, ``abort``, ``wake_reader``, ``drain_records`` and ``wake_fd``.

The law of the KV bookkeeping: cells [0, n_past) of a slot hold the KV of its tokens [0, n_past). While a slot decodes,
tokens has one more entry: the token that was sampled last and is computed in the next step.

    tokens   |0 ....... prompt ....... n_prompt)[ ... generated ... | last)
    in KV    |0 .......................................... n_past)

A slot in prefill computes until n_past reaches the end of tokens, and samples there. After a preemption whose KV was
given up, tokens holds what had been generated as well.

Every llama_decode call is one ubatch of one shape: single tokens of a gap-free range of slots, or one prompt chunk.
All of its rows have one set of LoRA adapters, because llama.cpp applies adapters to the context. A step goes through
the sets in turn and begins with the one that is in charge already.
"""

cimport cython
from cython.operator cimport dereference
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.math cimport NAN
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset

from mullama._core.adapters cimport LoraSetPtr, build_set, same_set, use_set
from mullama._core.arbiter cimport Arbiter
from mullama._core.context cimport Context
from mullama._core.sampling cimport Chain, build_chain
from mullama._core.arbiter import arbiter as default_arbiter
from mullama.errors import ComputeFailed, InvalidRequest, ModelLoadError

cdef enum:
    RING_BYTES = 1 << 20
    MAX_PIECE = 512
    WARM_UP_PREFILL = 16       # tokens

# A shorter idle time says too little of what others do.
cdef uint64_t IDLE_LOOK_NS = 200 * 1000 * 1000

# What drain_records() yields first in each tuple.
TEXT = RECORD_TEXT
FINISH = RECORD_FINISH


cdef class Parked:
    """A preempted sequence: all of its slot, and its KV when that was saved. Made by ``Core.preempt``."""

    def __dealloc__(self):
        self.slot.end_request()

    @property
    def n_bytes(self):
        """Host memory its saved KV takes."""
        return self.state.size()

    def tokens(self):
        """Its prompt and what it generated, as a list."""
        return list(self.slot.tokens)

    def left(self):
        """Tokens to compute before it decodes, when no prefix is found: 0 when its KV was saved while it decoded."""
        cdef int n = <int> self.slot.tokens.size() - self.slot.n_past
        return 0 if self.saved and self.slot.n_generated > 0 and n == 1 else n


@cython.no_gc_clear  # the context must be freed before the model that it points into
cdef class Core:

    def __cinit__(self):
        self.ctx = NULL
        self.pool = NULL
        self.fault_slot = -1
        memset(&self.batch, 0, sizeof(llama_batch))
        memset(&self.counters, 0, sizeof(mullama_counters))

    def __init__(self, Model model not None, *, int n_threads=1, bint threads_fixed=False, page_path=None,
                 Arbiter turns=None, bint quick=False, **sizes):
        """Make a Context (``sizes`` are its arguments) and all that it takes to compute with it.

        ``quick``: somebody waits, so that only the decodes are run that the governor cannot do without.
        ``turns`` is the arbiter that the engines of a process share. Raises ModelLoadError when it does not fit.
        """
        if not 1 <= n_threads <= 512:
            raise ModelLoadError("n_batch must be 32 to 16384, n_ctx 16 to 16777216, n_threads 1 to 512")
        self.turns = turns or default_arbiter
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
        self.governor = Governor(n_threads, threads_fixed)
        self.synchronous = not llama_supports_gpu_offload()
        self.seat = self.turns.table.get().join()
        self.take_on(context)
        try:
            self.set_up(page_path, quick)
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

    cdef int set_up(self, page_path, bint quick) except -1:
        """The rest of __init__, once the context exists."""
        self.batch = llama_batch_init(self.n_batch, 0, 1)
        self.slots.resize(self.n_slots)
        self.ahead.resize(self.n_slots, 0)
        self.away.resize(self.n_slots, -1)
        self.ring.reset(new Ring(RING_BYTES))
        if not self.wake.open():
            raise ModelLoadError("no file descriptor left for the wake-up")
        try:
            self.page = Page(self.n_slots, page_path)
        except OSError as error:
            raise ModelLoadError(f"the instrumentation page {page_path} cannot be made: {error.strerror}") from None
        self.neighbours.read()
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
        for i in range(self.slots.size()):
            self.slots[i].end_request()
        self.ctx = NULL
        self.mem = NULL
        for context in (self.context, self.target, self.source):
            if context is not None:
                (<Context> context).release()
        self.context = self.target = self.source = None
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

    # -- instrumentation ------------------------------------------------------------------------------

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

    def note_idle(self, uint64_t ns, uint64_t waiting):
        """Account a wait for commands; keeps the heartbeat fresh."""
        self.waiting = waiting
        self.busy_since = 0
        self.site(MULLAMA_SITE_IDLE, -1, 0, ns, 0)
        self.publish()

    # -- records: from the engine thread to its one reader ----------------------------------------------

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

    # -- control from other threads ----------------------------------------------------------------------

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

    # -- slots ---------------------------------------------------------------------------------------------

    cdef int check_slot(self, int slot) except -1:
        if self.ctx is NULL:
            raise RuntimeError("this core was closed, or has no weights now")
        if not 0 <= slot < self.n_slots:
            raise ValueError(f"slot {slot} is out of range (0 to {self.n_slots - 1})")
        return 0

    def states(self):
        """State number of every slot (see abi.SLOT_STATES)."""
        return [self.slots[i].state for i in range(self.n_slots)]

    def progress(self):
        """(state, tokens generated, tokens in the KV cache) of every slot."""
        return [(self.slots[i].state, self.slots[i].n_generated, self.slots[i].n_past) for i in range(self.n_slots)]

    def retained(self, int slot):
        """(tokens, step of last use) of the prefix a slot retains; (0, 0) when it retains none."""
        self.check_slot(slot)
        if self.slots[slot].state != MULLAMA_SLOT_RETAINED:
            return 0, 0
        return self.slots[slot].n_past, self.slots[slot].last_used

    def gap_cost_ns(self, int slot):
        """What a gap in the decoding slots will cost at most while the sequence in ``slot`` runs, in ns.

        Each step pays for one more pass over the weights, estimated as half of a one-token decode. The look-ahead is
        bounded: a sequence may end at any token.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if self.unified:
            return 0.0
        steps = min(max(s.max_tokens - s.n_generated, 0), 64)
        return 0.5 * self.governor.expected(1, self.governor.threads) * steps

    def slot_info(self, int slot):
        """(state, handle, n_past, tokens, last_used) of a slot; tokens as a list."""
        self.check_slot(slot)
        return (self.slots[slot].state, self.slots[slot].handle, self.slots[slot].n_past,
                list(self.slots[slot].tokens), self.slots[slot].last_used)

    def packed(self, int slot):
        """The tokens whose KV a slot holds, as the bytes of 32-bit integers."""
        self.check_slot(slot)
        return (<const char *> self.slots[slot].tokens.data())[:self.slots[slot].n_past * sizeof(llama_token)]

    def slot_fill(self, int slot):
        """(tokens in the KV cache, tokens known) of a slot."""
        self.check_slot(slot)
        return self.slots[slot].n_past, <int> self.slots[slot].tokens.size()

    def steps_done(self):
        """Steps since the core was made."""
        return self.counters.steps

    @property
    def kv_cells(self):
        """Tokens that all slots together may hold."""
        self.check_slot(0)
        return <int> llama_n_ctx(self.ctx) if self.unified else self.n_slots * self.n_ctx

    def kv_costs(self):
        """Measured ns a byte of KV ``save``d, ``restore``d and ``copy``-ed (see Cells); 0 before the first one."""
        cdef mullama_counters * c = &self.counters
        return {
            "save": <double> c.kv_store_ns / c.kv_store_bytes if c.kv_store_bytes else 0.0,
            "restore": <double> c.kv_restore_ns / c.kv_restore_bytes if c.kv_restore_bytes else 0.0,
            "copy": <double> c.kv_copy_ns / c.kv_copy_bytes if c.kv_copy_bytes else 0.0,
        }

    def parked_bytes(self):
        """Host memory of the saved KV of preempted sequences."""
        return self.counters.parked_bytes

    def match(self, prompt):
        """The retained slot whose prefix saves most of ``prompt``, and the number of tokens it saves.

        (-1, 0) when none does. At least one token of the prompt is always left to compute. Sliding-window caches only
        serve a prefix whose window is still whole, recurrent ones only a whole retained sequence.
        """
        cdef vector[llama_token] tokens = prompt
        cdef int best = -1, best_n = 0, i, n, limit
        cdef llama_pos pos_min
        cdef Slot * s
        for i in range(self.n_slots):
            s = &self.slots[i]
            if s.state != MULLAMA_SLOT_RETAINED:
                continue
            limit = min(s.n_past, <int> tokens.size() - 1)
            n = 0
            while n < limit and s.tokens[n] == tokens[n]:
                n += 1
            if n < s.n_past:
                if not self.can_trim:
                    n = 0
                elif self.n_swa > 0:
                    pos_min = llama_memory_seq_pos_min(self.mem, i)
                    if pos_min > 0 and pos_min >= max(0, n - self.n_swa):
                        n = 0
            if n > best_n:
                best, best_n = i, n
        return best, best_n

    def open(self, int slot, uint64_t handle, prompt, params, *, int reuse=0, int source=MULLAMA_KV_IN_PLACE,
             int evicted=0, uint64_t arrival_ns=0, int priority=0, int shift_keep=-1, adapters=()):
        """Start a request in a free or retained slot, keeping ``reuse`` tokens of what the slot retains.

        For its profile: ``source``, where they came from (abi.KV_SOURCES), and ``evicted``, the cached tokens of others
        that were given up for it. ``shift_keep`` of 0 or more: when the context is full, go on without half of
        the tokens that come after so many at the start. ``adapters``: pairs of Adapter and scale that compute it; what
        is reused must have been computed with the same. Raises InvalidRequest for numbers out of range, and leaves the
        slot as it was.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.open():
            raise RuntimeError(f"slot {slot} is in use")
        cdef vector[llama_token] tokens = prompt
        cdef vector[llama_logit_bias] bias
        cdef vector[string] stops
        cdef size_t i
        if tokens.empty() or <int> tokens.size() >= self.n_ctx + 1:
            raise InvalidRequest(f"a prompt must have 1 to {self.n_ctx} tokens, got {tokens.size()}", param="prompt")
        for i in range(tokens.size()):
            if not 0 <= tokens[i] < self.model.n_vocab:
                raise InvalidRequest(f"token id {tokens[i]} is outside the vocabulary (0 to {self.model.n_vocab - 1})",
                                     param="prompt")
        if not 0 <= reuse < <int> tokens.size() or reuse > s.n_past:
            raise ValueError("reuse must leave one token to compute and be no more than the slot retains")
        for i in range(reuse):
            if s.tokens[i] != tokens[i]:
                raise ValueError("the retained tokens are not a prefix of the prompt")
        if shift_keep >= 0 and not self.can_shift:
            raise InvalidRequest("this model's context cannot be shifted", param="context_policy")
        for stop in params.stop:
            stops.push_back(stop.encode("utf-8", "surrogatepass"))
        cdef LoraSetPtr lora = build_set(self.model, adapters)
        cdef Chain chain = build_chain(self.model, params, self.n_ctx, bias)
        reuse = self.keep_head(slot, reuse)
        s.n_past = reuse
        s.tokens.swap(tokens)
        s.state = MULLAMA_SLOT_PREFILL
        s.handle = handle
        s.n_prompt = <int32_t> s.tokens.size()
        s.n_generated = 0
        s.shift_keep = min(shift_keep, s.n_prompt) if shift_keep >= 0 else -1
        s.shifted = 0
        room = max(1, self.n_ctx - s.n_prompt) if s.shift_keep < 0 else 1 << 30
        s.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        s.min_tokens = min(params.min_tokens, s.max_tokens)
        s.ignore_eos = params.ignore_eos
        s.poisoned = False
        s.lora = lora
        s.chain = chain.ptr
        s.greedy = chain.greedy
        s.top_k_first = chain.top_k_first
        s.bias.swap(bias)
        s.gate.stops.swap(stops)
        if s.chain is not NULL:
            for i in range(s.tokens.size()):
                llama_sampler_accept(s.chain, s.tokens[i])
        memset(&s.row, 0, sizeof(mullama_row))
        s.row.handle = handle
        s.row.arrival_ns = arrival_ns
        s.row.opened_ns = now_ns()
        s.row.prompt_tokens = s.n_prompt
        s.row.kv_cache_hit = reuse
        s.row.kv_cache_miss = s.n_prompt - reuse
        s.row.kv_cache_evict = evicted
        s.row.kv_source = source if reuse > 0 else MULLAMA_KV_NONE
        s.row.priority = priority
        self.counters.opened += 1
        self.counters.kv_hit_tokens += reuse
        self.counters.kv_miss_tokens += s.n_prompt - reuse
        self.site(MULLAMA_SITE_OPEN, slot, handle, s.n_prompt, reuse)

    def cancel(self, int slot):
        """End the request in a slot (finish record CANCELLED) and free its cells. Harmless when it has ended."""
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.state == MULLAMA_SLOT_PREFILL or s.state == MULLAMA_SLOT_DECODE:
            with nogil:  # a full ring waits for its reader, who needs the GIL
                self.finish(s, slot, MULLAMA_FINISH_CANCELLED, -1, 0)
                self.wake.signal()
        if s.state == MULLAMA_SLOT_DONE:
            self.clear_slot(slot)
            self.publish()

    def close_slot(self, int slot, *, bint retain=True):
        """After a finish: keep the slot's KV as a prefix for later prompts, or free it. Returns tokens retained."""
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.state != MULLAMA_SLOT_DONE:
            raise RuntimeError(f"slot {slot} has no finished request")
        cdef uint64_t handle = s.handle
        if retain and not s.poisoned and s.shifted == 0 and s.n_past > 0:
            s.tokens.resize(s.n_past)
            s.end_request()
            s.state = MULLAMA_SLOT_RETAINED
            s.last_used = self.counters.steps
        else:
            self.clear_slot(slot)
        self.site(MULLAMA_SITE_CLOSE, slot, handle, s.n_past, 0)
        return s.n_past

    cdef void clear_slot(self, int slot) noexcept nogil:
        cdef Slot * s = &self.slots[slot]
        self.cut(slot, 0)
        s.tokens.clear()
        s.n_past = 0
        s.end_request()
        s.state = MULLAMA_SLOT_FREE

    # -- the KV of a slot while the weights change (swap.pyx) ------------------------------------------------

    cdef bint cut(self, int slot, int n) noexcept nogil:
        """Remove the KV of a slot from position ``n`` on, wherever it is. False where llama.cpp cannot."""
        if self.target is not None and self.ahead[slot] > n:
            llama_memory_seq_rm(self.target.mem, slot, n if n > 0 else -1, -1)
            self.ahead[slot] = n
        if self.away[slot] >= 0:
            if n > self.away[slot]:
                return True  # what is removed never came over
            self.away[slot] = -1
        return llama_memory_seq_rm(self.mem, slot, n if n > 0 else -1, -1)

    cdef int keep_head(self, int slot, int n) noexcept:
        """Keep the KV of the first ``n`` tokens of a slot, or none where that cannot be done. Returns those kept."""
        cdef Slot * s = &self.slots[slot]
        if n > 0 and (not self.bring(slot, n) or (s.n_past > n and not self.cut(slot, n))):
            n = 0
        if n == 0:
            self.cut(slot, 0)
        s.n_past = n
        return n

    cdef bint bring(self, int slot, int n) noexcept nogil:
        """See that the first ``n`` tokens' KV of a slot is in the context in charge, where it was left behind.

        False: that failed, and the slot has no KV any more.
        """
        cdef int at = self.away[slot]
        if at < 0 or n <= at:
            return True
        if not self.carry_rows(self.source.ctx, self.ctx, slot, at, n):
            self.cut(slot, 0)
            return False
        self.away[slot] = n if n < self.slots[slot].n_past else -1
        return True

    cdef bint carry_rows(self, llama_context * src, llama_context * dst, int slot, int p0, int p1) noexcept nogil:
        """Copy the KV of [p0, p1) of a slot from one context to another. False: one of them refused."""
        cdef size_t token_bytes = self.context.token_bytes
        if p0 >= p1:
            return True
        if not guarded_carry_rows(src, dst, slot, p0, p1, self.guard):
            return False
        self.counters.weight_swap_bytes += (p1 - p0) * token_bytes
        return True

    def evict(self, int slot, int lost=-1):
        """Drop a retained prefix. Returns the number of tokens (cells) freed.

        ``lost``: how many of them are cached nowhere else, for the counter of evicted tokens; -1: all.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        cdef int n = s.n_past
        if s.state != MULLAMA_SLOT_RETAINED:
            return 0
        self.clear_slot(slot)
        self.counters.kv_evict_tokens += n if lost < 0 else lost
        self.site(MULLAMA_SITE_EVICT, slot, 0, n, 0)
        return n

    def note_evicted(self, int tokens):
        """Count cached tokens that were given up elsewhere than in a slot."""
        self.counters.kv_evict_tokens += tokens

    def exchange(self, int a, int b):
        """Swap the contents of two slots, whatever they hold; KV is copied bit by bit. Returns bytes moved.

        Running slots have to be a gap-free range of the lowest ids for a decode to be one ubatch.
        Raises ComputeFailed when llama.cpp does not take the state back; the sequences involved are then lost.
        """
        self.check_slot(a)
        self.check_slot(b)
        if a == b:
            return 0
        cdef uint64_t start = now_ns()
        cdef size_t n_a = 0, n_b = 0
        cdef bint ok = True
        cdef int i
        with nogil:
            ok = self.bring(a, self.slots[a].n_past) and self.bring(b, self.slots[b].n_past)
            if self.slots[a].n_past > 0:
                n_a = llama_state_seq_get_size(self.ctx, a)
                if self.state_a.size() < n_a:
                    self.state_a.resize(n_a)
                n_a = llama_state_seq_get_data(self.ctx, self.state_a.data(), n_a, a)
                ok = ok and n_a > 0
            if self.slots[b].n_past > 0:
                n_b = llama_state_seq_get_size(self.ctx, b)
                if self.state_b.size() < n_b:
                    self.state_b.resize(n_b)
                n_b = llama_state_seq_get_data(self.ctx, self.state_b.data(), n_b, b)
                ok = ok and n_b > 0
            self.cut(a, 0)
            self.cut(b, 0)
            if n_a > 0:
                ok = llama_state_seq_set_data(self.ctx, self.state_a.data(), n_a, b) == n_a and ok
            if n_b > 0:
                ok = llama_state_seq_set_data(self.ctx, self.state_b.data(), n_b, a) == n_b and ok
        swap_slots(self.slots[a], self.slots[b])
        if not ok:
            for i in (a, b):
                with nogil:
                    self.lose(i)
            raise ComputeFailed("a sequence's KV could not be moved to another slot")
        for i in (a, b):
            if self.slots[i].open():
                self.slots[i].row.moves += 1
        self.counters.kv_moves += 1
        self.counters.kv_move_bytes += n_a + n_b
        self.counters.kv_move_ns += now_ns() - start
        self.site(MULLAMA_SITE_MOVE, a, self.slots[a].handle, b, n_a + n_b)
        return n_a + n_b

    cdef void lose(self, int slot) noexcept nogil:
        """The KV of a slot is gone: its request fails, a retained prefix is forgotten."""
        cdef Slot * s = &self.slots[slot]
        if s.state == MULLAMA_SLOT_PREFILL or s.state == MULLAMA_SLOT_DECODE:
            s.poisoned = True
            self.finish(s, slot, MULLAMA_FINISH_ERROR, -1, CORE_NO_KV)
            self.wake.signal()
        elif s.state == MULLAMA_SLOT_RETAINED:
            self.clear_slot(slot)

    # -- adapters ------------------------------------------------------------------------------------------

    def set_adapters(self, int slot, adapters):
        """Let a running sequence go on with these (Adapter, scale), after its model was changed."""
        self.check_slot(slot)
        if not self.slots[slot].open():
            raise RuntimeError(f"slot {slot} has no running sequence")
        cdef LoraSetPtr lora = build_set(self.model, adapters)
        self.slots[slot].lora = lora

    def set_parked_adapters(self, Parked parked not None, adapters):
        """The same for a preempted sequence."""
        cdef LoraSetPtr lora = build_set(self.model, adapters)
        parked.slot.lora = lora

    def drop_adapters(self):
        """See that the context holds no adapter, so that one that no sequence uses can be closed."""
        self.check_slot(0)
        cdef LoraSetPtr none
        if self.in_charge.get() is not NULL:
            use_set(self.ctx, none)
            self.in_charge.reset()

    cdef bint put_in_charge(self, int slot) noexcept nogil:
        """See that the context computes with the adapters of a slot. False: one of them is gone."""
        if same_set(self.in_charge, self.slots[slot].lora):
            return True
        if not use_set(self.ctx, self.slots[slot].lora):
            return False
        self.in_charge = self.slots[slot].lora
        self.counters.adapter_switches += 1
        return True

    cdef void group_plan(self) noexcept nogil:
        """Bring slots with equal sets together, in the order in which the sets come first, and find the ranges."""
        cdef size_t i, j, n = self.plan_decode.size()
        cdef int32_t slot, n_tokens
        for i in range(1, n):
            if same_set(self.slots[self.plan_decode[i]].lora, self.slots[self.plan_decode[i - 1]].lora):
                continue
            for j in range(i + 1, n):
                if same_set(self.slots[self.plan_decode[j]].lora, self.slots[self.plan_decode[i - 1]].lora):
                    slot = self.plan_decode[j]
                    self.plan_decode.erase(self.plan_decode.begin() + j)
                    self.plan_decode.insert(self.plan_decode.begin() + i, slot)
                    break
        self.plan_ranges.clear()
        for i in range(n):
            if i == 0 or not same_set(self.slots[self.plan_decode[i]].lora, self.slots[self.plan_decode[i - 1]].lora) \
                    or not (self.unified or self.plan_decode[i] == self.plan_decode[i - 1] + 1):
                self.plan_ranges.push_back(i)
        if n > 0:
            self.plan_ranges.push_back(n)
        n = self.plan_prefill.size()
        for i in range(1, n):
            if same_set(self.slots[self.plan_prefill[i]].lora, self.slots[self.plan_prefill[i - 1]].lora):
                continue
            for j in range(i + 1, n):
                if same_set(self.slots[self.plan_prefill[j]].lora, self.slots[self.plan_prefill[i - 1]].lora):
                    slot, n_tokens = self.plan_prefill[j], self.plan_chunk[j]
                    self.plan_prefill.erase(self.plan_prefill.begin() + j)
                    self.plan_chunk.erase(self.plan_chunk.begin() + j)
                    self.plan_prefill.insert(self.plan_prefill.begin() + i, slot)
                    self.plan_chunk.insert(self.plan_chunk.begin() + i, n_tokens)
                    break

    cdef size_t first_range(self) noexcept nogil:
        """The first range of the set that is in charge; 0 when there is none."""
        cdef size_t i
        for i in range(self.plan_ranges.size() - 1):
            if same_set(self.slots[self.plan_decode[self.plan_ranges[i]]].lora, self.in_charge):
                return i
        return 0

    cdef size_t first_chunk(self) noexcept nogil:
        """The same among the prompt chunks."""
        cdef size_t i
        for i in range(self.plan_prefill.size()):
            if same_set(self.slots[self.plan_prefill[i]].lora, self.in_charge):
                return i
        return 0

    # -- preemption ----------------------------------------------------------------------------------------

    def preempt(self, int slot, *, bint save):
        """Take a running sequence out of its slot, sampler, held-back text and all. Returns it Parked.

        ``save``: its KV goes to host memory, for ``resume`` to restore bit by bit. Otherwise (and when llama.cpp does
        not hand the state out) the slot retains it as a prefix like any other, and what is gone when the sequence
        comes back is computed again.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.state != MULLAMA_SLOT_PREFILL and s.state != MULLAMA_SLOT_DECODE:
            raise RuntimeError(f"slot {slot} has no running sequence")
        cdef uint64_t start = now_ns()
        cdef Parked parked = Parked.__new__(Parked)
        cdef size_t n = 0
        cdef int n_past = s.n_past
        parked.model = self.model
        if save and n_past > 0:
            with nogil:
                n = llama_state_seq_get_size(self.ctx, slot)
                parked.state.resize(n)
                n = llama_state_seq_get_data(self.ctx, parked.state.data(), n, slot)
            parked.saved = n > 0
        if not parked.saved:
            parked.state.clear()
        parked.state.shrink_to_fit()
        parked.since_ns = start
        parked.computed = n_past
        s.row.preemptions += 1
        swap_slots(self.slots[slot], parked.slot)
        # The page's row still shows the sequence that left: no slot is -1, so the next publish replaces it.
        s.row.slot = -1
        if not parked.saved:
            parked.slot.n_past = 0
        if not parked.saved and n_past > 0 and not parked.slot.poisoned and parked.slot.shifted == 0:
            s.tokens.assign(parked.slot.tokens.begin(), parked.slot.tokens.begin() + n_past)
            s.n_past = n_past
            s.state = MULLAMA_SLOT_RETAINED
            s.last_used = self.counters.steps
        else:
            self.clear_slot(slot)
        self.counters.preemptions += 1
        self.counters.parked += 1
        self.counters.parked_bytes += n
        if parked.saved:
            self.counters.swap_bytes += n
            self.counters.swap_ns += now_ns() - start
        self.site(MULLAMA_SITE_PREEMPT, slot, parked.slot.handle, n_past, n)
        return parked

    def resume(self, int slot, Parked parked not None, *, int reuse=0, int evicted=0):
        """Put a preempted sequence into a free or retained slot, where it goes on as if nothing had happened.

        ``reuse``: tokens of what the slot retains that are its own (see match), when its KV was not saved;
        ``evicted``: cached tokens given up for it. ``parked`` is empty afterwards.
        """
        self.check_slot(slot)
        cdef Slot * s = &self.slots[slot]
        if s.open():
            raise RuntimeError(f"slot {slot} is in use")
        if parked.slot.handle == 0:
            raise RuntimeError("this sequence has been resumed or ended already")
        cdef uint64_t start = now_ns()
        cdef size_t n = parked.state.size()
        cdef int i
        cdef bint restored = False
        if not 0 <= reuse < <int> parked.slot.tokens.size() or reuse > s.n_past:
            raise ValueError("reuse must leave one token to compute and be no more than the slot retains")
        for i in range(reuse):
            if s.tokens[i] != parked.slot.tokens[i]:
                raise ValueError("the retained tokens are not a prefix of the sequence")
        if parked.saved:
            reuse = parked.slot.n_past
            self.keep_head(slot, 0)
            with nogil:
                restored = llama_state_seq_set_data(self.ctx, parked.state.data(), n, slot) == n
            if not restored:
                self.cut(slot, 0)
                reuse = 0
            self.counters.swap_bytes += n
            self.counters.swap_ns += now_ns() - start
        else:
            reuse = self.keep_head(slot, reuse)
        swap_slots(self.slots[slot], parked.slot)
        parked.slot.end_request()
        parked.slot.tokens.clear()
        s.n_past = reuse
        s.row.slot = slot
        s.row.preempted_ns += start - parked.since_ns
        s.row.recomputed += max(parked.computed - reuse, 0)
        s.row.kv_cache_evict += evicted
        s.state = MULLAMA_SLOT_DECODE if s.n_generated > 0 and reuse == <int> s.tokens.size() - 1 \
            else MULLAMA_SLOT_PREFILL
        self.forget(parked)
        self.site(MULLAMA_SITE_RESUME, slot, s.handle, reuse, n)

    def cancel_parked(self, Parked parked not None):
        """End a preempted sequence (finish record CANCELLED). Harmless when it was resumed or has ended."""
        if parked.slot.handle == 0:
            return
        parked.slot.row.preempted_ns += now_ns() - parked.since_ns
        parked.slot.n_past = 0
        with nogil:
            self.finish(&parked.slot, -1, MULLAMA_FINISH_CANCELLED, -1, 0)
            self.wake.signal()
        parked.slot.end_request()
        self.forget(parked)
        self.publish()

    def let_go(self, Parked parked not None):
        """Give up a preempted sequence whose KV was not saved: another core takes it in."""
        if parked.saved or parked.slot.handle == 0:
            raise ValueError("only a preempted sequence without saved KV can change its core")
        self.counters.parked -= 1

    def take_in(self, Parked parked not None, uint64_t handle, tokens=None, params=None, adapters=()):
        """Know a preempted sequence that another core has let go by ``handle``; ``resume`` goes on with it.

        Where the other model's token ids mean something else, ``tokens`` are the sequence's text in this vocabulary
        and ``params`` the request's sampling parameters, of which the sampler is made anew. ``adapters`` are this
        core's. Raises InvalidRequest when it does not fit; then the sequence is as it was.
        """
        cdef vector[llama_token] known = parked.slot.tokens if tokens is None else tokens
        cdef vector[llama_logit_bias] bias
        cdef Chain chain
        cdef LoraSetPtr lora = build_set(self.model, adapters)
        cdef size_t i
        if known.empty() or <int> known.size() > self.n_ctx:
            raise InvalidRequest(f"{known.size()} tokens do not fit this model's context of {self.n_ctx}")
        for i in range(known.size()):
            self.model.check_token(known[i])
        if tokens is not None:
            chain = build_chain(self.model, params, self.n_ctx, bias)
            if parked.slot.chain is not NULL:
                llama_sampler_free(parked.slot.chain)
            parked.slot.chain = chain.ptr
            parked.slot.greedy = chain.greedy
            parked.slot.top_k_first = chain.top_k_first
            parked.slot.bias.swap(bias)
            parked.slot.tokens.swap(known)
            if chain.ptr is not NULL:
                for i in range(parked.slot.tokens.size()):
                    llama_sampler_accept(chain.ptr, parked.slot.tokens[i])
        parked.slot.max_tokens = min(
            parked.slot.max_tokens,
            parked.slot.n_generated + max(1, self.n_ctx - <int> parked.slot.tokens.size() + 1))
        parked.slot.handle = parked.slot.row.handle = handle
        parked.computed = 0
        parked.model = self.model
        parked.slot.lora = lora
        self.counters.parked += 1

    def drop_saved(self, Parked parked not None):
        """Give up the saved KV of a preempted sequence; it is computed again when the sequence comes back."""
        if parked.saved:
            self.counters.parked_bytes -= parked.state.size()
            parked.state.clear()
            parked.state.shrink_to_fit()
            parked.saved = False
            parked.slot.n_past = 0

    cdef void forget(self, Parked parked) noexcept:
        """A preempted sequence has left host memory."""
        self.counters.parked -= 1
        self.counters.parked_bytes -= parked.state.size()
        parked.state.clear()
        parked.state.shrink_to_fit()
        parked.saved = False

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self, decode, prefill, max_steps=0, until_ns=0):
        """Carry out a plan: one token of every slot in ``decode``, then the chunks (slot, n tokens) of ``prefill``.

        A plan without chunks is repeated until a sequence changes its state, ``interrupt`` is called, ``max_steps``
        (0: no limit) are done, or the clock shows ``until_ns`` (0: no limit). Returns True when a sequence changed its
        state.
        Raises ValueError for a plan that does not fit the slots' states.
        """
        self.plan_decode.clear()
        self.plan_prefill.clear()
        self.plan_chunk.clear()
        last = -1
        for slot in sorted(decode):
            self.check_slot(slot)
            if slot == last or self.slots[slot].state != MULLAMA_SLOT_DECODE:
                raise ValueError(f"slot {slot} cannot decode (listed twice, or not in that state)")
            last = slot
            self.plan_decode.push_back(slot)
        seen = set()
        for slot, n in prefill:
            self.check_slot(slot)
            left = <int> self.slots[slot].tokens.size() - self.slots[slot].n_past
            if slot in seen or self.slots[slot].state != MULLAMA_SLOT_PREFILL or not 1 <= n <= min(left, self.n_batch):
                raise ValueError(f"slot {slot} cannot prefill {n} tokens")
            seen.add(slot)
            self.plan_prefill.push_back(slot)
            self.plan_chunk.push_back(n)
        if self.plan_decode.empty() and self.plan_prefill.empty():
            return False
        self.group_plan()
        cdef uint64_t limit = max_steps
        cdef uint64_t until = until_ns
        cdef uint64_t released_at
        self.changed = False
        with nogil:
            self.steps(limit, until)
            released_at = now_ns()
        self.counters.gil_wait_ns += now_ns() - released_at
        return self.changed

    cdef void steps(self, uint64_t max_steps, uint64_t until_ns) noexcept nogil:
        cdef size_t i, j, k, n
        cdef uint64_t done = 0, start, now, turn
        cdef bint fresh = self.busy_since == 0
        cdef bint last
        self.resume_pool()
        # Plans and waits for the GIL between two runs are busy time too; only idling is not.
        start = now_ns() if fresh else self.busy_since
        if fresh and self.neighbours.age_ns() > IDLE_LOOK_NS:
            self.governor.awake(self.neighbours.read(), start)
        while True:
            now = now_ns()
            if not self.turns.acquire(self.seat, self.deadline.stop):
                return
            turn = now_ns()
            self.counters.turn_wait_ns += turn - now
            if not self.plan_decode.empty():
                n = self.plan_ranges.size() - 1
                k = self.first_range()
                for i in range(n):
                    j = (k + i) % n
                    self.decode_rows(self.plan_ranges[j], self.plan_ranges[j + 1], i > 0)
            n = self.plan_prefill.size()
            k = self.first_chunk()
            for i in range(n):
                if self.deadline.stop.get():
                    break
                j = (k + i) % n
                self.prefill(self.plan_prefill[j], self.plan_chunk[j])
            self.counters.steps += 1
            done += 1
            now = now_ns()
            self.turns.release(self.seat, now - turn)
            self.counters.busy_ns += now - start
            for i in range(self.slots.size()):
                if self.slots[i].open():
                    self.slots[i].row.kv_cell_ns += self.slots[i].n_past * (now - start)
            start = self.busy_since = now
            self.publish()
            if self.governor.wants_look(now):
                self.governor.look(self.neighbours.read(), now)
            last = self.changed or not self.plan_prefill.empty() or done == max_steps or self.interrupted.get() \
                or self.deadline.stop.get() or (until_ns != 0 and now >= until_ns)
            if self.pushed:
                self.pushed = False
                self.counters.wakeups += 1
                if last or not self.synchronous:
                    self.wake.signal()
                else:
                    self.deadline.wake = &self.wake  # from inside the next graph
            if last:
                return

    cdef int compute(self, int n_tokens, int n_seqs, uint64_t * ns) noexcept nogil:
        """Decode the batch, which is one ubatch. 0, or llama_decode's code; 2 only when told to stop."""
        cdef int rc, threads
        cdef uint64_t start, end, allowance
        cdef bint retry = False
        cdef bint is_new = self.in_charge.get() is not NULL and dereference(self.in_charge).is_new
        self.batch.n_tokens = n_tokens
        ns[0] = 0
        while True:
            threads = 1 if retry else self.governor.choose(n_tokens)
            if threads != self.threads_set:
                self.site(MULLAMA_SITE_THREADS, -1, 0, threads, self.threads_set)
                llama_set_n_threads(self.ctx, threads, threads)
                self.threads_set = threads
            # Buffers may have to grow for a set of adapters that is in charge for the first time.
            allowance = self.governor.allowance(n_tokens) if self.can_abort and not retry and not is_new else 0
            self.site(MULLAMA_SITE_UBATCH_BEGIN, self.batch.seq_id[0][0], 0, n_tokens, n_seqs)
            start = now_ns()
            if self.switched_ns != 0:
                self.counters.weight_pause_ns = start - self.switched_ns
            self.deadline.at_ns = start + allowance if allowance != 0 else 0
            rc = guarded_decode(self.ctx, self.batch, self.guard)
            if not self.synchronous:
                llama_synchronize(self.ctx)
            end = now_ns()
            if self.switched_ns != 0:
                self.counters.weight_first_ns = end
                self.switched_ns = 0
            ns[0] += end - start
            self.counters.decode_ns += end - start
            self.site(MULLAMA_SITE_UBATCH_END, self.batch.seq_id[0][0], 0, end - start, rc)
            if rc == 2 and not self.deadline.stop.get():
                # Given up at its deadline: somebody took a core. llama.cpp removed the ubatch's cells again.
                self.counters.decode_retries += 1
                self.governor.measured(n_tokens, threads, end - start, True, end)
                retry = True
                continue
            if rc == 0:
                if is_new:
                    dereference(self.in_charge).is_new = False
                else:
                    self.governor.measured(n_tokens, threads, end - start, False, end)
                self.counters.ubatches += 1
            return rc

    def shifted(self, int slot):
        """Tokens that the sequence in a slot has dropped to go on; then its KV is not what its tokens would give."""
        self.check_slot(slot)
        return self.slots[slot].shifted

    cdef void shift(self, int slot) noexcept nogil:
        """The context of a slot is full: keep the first ``shift_keep`` tokens and the newer half of the others."""
        cdef Slot * s = &self.slots[slot]
        cdef int keep = min(s.shift_keep, self.n_ctx // 2)
        cdef int drop = (s.n_past - keep) // 2
        if self.target is not None and self.ahead[slot] > keep:  # what follows is turned, and has to be copied again
            llama_memory_seq_rm(self.target.mem, slot, keep if keep > 0 else -1, -1)
            self.ahead[slot] = keep
        llama_memory_seq_rm(self.mem, slot, keep, keep + drop)
        llama_memory_seq_add(self.mem, slot, keep + drop, s.n_past, -drop)
        s.tokens.erase(s.tokens.begin() + keep, s.tokens.begin() + keep + drop)
        s.n_past -= drop
        s.shifted += drop
        s.row.shifted += drop
        self.changed = True
        self.site(MULLAMA_SITE_SHIFT, slot, s.handle, drop, s.n_past)

    cdef void decode_rows(self, size_t first, size_t last, bint is_extra) noexcept nogil:
        """One token of each slot in plan_decode[first:last), a gap-free range of slots with one set of adapters.

        ``is_extra``: not the first of the step.
        """
        cdef size_t i
        cdef int row, rc, slot
        cdef Slot * s
        cdef uint64_t ns
        cdef int n = <int> (last - first)
        if self.deadline.stop.get():
            return
        if is_extra:
            if same_set(self.in_charge, self.slots[self.plan_decode[first]].lora):
                self.counters.split_ubatches += 1
            else:
                self.counters.adapter_ubatches += 1
        if not self.put_in_charge(self.plan_decode[first]):
            self.fail_rows(&self.plan_decode[first], n, CORE_ADAPTER)
            return
        for i in range(first, last):
            row = <int> (i - first)
            slot = self.plan_decode[i]
            s = &self.slots[slot]
            if s.n_past >= self.n_ctx and s.shift_keep >= 0:
                self.shift(slot)
            self.batch.token[row] = s.tokens[s.n_past]
            self.batch.pos[row] = s.n_past
            self.batch.n_seq_id[row] = 1
            self.batch.seq_id[row][0] = slot
            self.batch.logits[row] = 1
        rc = self.compute(n, n, &ns)
        if rc != 0:
            self.fail_rows(&self.plan_decode[first], n, rc)
            return
        self.counters.decode_tokens += n
        for i in range(first, last):
            s = &self.slots[self.plan_decode[i]]
            s.n_past += 1
            s.row.decode_ns += ns
            s.row.ubatches += 1
            s.row.batch_sum += n
            s.row.threads_min = min(s.row.threads_min, <uint32_t> self.threads_set)
            s.row.threads_max = max(s.row.threads_max, <uint32_t> self.threads_set)
        for i in range(first, last):
            self.commit(self.plan_decode[i], <int> (i - first))

    cdef void prefill(self, int slot, int n) noexcept nogil:
        """The next ``n`` prompt tokens of a slot; samples the first token when they are the last."""
        cdef Slot * s = &self.slots[slot]
        cdef int i, rc
        cdef uint64_t ns
        cdef int32_t which = slot
        cdef bint complete = s.n_past + n == <int> s.tokens.size()
        if not self.put_in_charge(slot):
            self.fail_rows(&which, 1, CORE_ADAPTER)
            return
        for i in range(n):
            self.batch.token[i] = s.tokens[s.n_past + i]
            self.batch.pos[i] = s.n_past + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = slot
            self.batch.logits[i] = 0
        if complete:
            self.batch.logits[n - 1] = 1
        if s.row.started_ns == 0:
            s.row.started_ns = now_ns()
        rc = self.compute(n, 1, &ns)
        if rc != 0:
            self.fail_rows(&which, 1, rc)
            return
        self.counters.prefill_tokens += n
        s.n_past += n
        s.row.prefill_ns += ns
        s.row.ubatches += 1
        s.row.batch_sum += 1
        if s.row.threads_min == 0:
            s.row.threads_min = self.threads_set
        s.row.threads_min = min(s.row.threads_min, <uint32_t> self.threads_set)
        s.row.threads_max = max(s.row.threads_max, <uint32_t> self.threads_set)
        if complete:
            s.state = MULLAMA_SLOT_DECODE
            self.changed = True
            self.commit(slot, n - 1)

    cdef void fail_rows(self, const int32_t * which, size_t n, int rc) noexcept nogil:
        """A decode failed for good: its sequences end with an error, nobody else notices."""
        cdef size_t i
        cdef int error = CORE_DECODE
        if rc == 2:
            return  # told to stop: the engine ends everything itself
        if rc == 1:
            error = CORE_NO_KV
        elif rc == CORE_ADAPTER:
            error = rc
        for i in range(n):
            self.slots[which[i]].poisoned = True
            self.finish(&self.slots[which[i]], which[i], MULLAMA_FINISH_ERROR, -1, error)

    cdef llama_token choose(self, int slot, int row, int * error) noexcept nogil:
        """Sample from the logits of a batch row. -1 with ``error`` set when that is not possible."""
        cdef Slot * s = &self.slots[slot]
        cdef float * logits = llama_get_logits_ith(self.ctx, row)
        cdef llama_token_data_array array
        cdef int32_t n
        cdef size_t i
        cdef llama_token token
        error[0] = CORE_NOT_FINITE
        if logits is NULL:
            error[0] = CORE_DECODE
            return -1
        if self.fault_slot == slot:
            self.fault_slot = -1
            logits[self.model.n_vocab // 2] = NAN
        # The row is ours until the next decode, so biases go straight into it.
        if s.ignore_eos or s.n_generated < s.min_tokens:
            for i in range(self.eog.size()):
                logits[self.eog[i]] = -1e30
        for i in range(s.bias.size()):
            logits[s.bias[i].token] += s.bias[i].bias
        if s.greedy:
            return scan_argmax(logits, self.model.n_vocab)
        if s.top_k_first > 0:
            n = scan_top_k(logits, self.model.n_vocab, s.top_k_first, self.candidates)
        else:
            n = scan_all(logits, self.model.n_vocab, self.candidates)
        if n < 0:
            return -1
        array.data = self.candidates.data()
        array.size = n
        array.selected = -1
        array.sorted = s.top_k_first > 0
        token = guarded_sample(s.chain, &array, self.guard)
        if token < 0:
            error[0] = CORE_SAMPLER
        return token

    cdef void commit(self, int slot, int row) noexcept nogil:
        """Sample the next token of a slot and let its text out; decides whether the request ends with it."""
        cdef Slot * s = &self.slots[slot]
        cdef int error = 0, stop = -1
        cdef uint64_t start = now_ns(), sampled, end
        cdef llama_token token = self.choose(slot, row, &error)
        cdef char piece[MAX_PIECE]
        cdef int32_t n = 0
        cdef size_t i
        cdef bint eog = False
        sampled = now_ns()
        s.row.sample_ns += sampled - start
        self.counters.sample_ns += sampled - start
        if token < 0:
            s.poisoned = True
            self.finish(s, slot, MULLAMA_FINISH_ERROR, -1, error)
            return
        self.counters.sampled_tokens += 1
        self.site(MULLAMA_SITE_SAMPLE, slot, s.handle, token, sampled - start)
        s.tokens.push_back(token)
        s.n_generated += 1
        s.row.completion_tokens += 1
        s.row.last_token_ns = sampled
        if s.row.first_token_ns == 0:
            s.row.first_token_ns = sampled
        for i in range(self.eog.size()):
            if self.eog[i] == token:
                eog = True
                break
        if not eog:
            n = llama_token_to_piece(self.model.vocab, token, piece, MAX_PIECE, 0, False)
            if n < 0:
                # A piece longer than any sane one: the negated length is what it needs.
                self.long_piece.resize(-n)
                n = llama_token_to_piece(self.model.vocab, token, &self.long_piece[0], -n, 0, False)
                stop = s.gate.push(&self.long_piece[0], max(n, 0), s.n_generated >= s.min_tokens, self.released)
            else:
                stop = s.gate.push(piece, n, s.n_generated >= s.min_tokens, self.released)
            s.pending_text.append(self.released)
        if eog or stop >= 0:
            self.finish(s, slot, MULLAMA_FINISH_STOP, stop, 0)
        elif s.n_generated >= s.max_tokens:
            self.finish(s, slot, MULLAMA_FINISH_LENGTH, -1, 0)
        else:
            self.flush_text(s, 1)
        end = now_ns()
        self.counters.commit_ns += end - sampled

    cdef void finish(self, Slot * s, int slot, uint32_t reason, int stop_index, int error) noexcept nogil:
        """End a request: let its last text out and hand over its row, whole, with the finish record.

        ``slot`` is -1 for a preempted sequence.
        """
        cdef RecordHeader header
        cdef FinishBody body
        if reason == MULLAMA_FINISH_STOP or reason == MULLAMA_FINISH_LENGTH:
            if stop_index < 0:
                s.gate.flush(self.released)
                s.pending_text.append(self.released)
            self.flush_text(s, 1)
        s.state = MULLAMA_SLOT_DONE
        self.changed = True
        s.row.state = MULLAMA_SLOT_DONE
        s.row.slot = slot
        s.row.cells = s.n_past
        s.row.finish_reason = reason
        s.row.finished_ns = now_ns()
        if reason == MULLAMA_FINISH_STOP:
            self.counters.finished_stop += 1
        elif reason == MULLAMA_FINISH_LENGTH:
            self.counters.finished_length += 1
        elif reason == MULLAMA_FINISH_CANCELLED:
            self.counters.cancelled += 1
        else:
            self.counters.failed += 1
        header.kind = RECORD_FINISH
        header.n_tokens = 0
        header.handle = s.handle
        body.reason = reason
        body.stop_index = stop_index
        body.error = error
        body.unused = 0
        self.push(header, &body, sizeof(FinishBody), &s.row, sizeof(mullama_row))
        self.site(MULLAMA_SITE_FINISH, slot, s.handle, reason, s.n_generated)

    cdef void resume_pool(self) noexcept nogil:
        if self.pool_paused:
            pool_resume(self.pool)
            self.pool_paused = False

    def pause(self):
        """Put the compute threads to sleep; ``run`` wakes them."""
        if not self.pool_paused:
            with nogil:
                pool_pause(self.pool)
            self.pool_paused = True

    # -- seen from outside -------------------------------------------------------------------------------------

    def counters_dict(self):
        """The counters as the engine thread has them now."""
        self.publish()
        from mullama.abi import Reader, as_dict
        return as_dict(Reader(self.page.buffer()).counters())

    def cells(self):
        """llama.cpp's own count of KV cells, by slot: {"size", "caches", "used": [..a slot..], "recurrent": [..]}.

        ``used`` counts the full-attention cache (the sliding-window one holds fewer), ``recurrent`` the live states.
        """
        self.check_slot(0)
        cdef int i
        cdef int n_caches = llama_cells_n_caches(self.ctx)
        cdef vector[llama_seq_id] owner
        used = [0] * self.n_slots
        window = [0] * self.n_slots
        for i in range(self.n_slots):
            if n_caches > 0:
                used[i] = llama_cells_used(self.ctx, 0, 0 if self.unified else i, i)
            if n_caches > 1:
                window[i] = llama_cells_used(self.ctx, 1, 0 if self.unified else i, i)
        owner.resize(1024)
        n = llama_cells_recurrent(self.ctx, owner.data(), <uint32_t> owner.size())
        return {"caches": n_caches, "streams": llama_cells_n_streams(self.ctx, 0) if n_caches > 0 else 0,
                "total_used": sum(llama_cells_used(self.ctx, 0, i, -1)
                                  for i in range(llama_cells_n_streams(self.ctx, 0))) if n_caches > 0 else 0,
                "size": llama_cells_size(self.ctx, 0) if n_caches > 0 else 0,
                "used": used, "window": window, "recurrent": [owner[i] for i in range(n)]}

    def cell_map(self, int slot, int cache=0):
        """(position, owner) of every cell of a slot's stream; (-1, -1) for an empty one."""
        self.check_slot(slot)
        cdef uint32_t size = llama_cells_size(self.ctx, cache)
        cdef vector[llama_pos] pos
        cdef vector[llama_seq_id] owner
        pos.resize(size)
        owner.resize(size)
        cdef uint32_t n = llama_cells_read(self.ctx, cache, 0 if self.unified else slot, pos.data(), owner.data(), size)
        return [(pos[i], owner[i]) for i in range(n)]

    def cell_runs(self, int slot, int cache=0):
        """The same as runs of neighbouring cells: (first cell, number of cells, owner or -1), in order."""
        self.check_slot(slot)
        cdef uint32_t size = llama_cells_size(self.ctx, cache)
        cdef vector[llama_pos] pos
        cdef vector[llama_seq_id] owner
        cdef uint32_t first = 0, i, n
        pos.resize(size)
        owner.resize(size)
        with nogil:
            n = llama_cells_read(self.ctx, cache, 0 if self.unified else slot, pos.data(), owner.data(), size)
        runs = []
        for i in range(1, n + 1):
            if i == n or owner[i] != owner[first]:
                runs.append((first, i - first, owner[first]))
                first = i
        return runs

    def audit(self):
        """Compare the bookkeeping with llama.cpp's cells. Returns a list of differences, empty when all agree."""
        found = []
        truth = self.cells()
        for i in range(self.n_slots):
            n = self.slots[i].n_past
            here = n
            if self.away[i] >= 0:
                here = self.away[i]
            if truth["caches"] > 0 and truth["used"][i] != here:
                found.append(f"slot {i}: {here} tokens are accounted for, llama.cpp holds {truth['used'][i]} cells")
            if self.slots[i].state == MULLAMA_SLOT_FREE and n != 0:
                found.append(f"slot {i} is free but has {n} tokens")
            if n > <int> self.slots[i].tokens.size():
                found.append(f"slot {i}: KV of {n} tokens, {self.slots[i].tokens.size()} known")
        return found

    def state_bytes(self, int slot):
        """Bytes that moving a slot's KV would copy."""
        self.check_slot(slot)
        cdef size_t n
        if self.away[slot] >= 0:
            return self.slots[slot].n_past * self.context.token_bytes
        with nogil:
            n = llama_state_seq_get_size(self.ctx, slot)
        return n

    @property
    def is_vacant(self):
        """Whether it has no context, for now (vacancy.pyx) or for good. Any thread."""
        return self.ctx is NULL

    def is_switching(self):
        """Whether other weights have taken over and have not taken a step yet. Any thread."""
        return self.switched_ns != 0

    def memory(self):
        """Bytes allocated, by part and kind of buffer (see Context.memory)."""
        self.check_slot(0)
        return self.context.memory()

    def staging_bytes(self):
        """Host memory in which states wait while they move from slot to slot; it is kept for the next time."""
        return self.state_a.size() + self.state_b.size()  # what is reserved beyond that was never touched

    def inject_nan(self, int slot):
        """Fault injection for tests: the next logits of this slot hold a NaN."""
        self.check_slot(slot)
        self.fault_slot = slot

    def damage_parked(self, Parked parked not None):
        """Fault injection for tests: the saved KV of a preempted sequence no longer is what llama.cpp wrote."""
        cdef size_t n = parked.state.size() // 2
        self.counters.parked_bytes -= parked.state.size() - n
        parked.state.resize(n)

    def ring_usage(self):
        """(bytes used, capacity) of the token ring."""
        return self.ring.get().used(), self.ring.get().capacity()


cdef class StopText:
    """The text gate alone, for tests: pieces in, final bytes out."""

    cdef TextGate gate

    def __init__(self, stops=()):
        for stop in stops:
            if not stop:
                raise ValueError("a stop string needs a character")
            self.gate.stops.push_back(stop.encode("utf-8"))

    def push(self, bytes piece, *, bint check_stops=True):
        """Returns (final bytes, index of the stop string completed or -1)."""
        cdef string released
        cdef const char * data = piece
        cdef int which = self.gate.push(data, len(piece), check_stops, released)
        return <bytes> released, which

    def flush(self):
        """End of text: the bytes still held back."""
        cdef string released
        self.gate.flush(released)
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
