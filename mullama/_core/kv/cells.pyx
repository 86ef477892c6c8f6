"""KV in and out of the slots of a Core: rows of single tokens, checkpoints, copies between slots.

*Rows* are the K and V of a stretch of tokens, packed token by token over all layers, so that they can be cut anywhere.
They exist for full attention. What cannot be cut (the cells of a sliding window, recurrent state) travels as a
*checkpoint*, which is valid at one position only. A slot of a model with both is restored by rows [0, n) and a
checkpoint made at n.

Everything belongs to the engine thread. Bytes are copied without the GIL and are the same in both directions.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t

from mullama._core.llama cimport *
from mullama._core.output.clock cimport now_ns
from mullama._core.core.core cimport Core
from mullama._core.core.slots cimport Slot
from mullama.abi cimport *

cdef enum:
    CHUNK = 64  # tokens of one bytes object: cutting rows copies one of them at most

CHUNK_TOKENS = CHUNK


cdef class Cells:
    """The KV of a Core. ``token_bytes``: bytes of a token's rows, 0 where there are none (``has_rows``).

    ``needs_checkpoint``: a prefix is of use only at a position where a checkpoint was made.
    """

    def __init__(self, Core core not None):
        self.core = core
        self.slots = &core.slots
        self.out = &core.out
        facts = core.model.facts()
        self.needs_checkpoint = facts["is_recurrent"] or facts["is_hybrid"] or facts["n_swa"] > 0
        self.token_bytes = llama_cells_token_bytes(core.slots.ctx, 0)
        self.has_rows = self.token_bytes > 0

    @property
    def can_store(self):
        """Whether KV can leave the context in parts: its rows can be read, or all there is are checkpoints."""
        self.core.check_slot(0)
        return self.has_rows or llama_cells_n_caches(self.slots.ctx) == 0

    cdef int check_rows(self, int slot, int p0, int p1) except -1:
        self.core.check_slot(slot)
        if not 0 <= p0 < p1 <= self.slots.at(slot).n_past:
            raise ValueError(f"slot {slot} holds KV of [0, {self.slots.at(slot).n_past}), not of [{p0}, {p1})")
        return 0

    def save(self, int slot, int p0, int p1):
        """Rows of the tokens [p0, p1) of a slot, as a list of bytes of CHUNK tokens each (the last one of the rest).

        Raises ValueError for tokens that the slot has no KV of, RuntimeError when llama.cpp does not hold them.
        """
        self.check_rows(slot, p0, p1)
        cdef int at, end
        cdef bint ok
        cdef void * out
        chunks = []
        if not self.has_rows:
            return chunks
        cdef uint64_t start = now_ns()
        at = p0
        while at < p1:
            end = min(at + CHUNK, p1)
            chunk = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> (self.token_bytes * (end - at)))
            out = PyBytes_AS_STRING(chunk)
            with nogil:
                ok = llama_cells_get_rows(self.slots.ctx, 0, slot, at, end, out)
            if not ok:
                raise RuntimeError(f"llama.cpp does not hold the tokens [{at}, {end}) of slot {slot}")
            chunks.append(chunk)
            at = end
        self.out.counters.kv_store_bytes += self.token_bytes * (p1 - p0)
        self.out.counters.kv_store_ns += now_ns() - start
        self.out.site(MULLAMA_SITE_STORE, slot, self.slots.at(slot).handle, p1 - p0, self.token_bytes * (p1 - p0))
        return chunks

    def extend(self, int slot, tokens, chunks, *, bytes checkpoint=None):
        """Append rows to a free or retained slot, which then retains the tokens as well. Returns whether that worked.

        ``chunks`` are bytes of whole tokens' rows, in order, of all ``tokens``. With a ``checkpoint`` the slot can
        go on from exactly here. When something does not fit, the slot is as it was, or empty.
        """
        self.core.check_slot(slot)
        cdef Slot * s = self.slots.at(slot)
        cdef int at = s.n_past, start = s.n_past, n
        cdef const uint8_t * data
        cdef size_t size = 0
        cdef bint ok = True
        cdef uint64_t began = now_ns()
        if s.open():
            raise RuntimeError(f"slot {slot} is in use")
        n_new = len(tokens)
        for token in tokens:
            if not 0 <= token < self.core.model.n_vocab:
                raise ValueError(f"token id {token} is outside the vocabulary")
        if n_new < 1 or start + n_new > self.slots.n_ctx:
            raise ValueError(f"slot {slot} has {start} of {self.slots.n_ctx} tokens: {n_new} more do not fit")
        sizes = [len(chunk) for chunk in chunks]
        if self.has_rows and (sum(sizes) != n_new * self.token_bytes or any(one % self.token_bytes for one in sizes)):
            raise ValueError(f"{sum(sizes)} bytes are not the rows of {n_new} tokens")
        if self.needs_checkpoint and checkpoint is None:
            raise ValueError("this model's KV is of no use without a checkpoint")
        if self.has_rows:
            for chunk in chunks:
                data = <const uint8_t *> PyBytes_AS_STRING(chunk)
                n = len(chunk) // self.token_bytes
                with nogil:
                    ok = llama_cells_put_rows(self.slots.ctx, 0, slot, at, at + n, data)
                if not ok:
                    break
                at += n
        else:
            at += n_new
        if ok and checkpoint is not None:
            data = <const uint8_t *> PyBytes_AS_STRING(checkpoint)
            size = len(checkpoint)
            ok = llama_state_seq_set_data_ext(self.slots.ctx, data, size, slot,
                                              LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == size
        if not ok:
            self.lose_from(slot, start)
            return False
        for token in tokens:
            s.tokens.push_back(token)
        self.slots.retain(slot, at)
        size += self.token_bytes * n_new
        self.out.counters.kv_restore_bytes += size
        self.out.counters.kv_restore_ns += now_ns() - began
        self.out.site(MULLAMA_SITE_RESTORE, slot, 0, n_new, size)
        return True

    cdef int lose_from(self, int slot, int n) except -1:
        """Take back what a failed ``extend`` put behind the first ``n`` tokens; all of them where that cannot be."""
        if self.needs_checkpoint or n == 0 or not self.slots.cut(slot, n):
            self.slots.clear(slot)
        return 0

    def copy(self, int src, int dst, int n):
        """Copy the first ``n`` tokens of a slot, whatever it does, into a free one, which then retains them.

        Where checkpoints are needed ``n`` must be all that the source holds. Returns whether that worked.
        """
        self.check_rows(src, 0, n)
        self.core.check_slot(dst)
        cdef Slot * s = self.slots.at(dst)
        if s.state != MULLAMA_SLOT_FREE or src == dst:
            raise RuntimeError(f"slot {dst} is not free")
        if self.needs_checkpoint and n != self.slots.at(src).n_past:
            raise ValueError("this model's KV can be copied as a whole only")
        cdef uint64_t start = now_ns()
        cdef size_t size = 0
        cdef uint8_t * state
        cdef bint ok = True
        if self.core.unified and not self.needs_checkpoint:
            llama_memory_seq_cp(self.slots.mem, src, dst, 0, n)  # the cells are shared
        elif self.needs_checkpoint or not self.has_rows:
            with nogil:  # as a whole, whatever it is made of
                size = llama_state_seq_get_size(self.slots.ctx, src)
                state = self.slots.staging(size)
                ok = llama_state_seq_get_data(self.slots.ctx, state, size, src) == size \
                    and llama_state_seq_set_data(self.slots.ctx, state, size, dst) == size
            if ok and n < self.slots.at(src).n_past:
                ok = llama_memory_seq_rm(self.slots.mem, dst, n, -1)
        else:
            with nogil:
                ok = llama_cells_carry_rows(self.slots.ctx, src, self.slots.ctx, dst, 0, 0, n)
            size = self.token_bytes * n
        if not ok:
            self.slots.clear(dst)
            return False
        s.tokens.assign(self.slots.at(src).tokens.begin(), self.slots.at(src).tokens.begin() + n)
        self.slots.retain(dst, n)
        self.out.counters.kv_copy_bytes += size
        self.out.counters.kv_copy_ns += now_ns() - start
        self.out.site(MULLAMA_SITE_COPY, dst, self.slots.at(src).handle, src, n)
        return True

    def trim(self, int slot, int n):
        """Cut what a slot retains to its first ``n`` tokens. Returns those left: 0 where that cannot be done."""
        self.core.check_slot(slot)
        cdef Slot * s = self.slots.at(slot)
        if s.state != MULLAMA_SLOT_RETAINED or n < 0:
            raise ValueError(f"slot {slot} retains nothing that could be cut to {n} tokens")
        if n < s.n_past:
            if self.can_cut(slot, n) and self.slots.cut(slot, n):
                s.n_past = n
                s.tokens.resize(n)
            else:
                self.slots.clear(slot)
        return s.n_past

    def can_cut(self, int slot, int n):
        """Whether a slot could go on from its first ``n`` tokens."""
        self.core.check_slot(slot)
        cdef Slot * s = self.slots.at(slot)
        cdef llama_pos pos_min
        if n < 1 or n > s.n_past:
            return False
        if n == s.n_past:
            return True
        if not self.core.context.can_trim:
            return False
        if self.core.context.n_swa > 0:
            pos_min = llama_memory_seq_pos_min(self.slots.mem, slot)
            return pos_min == 0 or pos_min < n - self.core.context.n_swa
        return True

    def checkpoint(self, int slot):
        """What of a slot's KV cannot be cut, as it is now (after its n_past tokens); empty for full attention."""
        self.core.check_slot(slot)
        cdef size_t n
        cdef uint8_t * out
        if not self.needs_checkpoint or self.slots.at(slot).n_past == 0:
            return b""
        n = llama_state_seq_get_size_ext(self.slots.ctx, slot, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        found = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> n)
        out = <uint8_t *> PyBytes_AS_STRING(found)
        if llama_state_seq_get_data_ext(self.slots.ctx, out, n, slot, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) != n:
            raise RuntimeError(f"llama.cpp does not hand out the state of slot {slot}")
        return found

    def layers(self):
        """Where each layer's K and V lie in a token's rows: dicts of layer, type and (offset, bytes) of k and v."""
        self.core.check_slot(0)
        cdef llama_cells_layer at
        cdef int i
        found = []
        for i in range(llama_cells_n_layers(self.slots.ctx, 0)):
            if llama_cells_layer_at(self.slots.ctx, 0, i, &at):
                found.append({
                    "layer": at.layer,
                    "type_k": ggml_type_name(<ggml_type> at.type_k).decode(),
                    "type_v": ggml_type_name(<ggml_type> at.type_v).decode() if at.type_v >= 0 else None,
                    "k": (at.k_offset, at.k_bytes),
                    "v": (at.v_offset, at.v_bytes),
                })
        return found
