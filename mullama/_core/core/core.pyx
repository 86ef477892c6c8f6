"""One llama.cpp context with its slots, the threads that compute it, and the records and the page that tell of it.

    Output (output.h)     records for the reader, and the page
    Compute (compute.h)   threads, the turn among engines, the governor, deadlines
    Slots (slots.h)       sequences, and the law of their KV
    Loop (loop.pyx)       the steps

The engine thread owns a Core: every method is called from that thread, except ``interrupt``, ``abort``,
``wake_reader``, ``drain_records``, ``wake_fd``, ``is_switching`` and ``is_vacant``.
"""

cimport cython
from cpython.unicode cimport PyUnicode_DecodeUTF8
from cython.operator cimport dereference
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memset
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.constraint.grammars cimport MatchingPtr
from mullama._core.lora.adapters cimport LoraSetPtr, build_set, use_set
from mullama._core.compute.arbiter cimport Arbiter
from mullama._core.output.clock cimport now_ns
from mullama._core.compute.compute cimport Trial
from mullama._core.model.context cimport Context
from mullama._core.compute.governor cimport Governor
from mullama._core.llama cimport *
from mullama._core.core.loop cimport Loop, TokenEntry, TokenHead
from mullama._core.model.model cimport Model
from mullama._core.output.output cimport (
    RECORD_FINISH, RECORD_PROMPT, RECORD_TEXT, RECORD_TOKEN, FinishBody, PageBlocks, RecordHeader)
from mullama._core.output.page cimport page_at
from mullama._core.core.parking cimport Parked
from mullama._core.sampling.chain cimport Chain, Sampling, accept_all, begin_matching, build_chain, prepared_for
from mullama._core.core.slots cimport Slot
from mullama.abi cimport *
from mullama._core.compute.arbiter import arbiter as default_arbiter
from mullama.errors import ComputeFailed, InvalidRequest, ModelLoadError
from mullama.types import SCORED_TOKENS, TokenScore

# What drain_records() yields first in each tuple.
TEXT = RECORD_TEXT
FINISH = RECORD_FINISH
TOKEN = <int> RECORD_TOKEN
PROMPT = <int> RECORD_PROMPT


cdef object token_score(const char * body):
    """The TokenScore of a record."""
    cdef const TokenHead * head = <const TokenHead *> body
    cdef const TokenEntry * entries = <const TokenEntry *> (body + sizeof(TokenHead))
    cdef const char * piece = <const char *> (entries + head.n)
    cdef uint32_t i
    cdef object own = token_entry(entries, piece)
    if head.rank == 0:
        return make_tuple(TokenScore, (own[0], own[1], None, 0, ()))
    cdef list top = []
    for i in range(1, head.n):
        piece += entries[i - 1].size
        top.append(token_entry(entries + i, piece))
    # PERF: what NamedTuple makes of arguments takes three times as long.
    return make_tuple(TokenScore, (own[0], own[1], own[2], head.rank, tuple(top)))


cdef object token_entry(const TokenEntry * entry, const char * piece):
    cdef bytes text = piece[:entry.size]
    return entry.token, text, entry.logprob


cdef object make_tuple = tuple.__new__


cdef void take_report(Slot * s, object params):
    """What the request wants to know of tokens."""
    s.report.tokens = params.return_token_ids
    s.report.n_top = -1 if params.logprobs is None else params.logprobs
    s.report.is_processed = params.logprobs_mode == "processed"
    s.report.n_prompt_top = -1 if params.prompt_logprobs is None else params.prompt_logprobs


