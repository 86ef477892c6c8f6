"""A llama.cpp context on a model, and what follows from the two: limits and abilities.

It computes nothing and owns no thread, so it can be made on any thread while another context is at work; a Core takes
it over (loop.pyx), also from a Core's context before it (carrier.pyx).
"""

cimport cython

from mullama._core.llama cimport *
from mullama._core.model.model cimport Model
from mullama.errors import InvalidRequest, ModelLoadError
from mullama.types import CELL_TYPES, rows_of_logits


@cython.no_gc_clear  # the context must be freed before the model that it points into
cdef class Context:

    def __cinit__(self):
        self.ctx = NULL
        self.mem = NULL

    def __init__(self, Model model not None, *, int n_slots, int n_ctx, int n_batch=512, flash_attn="auto",
                 type_k="f16", type_v="f16", int unified_cells=0, bint reference=False, bint embeds=False,
                 bint ranks=False):
        """Allocate ``n_slots`` sequences of ``n_ctx`` tokens each (rounded up to 256 by llama.cpp).

        ``n_batch`` is the most tokens one decode computes. Each slot has cells of its own (a stream), unless there are
        ``unified_cells`` for all of them together. ``type_k``, ``type_v``: types of the cells, by ggml's names.
        ``reference``: compute so that results do not depend on what is computed beside them (CPU; slower).
        ``embeds``: no text but the vectors of ``n_batch`` tokens, of all slots together, one decode at a time; with
        ``ranks`` what the model's head says of each prompt.
        Raises ModelLoadError when it does not fit.
        """
        model.check()
        if model.vocab_only:
            raise ModelLoadError("this model was loaded without weights")
        facts = model.facts()
        is_plain = facts["has_decoder"] and not facts["has_encoder"]
        if facts["is_diffusion"] or not (is_plain or (embeds and not facts["has_decoder"])):
            raise unfit(model, facts)
        if not 1 <= n_slots <= <int> llama_max_parallel_sequences():
            raise ModelLoadError(f"parallel must be 1 to {llama_max_parallel_sequences()}, got {n_slots}",
                                 param="parallel")
        if not 32 <= n_batch <= 1 << 14:
            raise ModelLoadError(f"n_batch must be 32 to 16384, got {n_batch}", param="batch_size")
        if not 16 <= n_ctx <= 1 << 24:
            raise ModelLoadError(f"n_ctx must be 16 to 16777216, got {n_ctx}", param="ctx_size")
        cdef ggml_type k_type = cell_type(type_k, "kv_type_k")
        cdef ggml_type v_type = cell_type(type_v, "kv_type_v")
        if unified_cells and not 256 <= unified_cells <= 1 << 28:
            raise ModelLoadError(f"unified_cells must be 256 to 268435456, got {unified_cells}", param="kv_tokens")
        self.wanted = {"n_slots": n_slots, "n_ctx": n_ctx, "n_batch": n_batch, "flash_attn": flash_attn,
                       "type_k": type_k, "type_v": type_v, "unified_cells": unified_cells, "reference": reference,
                       "embeds": embeds, "ranks": ranks}
        self.model = model
        self.n_slots = n_slots
        self.reference = reference
        self.embeds, self.ranks = embeds, embeds and ranks
        self.unified = unified_cells > 0 or embeds
        self.n_batch = max(n_batch, n_slots)
        self.n_swa = facts["n_swa"]
        self.can_trim = not (facts["is_recurrent"] or facts["is_hybrid"])
        self.needs_checkpoint = not self.can_trim or self.n_swa > 0
        cdef llama_context_params params = llama_context_default_params()
        # llama.cpp divides n_ctx by the number of streams and rounds up to 256 cells.
        n_ctx = (n_ctx + 255) // 256 * 256
        if embeds:
            unified_cells = self.n_batch
        params.n_ctx = n_ctx * n_slots if not self.unified else (unified_cells + 255) // 256 * 256
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = n_slots
        self.n_rows = self.n_batch if embeds else rows_of_logits(model.n_vocab, n_slots, self.n_batch)
        params.n_outputs_max = self.n_rows
        params.embeddings = embeds
        if embeds:  # what becomes of the vectors of a prompt's tokens is each request's affair (embedding_batch.h)
            params.pooling_type = LLAMA_POOLING_TYPE_NONE
            if ranks:
                params.pooling_type = LLAMA_POOLING_TYPE_RANK
        params.flash_attn_type = {"auto": LLAMA_FLASH_ATTN_TYPE_AUTO, "on": LLAMA_FLASH_ATTN_TYPE_ENABLED,
                                  "off": LLAMA_FLASH_ATTN_TYPE_DISABLED}[flash_attn]
        params.kv_unified = self.unified
        params.type_k = k_type
        params.type_v = v_type
        params.swa_full = False
        params.no_perf = True
        with nogil:
            self.ctx = llama_init_from_model(model.ptr, params)
        if self.ctx is NULL:
            from mullama._core.model.model import _last_error
            raise ModelLoadError(f"no context of {n_slots} x {n_ctx} tokens: {_last_error('llama.cpp refused')}")
        if llama_get_memory(self.ctx) is NULL and not embeds:
            # Embedding and decision models: each decode outputs every token, which is an assertion.
            llama_free(self.ctx)
            self.ctx = NULL
            raise unfit(model, facts)
        self.n_ctx = min(llama_n_ctx_seq(self.ctx), n_ctx)
        if reference and not llama_set_reference(self.ctx, True):
            llama_free(self.ctx)
            self.ctx = NULL
            raise ModelLoadError("deterministic computation needs the CPU backend", param="deterministic")
        model.n_users += 1
        self.counted = True
        self.pid = process_id()
        self.mem = llama_get_memory(self.ctx)
        self.token_bytes = llama_cells_token_bytes(self.ctx, 0)
        self.can_shift = self.can_trim and self.n_swa == 0 and not embeds and llama_memory_can_shift(self.mem) \
            and self.token_bytes > 0
        cdef llama_token token
        for token in range(model.n_vocab):
            if llama_vocab_is_eog(model.vocab, token):
                self.eog.push_back(token)

    def __dealloc__(self):
        self.release()

    cdef void release(self) noexcept:
        # Out of reach first: another thread may ask for the same while the GIL is released.
        cdef llama_context * ctx = self.ctx
        self.ctx = NULL
        if ctx is not NULL and self.pid == process_id():
            with nogil:
                llama_free(ctx)
            if self.counted:
                self.counted = False
                self.model.n_users -= 1

    def close(self):
        """Free it. Idempotent. Must not be called while a Core works with it."""
        self.release()

    def like(self, Model model not None):
        """Another context of the same sizes and types, on another model. Raises ModelLoadError."""
        return Context(model, **self.wanted)

    cdef int check_place(self, Context other) except -1:
        """Raise InvalidRequest where the slots of a core on this context cannot go on with the other one."""
        for name, ours, theirs in (
            ("slots", self.n_slots, other.n_slots),
            ("tokens of context", self.n_ctx, other.n_ctx),
            ("tokens of a batch", self.n_batch, other.n_batch),
            ("bytes of KV a token", self.token_bytes, other.token_bytes),
            ("layout", self.unified, other.unified),
            ("tokens in the vocabulary", self.model.n_vocab, other.model.n_vocab),
            ("kind of memory", self.needs_checkpoint, other.needs_checkpoint),
        ):
            if ours != theirs:
                raise InvalidRequest(f"the {name} differ: {ours} now, {theirs} in the new model")
        return 0

    def memory(self):
        """Bytes allocated for this context and its model, by kind of buffer.

        {"weights": {name: bytes}, "kv": {...}, "compute": {...}, "output": bytes, "is_host": {name: bool}}. Weights are
        counted as they lie in memory: those of a mapped file are pages of the file. "output" is the buffer of logits
        (see Core.memory).
        """
        if self.ctx is NULL:
            raise RuntimeError("this context was closed")
        cdef vector[BufferUse] uses = memory_of(self.ctx)
        cdef size_t i
        found = {"weights": {}, "kv": {}, "compute": {}, "is_host": {}}
        for i in range(uses.size()):
            name = uses[i].name.decode()
            found["is_host"][name] = bool(uses[i].is_host)
            for part, size in (("weights", uses[i].model), ("kv", uses[i].context), ("compute", uses[i].compute)):
                if size:
                    found[part][name] = found[part].get(name, 0) + size
        found["output"] = self.n_slots * self.model.n_vocab * sizeof(float)
        if self.embeds:
            found["output"] = self.n_batch * llama_model_n_embd_out(self.model.ptr) * sizeof(float)
        return found

    def buffers(self):
        """Where its buffers and its model's lie: (part, name of the kind, address, bytes), each once.

        Parts: "weights", "full", "window", "recurrent", "compute". The address is 0 for memory of a device. It says
        where pages lie, for observe.memory; the buffer may be gone when somebody looks. Between two decodes only.
        """
        if self.ctx is NULL:
            raise RuntimeError("this context was closed")
        cdef vector[llama_buffer_at] at
        at.resize(llama_buffers(self.ctx, NULL, 0))
        llama_buffers(self.ctx, at.data(), <int32_t> at.size())
        parts = ("weights", "full", "window", "recurrent", "compute")
        return [(parts[at[i].part], at[i].name.decode(), <size_t> at[i].base, at[i].size) for i in range(at.size())]

    def cell_bytes(self):
        """Bytes of one cell by cache: {"full": …, "window": …, "recurrent": …}, those that there are.

        A recurrent cell is the state of one sequence.
        """
        if self.ctx is NULL:
            raise RuntimeError("this context was closed")
        sizes = {}
        for part, _, _, size in self.buffers():
            sizes[part] = sizes.get(part, 0) + size
        found = {}
        cdef int cache
        cdef size_t n_cells
        for cache, part in enumerate(("full", "window")):
            n_cells = <size_t> llama_cells_n_streams(self.ctx, cache) * llama_cells_size(self.ctx, cache)
            if n_cells and part in sizes:
                # Cells without rows (M-RoPE): a share of the buffer.
                found[part] = llama_cells_token_bytes(self.ctx, cache) or sizes[part] // n_cells
        if "recurrent" in sizes:
            found["recurrent"] = sizes["recurrent"] // self.n_slots
        return found


cdef object unfit(Model model, facts):
    return ModelLoadError(f"{model.path}: only decoder-only text models can be served "
                          f"({facts['architecture']} is not one)")


cdef ggml_type cell_type(name, param) except *:
    """A type of KV cells by ggml's name. Raises ModelLoadError with the valid ones."""
    cdef int i
    cdef const char * found
    if name in CELL_TYPES:
        for i in range(<int> GGML_TYPE_COUNT):
            found = ggml_type_name(<ggml_type> i)
            if found is not NULL and found.decode() == name:
                return <ggml_type> i
    raise ModelLoadError(f"{param} must be one of {', '.join(CELL_TYPES)}, not '{name}'", param=param)
