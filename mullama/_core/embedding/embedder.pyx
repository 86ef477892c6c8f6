"""A context that makes vectors of prompts: what computes them, and what tells of it.

The engine thread owns an Embedder: every method is called from that thread, except ``interrupt`` and ``abort``.
"""

cimport cython

from mullama._core.compute.arbiter cimport Arbiter
from mullama._core.compute.compute cimport Trial
from mullama._core.compute.governor cimport Governor
from mullama._core.llama cimport *
from mullama._core.model.context cimport Context
from mullama._core.model.model cimport Model
from mullama._core.output.output cimport PageBlocks
from mullama._core.output.page cimport page_at
from mullama.abi cimport *
from mullama._core.compute.arbiter import arbiter as default_arbiter
from mullama.errors import ComputeFailed, ModelLoadError
from mullama.types import Pooling

#: The numbers of embedding_batch.h.
POOLS = {Pooling.NONE: 0, Pooling.MEAN: 1, Pooling.CLS: 2, Pooling.LAST: 3, Pooling.RANK: 4}


@cython.no_gc_clear  # the context must be freed before the model that it points into
@cython.final
cdef class Embedder:
    """An embedding context, and all that it takes to compute with it and to tell of it."""

    def __cinit__(self):
        self.parts = new EmbeddingParts()
        self.parts.out.stop = &self.parts.compute.deadline.stop
        self.fault = -1

    def __init__(self, Model model not None, *, int n_ctx, int n_batch=0, bint ranks=False, flash_attn="auto",
                 bint reference=False, int n_threads=1, bint threads_fixed=False, page_path=None,
                 bint page_needed=True, Arbiter turns=None, bint quick=False):
        """A Context (see there) for prompts of ``n_ctx`` tokens, of ``n_batch`` together (0: as many as one has).

        ``ranks``: what the model's head says instead of vectors. Else as for a Core. Raises ModelLoadError.
        """
        if not 1 <= n_threads <= 512:
            raise ModelLoadError(f"n_threads must be 1 to 512, got {n_threads}", param="threads")
        self.turns = turns or default_arbiter
        self.pid = process_id()
        self.model = model
        self.n_ctx = min(n_ctx, llama_model_n_ctx_train(model.ptr) or n_ctx) if model.ptr is not NULL else n_ctx
        self.n_batch = max(n_batch, self.n_ctx, 32)
        self.n_slots = min(self.n_batch // 4, <int> llama_max_parallel_sequences())
        self.context = Context(
            model, n_slots=self.n_slots, n_ctx=max(self.n_ctx, 16), n_batch=self.n_batch, flash_attn=flash_attn,
            reference=reference, embeds=True, ranks=ranks)
        self.n_embd = llama_model_n_cls_out(model.ptr) if ranks else llama_model_n_embd_out(model.ptr)
        cdef bint has_pool
        with nogil:
            has_pool = self.parts.compute.open(n_threads, self.n_batch)
        if not has_pool:
            raise ModelLoadError("the thread pool could not be created")
        self.parts.compute.turns = self.turns.table.get()
        self.parts.compute.seat = self.parts.compute.turns.join()
        self.governor = Governor(n_threads, threads_fixed, self.parts.compute.neighbours.cores())
        self.parts.compute.governor = self.governor.state.get()
        self.parts.compute.can_abort = self.context.can_trim
        self.parts.compute.attach(self.context.ctx)
        try:
            self.page = page_at(1, page_path, page_needed)
            self.parts.out.page = self.page.blocks
            self.warm_up(quick)
            self.publish(0, 0)
        except BaseException:
            self.close()
            raise

    cdef int warm_up(self, bint quick) except -1:
        """The first decodes, which the governor learns from. Raises ModelLoadError."""
        cdef Trial got
        with nogil:
            got = self.parts.compute.warm_up(self.context.ctx, self.parts.compute.governor[0], quick)
        if got == Trial.stopped:
            raise ModelLoadError("loading was given up")
        if got == Trial.failed:
            raise ModelLoadError(
                f"the first decode failed with code {self.parts.compute.code} "
                f"{self.parts.compute.guard.message.decode()}")
        return 0

    def __dealloc__(self):
        self.release()
        del self.parts

    def close(self):
        """Free the context and the threads. Idempotent; no other method may be called after it."""
        self.release()
        self.parts.out.page = PageBlocks()
        if self.page is not None:
            self.page.close()

    cdef void release(self) noexcept:
        if self.pid != process_id():
            return  # a child of the process whose threads these are
        if self.context is not None:
            self.context.release()
        with nogil:
            self.parts.compute.close()

    # -- computing ------------------------------------------------------------------------------------------------

    def run(self, prompts, n_waiting=0):
        """Compute one ubatch: (tokens, pooling, normalised) each. Returns what became of each, in their order.

        That is 32-bit floats, as bytes: ``n_embd`` of them (Pooling.NONE: for each token), or None where they are not
        finite. Raises ValueError for prompts that are too many, empty or too long, or tokens that there are not;
        ComputeFailed when llama.cpp failed.
        """
        cdef llama_token token
        cdef int code, before
        cdef size_t i
        if self.context is None or self.context.ctx is NULL:
            raise RuntimeError("this embedder was closed")
        if not 0 < len(prompts) <= self.n_slots:
            raise ValueError(f"a ubatch has 1 to {self.n_slots} prompts, got {len(prompts)}")
        self.parts.batch.clear()
        for tokens, pooling, normalised in prompts:
            before = self.parts.batch.n_tokens
            if not 0 < len(tokens) <= min(self.n_ctx, self.n_batch - before):
                raise ValueError(f"a prompt of {len(tokens)} tokens does not fit")
            if (pooling == Pooling.RANK) != self.context.ranks:
                raise ValueError(f"this context does not compute the pooling {pooling}")
            self.parts.batch.begin(POOLS[pooling], normalised)
            for token in tokens:
                if not 0 <= token < self.model.n_vocab:
                    raise ValueError(f"token id {token} is outside the vocabulary")
                self.parts.batch.put(self.parts.compute, token)
        self.publish(<int> self.parts.batch.prompts.size(), n_waiting)
        with nogil:
            code = self.parts.batch.run(self.context.ctx, self.parts.compute, self.parts.out)
        if code != 0:
            self.parts.out.counters.failed += self.parts.batch.prompts.size()
            self.publish(0, n_waiting)
            why = self.parts.compute.guard.message.decode("utf-8", "replace") if code > 2 else ""
            raise ComputeFailed(f"llama.cpp could not compute the prompts (code {code}) {why}".strip())
        if 0 <= self.fault < <int> self.parts.batch.prompts.size():
            self.parts.batch.prompts[self.fault].is_finite = False
            self.fault = -1
        found = []
        for i in range(self.parts.batch.prompts.size()):
            if self.parts.batch.prompts[i].is_finite:
                self.parts.out.counters.finished_stop += 1
                found.append((<const char *> (self.parts.batch.values.data() + self.parts.batch.prompts[i].at))
                             [:self.parts.batch.prompts[i].size * sizeof(float)])
            else:
                self.parts.out.counters.failed += 1
                found.append(None)
        self.publish(0, n_waiting)
        return found

    def pause(self):
        """Put the compute threads to sleep; ``run`` wakes them."""
        with nogil:
            self.parts.compute.pause()

    def interrupt(self):
        """Nothing: a run is one ubatch. Any thread."""

    def abort(self):
        """Give up the running decode; ``run`` raises and must not be called again. Any thread."""
        self.parts.compute.deadline.stop.set(1)

    # -- what it tells --------------------------------------------------------------------------------------------

    @property
    def seat(self):
        """Its number among the engines of the process."""
        return self.parts.compute.seat

    @property
    def can_shift(self):
        """Whether older tokens can make room: there are none."""
        return self.context.can_shift

    @property
    def unified(self):
        """Whether all prompts share one context: they do."""
        return self.context.unified

    cdef void publish(self, int n_running, int n_waiting) noexcept:
        """Bring the page up to date."""
        self.parts.out.counters.running = n_running
        self.parts.out.counters.waiting = n_waiting
        self.parts.out.counters.threads = self.parts.compute.threads
        self.parts.out.counters.thread_changes = self.parts.compute.governor.n_changes()
        self.parts.out.put_counters()

    def note_opened(self, n):
        """Count prompts that have come."""
        self.parts.out.counters.opened += n

    def note_cancelled(self, n):
        """Count prompts that nobody waits for any more."""
        self.parts.out.counters.cancelled += n

    def note_idle(self, ns, n_waiting):
        """Account a wait for commands; keeps the heartbeat fresh."""
        self.parts.compute.busy_since = 0
        self.parts.out.site(MULLAMA_SITE_IDLE, -1, 0, ns, 0)
        self.publish(0, n_waiting)

    def memory(self):
        """Bytes allocated, by part and kind of buffer (see Context.memory)."""
        return self.context.memory()

    # -- for tests only -------------------------------------------------------------------------------------------

    def inject_nan(self, int prompt):
        """Fault injection for tests: this prompt of the next ubatch is not finite."""
        self.fault = prompt