@cython.no_gc_clear  # the context must be freed before the model that it points into
@cython.final
cdef class Core:
    """A context, its slots, and all that it takes to compute with them and to tell of it."""

    def __cinit__(self):
        self.out.stop = &self.compute.deadline.stop
        self.slots.out = &self.out
        self.slots.guard = &self.compute.guard
        self.loop = Loop()
        self.loop.connect(&self.out, &self.compute, &self.slots)

    def __init__(self, Model model not None, *, int n_slots, int n_ctx, int n_batch=512, flash_attn="auto",
                 type_k="f16", type_v="f16", int unified_cells=0, bint reference=False, int n_threads=1,
                 bint threads_fixed=False, page_path=None, bint page_needed=True, Arbiter turns=None,
                 bint quick=False):
        """Make a Context (see there for ``n_slots`` to ``reference``) and what it takes to compute with it.

        ``page_needed``: without it, a page that cannot be a file is private memory (``page_path`` is empty then).
        ``quick``: somebody waits, so that only the decodes are run that the governor cannot do without.
        ``turns`` is the arbiter that the engines of a process share. Raises ModelLoadError when it does not fit.
        """
        if not 1 <= n_threads <= 512:
            raise ModelLoadError(f"n_threads must be 1 to 512, got {n_threads}", param="threads")
        self.turns = turns or default_arbiter
        self.pid = process_id()
        cdef Context context = Context(
            model, n_slots=n_slots, n_ctx=n_ctx, n_batch=n_batch, flash_attn=flash_attn, type_k=type_k, type_v=type_v,
            unified_cells=unified_cells, reference=reference)
        self.n_slots = context.n_slots
        self.n_batch = context.n_batch
        self.unified = context.unified
        self.loop.n_batch = self.n_batch
        cdef bint has_pool
        with nogil:
            has_pool = self.compute.open(n_threads, context.n_batch)
        if not has_pool:
            raise ModelLoadError("the thread pool could not be created")
        self.compute.turns = self.turns.table.get()
        self.compute.seat = self.compute.turns.join()
        self.slots.resize(self.n_slots)
        self.go_on_with(context, Governor(n_threads, threads_fixed, self.compute.neighbours.cores()))
        try:
            if not self.out.wake.open():
                raise ModelLoadError("no file descriptor left for the wake-up")
            self.page = page_at(self.n_slots, page_path, page_needed)
            self.out.page = self.page.blocks
            self.warm_up(context, self.governor, quick)
            self.publish()
        except BaseException:
            self.close()
            raise

    def __dealloc__(self):
        self.release()

    def close(self):
        """Free the context, the threads and the descriptors. Idempotent; no other method may be called after it."""
        self.release()
        self.out.page = PageBlocks()
        if self.page is not None:
            self.page.close()

    cdef void release(self) noexcept:
        cdef int i
        if self.pid != process_id():
            return  # a child of the process whose threads these are
        for i in range(self.slots.size()):
            self.slots.at(i).end_request()
        self.slots.take_on(NULL)
        for context in (self.context, self.target):
            if context is not None:
                (<Context> context).release()
        self.target = None  # the first stays, freed: what it was made with may still be asked for
        with nogil:
            self.compute.close()
        self.out.wake.close()

    # -- contexts, for carrier.pyx and vacancy.pyx ----------------------------------------------------------------

    cdef void go_on_with(self, Context context, Governor governor) noexcept:
        """Compute with this context and governor from now on."""
        self.context = context
        self.model = context.model
        self.governor = governor
        self.compute.governor = governor.state.get()
        self.compute.can_abort = context.can_trim
        self.compute.attach(context.ctx)
        self.slots.take_on(context.ctx)
        self.slots.n_ctx = context.n_ctx
        self.slots.unified = context.unified
        self.slots.needs_checkpoint = context.needs_checkpoint
        self.slots.token_bytes = context.token_bytes
        self.loop.take_on(context.model.vocab, context.eog, min(context.n_rows, SCORED_TOKENS))

    cdef void lose_context(self) noexcept:
        """The context is about to be freed, or to become another core's."""
        llama_detach_threadpool(self.slots.ctx)
        self.slots.let_go_of_context()

    cdef int warm_up(self, Context context, Governor governor, bint quick) except -1:
        """The first decodes of a context, which is empty and is so again. Raises ModelLoadError."""
        cdef Trial got
        with nogil:
            got = self.compute.warm_up(context.ctx, governor.state.get()[0], quick)
        if got == Trial.stopped:
            raise ModelLoadError("loading was given up")
        if got == Trial.failed:
            raise self.first_decode_failed()
        return 0

    cdef object first_decode_failed(self):
        return ModelLoadError(
            f"the first decode failed with code {self.compute.code} {self.compute.guard.message.decode()}")

    cdef void note_weights(self, uint64_t start_ns, size_t n_bytes, bint is_swap) noexcept:
        """Other weights are in charge, with so much KV: since ``start_ns`` the change was made."""
        if is_swap:
            self.out.counters.weight_swaps += 1
            self.out.counters.weight_swap_bytes += n_bytes
            self.out.counters.weight_swap_ns += now_ns() - start_ns
        self.out.site(MULLAMA_SITE_WEIGHTS, -1, 0, self.slots.n_open(), n_bytes)
        self.publish()

    cdef int check_unchanging(self) except -1:
        if self.target is not None:
            raise InvalidRequest("the weights are being changed already")
        return 0

    @property
    def is_vacant(self):
        """Whether it has no context, for now (vacancy.pyx) or for good. Any thread."""
        return self.slots.ctx is NULL

    def is_switching(self):
        """Whether other weights have taken over and have not taken a step yet. Any thread."""
        return self.compute.switched_ns() != 0

    # -- what it tells --------------------------------------------------------------------------------------------

    cdef void publish(self) noexcept:
        """Bring the page up to date."""
        self.slots.publish(self.compute)

    def note_plan(self, uint64_t plan_ns, uint64_t waiting, int n_decode, int n_prefill):
        """Account a plan the scheduler made, and the length of the admission queue."""
        self.out.counters.plans += 1
        self.out.counters.plan_ns += plan_ns
        self.slots.waiting = waiting
        self.out.site(MULLAMA_SITE_PLAN, -1, 0, n_decode, n_prefill)

    def refresh_page(self, uint64_t waiting):
        """Bring the page up to date between runs: what nobody computes for would stand in it as it was."""
        self.slots.waiting = waiting
        self.publish()

    def note_idle(self, uint64_t ns, uint64_t waiting):
        """Account a wait for commands; keeps the heartbeat fresh."""
        self.compute.busy_since = 0
        self.out.site(MULLAMA_SITE_IDLE, -1, 0, ns, 0)
        self.refresh_page(waiting)

    def note_evicted(self, int tokens):
        """Count cached tokens that were given up elsewhere than in a slot."""
        self.out.counters.kv_evict_tokens += tokens

    def wake_fd(self):
        """File descriptor that becomes readable when records wait."""
        return self.out.wake.read_fd

    def wake_reader(self):
        """Make ``wake_fd`` readable. Any thread."""
        self.out.wake.signal()

    def drain_records(self, int limit=4096):
        """Take records off the ring; call from one reader at a time. Returns a list of tuples:

        (TEXT, handle, text, n_tokens), (FINISH, handle, reason, stop_index, error, stop_token, row as bytes), and, for
        who wants to know of tokens, (TOKEN, handle, TokenScore) before the text of each, and (PROMPT, handle,
        TokenScore) of each token of the prompt but the first, before the first text.
        """
        self.out.wake.clear()
        out = []
        cdef const RecordHeader * header
        cdef const char * body
        cdef const FinishBody * finish
        cdef Py_ssize_t n
        while len(out) < limit:
            header = self.out.ring.peek()
            if header is NULL:
                break
            body = <const char *> header + sizeof(RecordHeader)
            if header.kind == RECORD_TEXT:
                n = (<const uint32_t *> body)[0]
                out.append((TEXT, header.handle, PyUnicode_DecodeUTF8(body + 4, n, "replace"), header.n_tokens))
            elif header.kind != RECORD_FINISH:
                out.append((<int> header.kind, header.handle, token_score(body)))
            else:
                finish = <const FinishBody *> body
                out.append((FINISH, header.handle, finish.reason, finish.stop_index, finish.error, finish.stop_token,
                            (body + sizeof(FinishBody))[:sizeof(mullama_row)]))
            self.out.ring.pop()
        if len(out) == limit:
            self.out.wake.signal()
        return out

    def counters_dict(self):
        """The counters as the engine thread has them now."""
        self.publish()
        from mullama.abi import Reader, as_dict
        return as_dict(Reader(self.page.buffer()).counters())

    def steps_done(self):
        """Steps since the core was made."""
        return self.out.counters.steps

    def kv_costs(self):
        """Measured ns a byte of KV ``save``d, ``restore``d and ``copy``-ed (see Cells); 0 before the first one."""
        cdef mullama_counters * c = &self.out.counters
        return {
            "save": <double> c.kv_store_ns / c.kv_store_bytes if c.kv_store_bytes else 0.0,
            "restore": <double> c.kv_restore_ns / c.kv_restore_bytes if c.kv_restore_bytes else 0.0,
            "copy": <double> c.kv_copy_ns / c.kv_copy_bytes if c.kv_copy_bytes else 0.0,
        }

    def memory(self):
        """Bytes allocated, by part and kind of buffer (see Context.memory).

        The buffer of logits has grown where log-probabilities of a prompt were asked for.
        """
        self.check_slot(0)
        found = self.context.memory()
        found["output"] = max(self.n_slots, self.loop.most_rows) * self.model.n_vocab * sizeof(float)
        return found

    def staging_bytes(self):
        """Host memory in which states wait while they move from slot to slot; it is kept for the next time."""
        return self.slots.staging_bytes()

    # -- computing --------------------------------------------------------------------------------------------------

    def run(self, decode, prefill, max_steps=0, until_ns=0):
        """Carry out a plan: one token of every slot in ``decode``, then the chunks (slot, n tokens) of ``prefill``.

        A plan without chunks is repeated until a sequence changes its state, ``interrupt`` is called, ``max_steps``
        (0: no limit) are done, or the clock shows ``until_ns`` (0: no limit). Returns True when a sequence changed its
        state.
        Raises ValueError for a plan that does not fit the slots' states.
        """
        cdef vector[int32_t] decoding, filling, chunks
        cdef Slot * s
        last = -1
        for slot in sorted(decode):
            self.check_slot(slot)
            if slot == last or self.slots.at(slot).state != MULLAMA_SLOT_DECODE:
                raise ValueError(f"slot {slot} cannot decode (listed twice, or not in that state)")
            last = slot
            decoding.push_back(slot)
        seen = set()
        for slot, n in prefill:
            self.check_slot(slot)
            s = self.slots.at(slot)
            left = <int> s.tokens.size() - s.n_past
            if slot in seen or s.state != MULLAMA_SLOT_PREFILL or not 1 <= n <= min(left, self.n_batch):
                raise ValueError(f"slot {slot} cannot prefill {n} tokens")
            seen.add(slot)
            filling.push_back(slot)
            chunks.push_back(n)
        if decoding.empty() and filling.empty():
            return False
        cdef uint64_t limit = max_steps
        cdef uint64_t until = until_ns
        cdef uint64_t released_at
        cdef bint changed
        with nogil:
            changed = self.loop.run(decoding, filling, chunks, limit, until)
            released_at = now_ns()
        self.out.counters.gil_wait_ns += now_ns() - released_at
        return changed

    def pause(self):
        """Put the compute threads to sleep; ``run`` wakes them."""
        with nogil:
            self.compute.pause()

    def interrupt(self):
        """Make ``run`` return after the current step. Any thread."""
        self.compute.interrupted.set(1)

    def rearm(self):
        """Forget an interrupt. Call before looking for commands, so that one that comes meanwhile is not lost."""
        self.compute.interrupted.set(0)

    def abort(self):
        """Give up the running decode and every stall; ``run`` returns at once and must not be called again."""
        self.compute.deadline.stop.set(1)
        self.compute.interrupted.set(1)

    @property
    def seat(self):
        """Its number among the engines that ``turns`` knows."""
        return self.compute.seat

    def drop_adapters(self):
        """See that the context holds no adapter, so that one that no sequence uses can be closed."""
        self.check_slot(0)
        cdef LoraSetPtr none
        if self.slots.in_charge.get() is not NULL:
            use_set(self.slots.ctx, none)
            self.slots.in_charge.reset()

    # -- slots --------------------------------------------------------------------------------------------------------

    cdef int check_slot(self, int slot) except -1:
        if self.slots.ctx is NULL:
            raise RuntimeError("this core was closed, or has no weights now")
        if not 0 <= slot < self.n_slots:
            raise ValueError(f"slot {slot} is out of range (0 to {self.n_slots - 1})")
        return 0

    @property
    def n_ctx(self):
        """Tokens one slot may hold."""
        return self.slots.n_ctx

    @property
    def can_shift(self):
        """Whether the oldest tokens of a sequence can make room for new ones."""
        return self.context.can_shift

    @property
    def kv_cells(self):
        """Tokens that all slots together may hold."""
        self.check_slot(0)
        return <int> llama_n_ctx(self.slots.ctx) if self.unified else self.n_slots * self.slots.n_ctx

    def states(self):
        """State number of every slot (see abi.SLOT_STATES)."""
        return [self.slots.at(i).state for i in range(self.n_slots)]

    def progress(self):
        """(state, tokens generated, tokens in the KV cache) of every slot."""
        return [(self.slots.at(i).state, self.slots.at(i).n_generated, self.slots.at(i).n_past)
                for i in range(self.n_slots)]

    def retained(self, int slot):
        """(tokens, step of last use) of the prefix a slot retains; (0, 0) when it retains none."""
        self.check_slot(slot)
        cdef Slot * s = self.slots.at(slot)
        if s.state != MULLAMA_SLOT_RETAINED:
            return 0, 0
        return s.n_past, s.last_used

    def slot_info(self, int slot):
        """(state, handle, n_past, tokens, last_used) of a slot; tokens as a list."""
        self.check_slot(slot)
        cdef Slot * s = self.slots.at(slot)
        return s.state, s.handle, s.n_past, list(s.tokens), s.last_used

    def packed(self, int slot):
        """The tokens whose KV a slot holds, as the bytes of 32-bit integers."""
        self.check_slot(slot)
        return (<const char *> self.slots.at(slot).tokens.data())[:self.slots.at(slot).n_past * sizeof(llama_token)]

    def slot_fill(self, int slot):
        """(tokens in the KV cache, tokens known) of a slot."""
        self.check_slot(slot)
        return self.slots.at(slot).n_past, <int> self.slots.at(slot).tokens.size()

    def shifted(self, int slot):
        """Tokens that the sequence in a slot has dropped to go on; then its KV is not what its tokens would give."""
        self.check_slot(slot)
        return self.slots.at(slot).shifted

    def state_bytes(self, int slot):
        """Bytes that moving a slot's KV would copy."""
        self.check_slot(slot)
        cdef size_t n
        with nogil:
            n = llama_state_seq_get_size(self.slots.ctx, slot)
        return n

    def gap_cost_ns(self, int slot):
        """What a gap in the decoding slots will cost at most while the sequence in ``slot`` runs, in ns.

        Each step pays for one more pass over the weights, estimated as half of a one-token decode. The look-ahead is
        bounded: a sequence may end at any token.
        """
        self.check_slot(slot)
        cdef Slot * s = self.slots.at(slot)
        if self.unified:
            return 0.0
        steps = min(max(s.max_tokens - s.n_generated, 0), 64)
        return 0.5 * self.compute.governor.expected(1) * steps

    def open(self, int slot, uint64_t handle, prompt, params, *, int reuse=0, int source=MULLAMA_KV_IN_PLACE,
             int evicted=0, uint64_t arrival_ns=0, int priority=0, int shift_keep=-1, adapters=(), prepared=None):
        """Start a request in a free or retained slot, keeping ``reuse`` tokens of what the slot retains.

        For its profile: ``source``, where they came from (abi.KV_SOURCES), and ``evicted``, the cached tokens of others
        that were given up for it. ``shift_keep`` of 0 or more: when the context is full, go on without half of
        the tokens that come after so many at the start. ``adapters``: pairs of Adapter and scale that compute it; what
        is reused must have been computed with the same. ``prepared``: the Sampling of ``params``, if there is one.
        Raises InvalidRequest for numbers out of range, and leaves the slot as it was.
        """
        self.check_slot(slot)
        cdef Slot * s = self.slots.at(slot)
        if s.open():
            raise RuntimeError(f"slot {slot} is in use")
        cdef vector[llama_token] tokens = prompt
        cdef vector[llama_logit_bias] bias
        cdef vector[string] stops
        cdef vector[llama_token] none
        cdef size_t i
        if tokens.empty() or <int> tokens.size() >= self.slots.n_ctx + 1:
            raise InvalidRequest(f"a prompt must have 1 to {self.slots.n_ctx} tokens, got {tokens.size()}",
                                 param="prompt")
        for i in range(tokens.size()):
            if not 0 <= tokens[i] < self.model.n_vocab:
                raise InvalidRequest(f"token id {tokens[i]} is outside the vocabulary (0 to {self.model.n_vocab - 1})",
                                     param="prompt")
        if not 0 <= reuse < <int> tokens.size() or reuse > s.n_past:
            raise ValueError("reuse must leave one token to compute and be no more than the slot retains")
        for i in range(reuse):
            if s.tokens[i] != tokens[i]:
                raise ValueError("the retained tokens are not a prefix of the prompt")
        if reuse > 0 and params.prompt_logprobs is not None:
            raise ValueError("log-probabilities of a prompt need all of it computed")
        if shift_keep >= 0 and not self.context.can_shift:
            raise InvalidRequest("this model's context cannot be shifted", param="context_policy")
        for stop in params.stop:
            stops.push_back(stop.encode("utf-8", "surrogatepass"))
        cdef vector[llama_token] shown = self.model.controls_of(params.shown)
        cdef LoraSetPtr lora = build_set(self.model, adapters)
        cdef Sampling sampling = prepared_for(self.model, params, prepared)
        cdef MatchingPtr matching = begin_matching(sampling, self.model, none)
        cdef Chain chain = build_chain(sampling, params, self.slots.n_ctx, bias)
        reuse = self.slots.keep_head(slot, reuse)
        s.n_past = reuse
        s.tokens.swap(tokens)
        s.state = MULLAMA_SLOT_PREFILL
        s.handle = handle
        s.n_prompt = <int32_t> s.tokens.size()
        s.n_generated = 0
        s.shift_keep = min(shift_keep, s.n_prompt) if shift_keep >= 0 else -1
        s.shifted = 0
        room = max(1, self.slots.n_ctx - s.n_prompt) if s.shift_keep < 0 else 1 << 30
        s.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        s.min_tokens = min(params.min_tokens, s.max_tokens)
        s.ignore_eos = params.ignore_eos
        s.poisoned = False
        s.lora = lora
        s.chain = chain.ptr
        s.greedy = chain.greedy
        s.top_k_first = chain.top_k_first
        s.bias.swap(bias)
        s.rules = sampling.rules
        take_report(s, params)
        s.n_scored = 1
        s.stop_token = -1
        s.shown.swap(shown)
        s.matching = matching
        if matching.get() is not NULL and dereference(matching).wants_mask():
            self.compute.masks.add(matching)
        s.gate.stops.swap(stops)
        self.slots.begin_text(s)
        if s.chain is not NULL:
            with nogil:
                accept_all(s.chain, s.tokens, chain.look_back)
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
        self.out.counters.opened += 1
        self.out.counters.kv_hit_tokens += reuse
        self.out.counters.kv_miss_tokens += s.n_prompt - reuse
        self.out.site(MULLAMA_SITE_OPEN, slot, handle, s.n_prompt, reuse)

    def cancel(self, int slot):
        """End the request in a slot (finish record CANCELLED) and free its cells. Harmless when it has ended."""
        self.check_slot(slot)
        cdef Slot * s = self.slots.at(slot)
        if s.runs():
            with nogil:  # a full ring waits for its reader, who needs the GIL
                self.slots.finish(s, slot, MULLAMA_FINISH_CANCELLED, -1, 0)
                self.out.wake.signal()
        if s.state == MULLAMA_SLOT_DONE:
            self.slots.clear(slot)
            self.publish()

    def close_slot(self, int slot, *, bint retain=True):
        """After a finish: keep the slot's KV as a prefix for later prompts, or free it. Returns tokens retained."""
        self.check_slot(slot)
        cdef Slot * s = self.slots.at(slot)
        if s.state != MULLAMA_SLOT_DONE:
            raise RuntimeError(f"slot {slot} has no finished request")
        cdef uint64_t handle = s.handle
        if retain and not s.poisoned and s.shifted == 0 and s.n_past > 0:
            s.tokens.resize(s.n_past)
            s.end_request()
            self.slots.retain(slot, s.n_past)
        else:
            self.slots.clear(slot)
        self.out.site(MULLAMA_SITE_CLOSE, slot, handle, s.n_past, 0)
        return s.n_past

    def evict(self, int slot, int lost=-1):
        """Drop a retained prefix. Returns the number of tokens (cells) freed.

        ``lost``: how many of them are cached nowhere else, for the counter of evicted tokens; -1: all.
        """
        self.check_slot(slot)
        cdef int n = self.slots.at(slot).n_past
        if self.slots.at(slot).state != MULLAMA_SLOT_RETAINED:
            return 0
        self.slots.clear(slot)
        self.note_evicted(n if lost < 0 else lost)
        self.out.site(MULLAMA_SITE_EVICT, slot, 0, n, 0)
        return n

    def exchange(self, int a, int b):
        """Swap the contents of two slots, whatever they hold; KV is copied bit by bit. Returns bytes moved.

        Running slots have to be a gap-free range of the lowest ids for a decode to be one ubatch.
        Raises ComputeFailed when llama.cpp does not take the state back; the sequences involved are then lost.
        """
        self.check_slot(a)
        self.check_slot(b)
        cdef size_t n_bytes = 0
        cdef bint ok = True
        if a != b:
            with nogil:
                ok = self.slots.exchange(a, b, n_bytes)
        if not ok:
            raise ComputeFailed("a sequence's KV could not be moved to another slot")
        return n_bytes

    # -- preempted sequences -------------------------------------------------------------------------------------------

    def preempt(self, int slot, *, bint save):
        """Take a running sequence out of its slot, sampler, held-back text and all. Returns it Parked.

        ``save``: its KV goes to host memory, for ``resume`` to restore bit by bit. Otherwise (and when llama.cpp does
        not hand the state out) the slot retains it as a prefix like any other, and what is gone when the sequence
        comes back is computed again.
        """
        self.check_slot(slot)
        if not self.slots.at(slot).runs():
            raise RuntimeError(f"slot {slot} has no running sequence")
        cdef Parked parked = Parked.__new__(Parked)
        parked.model = self.model
        parked.take_from(&self.slots, slot, save)
        return parked

    def resume(self, int slot, Parked parked not None, *, int reuse=0, int evicted=0):
        """Put a preempted sequence into a free or retained slot, where it goes on as if nothing had happened.

        ``reuse``: tokens of what the slot retains that are its own, when its KV was not saved; ``evicted``: cached
        tokens given up for it. ``parked`` is empty afterwards.
        """
        self.check_slot(slot)
        if self.slots.at(slot).open():
            raise RuntimeError(f"slot {slot} is in use")
        if parked.slot.handle == 0:
            raise RuntimeError("this sequence has been resumed or ended already")
        parked.put_into(&self.slots, slot, reuse)
        self.slots.at(slot).row.kv_cache_evict += evicted

    def cancel_parked(self, Parked parked not None):
        """End a preempted sequence (finish record CANCELLED). Harmless when it was resumed or has ended."""
        if parked.slot.handle == 0:
            return
        parked.slot.row.preempted_ns += now_ns() - parked.since_ns
        parked.slot.n_past = 0
        with nogil:
            self.slots.finish(&parked.slot, -1, MULLAMA_FINISH_CANCELLED, -1, 0)
            self.out.wake.signal()
        parked.slot.end_request()
        parked.forget(&self.slots)
        self.publish()

    def let_go(self, Parked parked not None):
        """Give up a preempted sequence whose KV was not saved: another core takes it in."""
        if parked.saved or parked.slot.handle == 0:
            raise ValueError("only a preempted sequence without saved KV can change its core")
        self.out.counters.parked -= 1

    def take_in(self, Parked parked not None, uint64_t handle, tokens=None, params=None, adapters=(), *,
                int n_prompt=0):
        """Know a preempted sequence that another core has let go by ``handle``; ``resume`` goes on with it.

        Where the other model's token ids mean something else, ``tokens`` are the sequence's text in this vocabulary
        (the first ``n_prompt`` of them are the prompt) and ``params`` the request's sampling parameters, of which the
        sampler is made anew. ``adapters`` are this core's. Raises InvalidRequest when it does not fit; then the
        sequence is as it was.
        """
        parked.adopt(self.model, self.slots.n_ctx, handle, tokens, n_prompt, params, adapters)
        self.out.counters.parked += 1

    def drop_saved(self, Parked parked not None):
        """Give up the saved KV of a preempted sequence; it is computed again when the sequence comes back."""
        if parked.saved:
            parked.drop(&self.slots)
            parked.slot.n_past = 0

    def parked_bytes(self):
        """Host memory of the saved KV of preempted sequences."""
        return self.out.counters.parked_bytes

    # -- llama.cpp's own view of the cells -----------------------------------------------------------------------------

    def cells(self):
        """llama.cpp's own count of KV cells, by slot: {"size", "caches", "used": [..a slot..], "recurrent": [..]}.

        ``used`` counts the full-attention cache (the sliding-window one holds fewer), ``recurrent`` the live states.
        """
        self.check_slot(0)
        cdef int i
        cdef int n_caches = llama_cells_n_caches(self.slots.ctx)
        cdef vector[llama_seq_id] owner
        used = [0] * self.n_slots
        window = [0] * self.n_slots
        for i in range(self.n_slots):
            if n_caches > 0:
                used[i] = llama_cells_used(self.slots.ctx, 0, 0 if self.unified else i, i)
            if n_caches > 1:
                window[i] = llama_cells_used(self.slots.ctx, 1, 0 if self.unified else i, i)
        owner.resize(1024)
        n = llama_cells_recurrent(self.slots.ctx, owner.data(), <uint32_t> owner.size())
        return {"caches": n_caches, "streams": llama_cells_n_streams(self.slots.ctx, 0) if n_caches > 0 else 0,
                "total_used": sum(llama_cells_used(self.slots.ctx, 0, i, -1)
                                  for i in range(llama_cells_n_streams(self.slots.ctx, 0))) if n_caches > 0 else 0,
                "size": llama_cells_size(self.slots.ctx, 0) if n_caches > 0 else 0,
                "used": used, "window": window, "recurrent": [owner[i] for i in range(n)]}

    def cell_runs(self, int slot, int cache=0):
        """The cells of a slot's stream as runs of neighbours: (first cell, number of cells, owner or -1), in order."""
        self.check_slot(slot)
        cdef uint32_t size = llama_cells_size(self.slots.ctx, cache)
        cdef vector[llama_pos] pos
        cdef vector[llama_seq_id] owner
        cdef uint32_t first = 0, i, n
        pos.resize(size)
        owner.resize(size)
        with nogil:
            n = llama_cells_read(self.slots.ctx, cache, 0 if self.unified else slot, pos.data(), owner.data(), size)
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
            n = self.slots.at(i).n_past
            if truth["caches"] > 0 and truth["used"][i] != n:
                found.append(f"slot {i}: {n} tokens are accounted for, llama.cpp holds {truth['used'][i]} cells")
            if self.slots.at(i).state == MULLAMA_SLOT_FREE and n != 0:
                found.append(f"slot {i} is free but has {n} tokens")
            if n > <int> self.slots.at(i).tokens.size():
                found.append(f"slot {i}: KV of {n} tokens, {self.slots.at(i).tokens.size()} known")
        return found

    # -- for tests only ------------------------------------------------------------------------------------------------

    def ring_usage(self):
        """For tests: (bytes used, capacity) of the token ring."""
        return self.out.ring.used(), self.out.ring.capacity()

    def inject_nan(self, int slot):
        """Fault injection for tests: the next logits of this slot hold a NaN."""
        self.check_slot(slot)
        self.loop.fault_slot = slot

    def damage_parked(self, Parked parked not None):
        """Fault injection for tests: the saved KV of a preempted sequence no longer is what llama.cpp wrote."""
        cdef size_t n = parked.state.size() // 2
        self.out.counters.parked_bytes -= parked.state.size() - n
        parked.state.resize(n)
