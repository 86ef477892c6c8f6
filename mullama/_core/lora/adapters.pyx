"""LoRA adapters: loaded onto a model, used by sequences in sets.

    adapter = Adapter(model, path)             any thread; the GIL is released, and the model may be in use
    core.open(…, adapters=[(adapter, 1.0)])    that sequence's set
    adapter.exchange(twin)                     the same file on another model: its sequences go on with that
    adapter.leave()                            it is freed with its model, until an exchange; its sequences stay
    adapter.close()                            when no sequence and no context uses it

llama.cpp applies adapters to a context, so that one decode has one set: the loop groups sequences by their sets.

SAFETY: llama.cpp trusts the file in much (types of metadata, shapes that only a decode meets). What is not known to be
sound is opened in a process of its own first: models/files/lora_file.py.
"""

cimport cython
from cython.operator cimport dereference

import math
import os

from mullama._core.llama cimport *
from mullama._core.model.model cimport Model
from mullama.errors import ModelLoadError


@cython.no_gc_clear  # it must be freed before the model that it is on
cdef class Adapter:

    def __init__(self, Model model not None, path):
        """Load a file onto a model. Raises ModelLoadError with llama.cpp's reason."""
        model.check()
        if model.vocab_only:
            raise ModelLoadError("this model was loaded without weights")
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise ModelLoadError(f"{self.path}: no such file")
        cdef bytes encoded = os.fsencode(self.path)
        cdef const char * c_path = encoded
        from mullama._core.model.model import _forget_errors, _last_error
        _forget_errors()
        model.enter()
        try:
            with nogil:
                self.lora = load_lora(model.ptr, c_path)
        finally:
            model.leave()
        if self.lora.get() is NULL:
            raise ModelLoadError(f"{self.path}: {_last_error('llama.cpp refused it')}")
        self.model = model
        model.n_users += 1
        self.is_on = True
        self.n_bytes = lora_bytes(self.lora)
        self.n_host_bytes = lora_host_bytes(self.lora)
        self.n_matrices = lora_tensors(self.lora)

    def __dealloc__(self):
        # One that a set still holds is freed with the set, and its model cannot be closed any more.
        if self.lora.use_count() <= 1:
            self.release()

    cdef void release(self) noexcept:
        self.take_off()
        self.lora.reset()

    cdef void take_off(self) noexcept:
        if self.is_on:
            with nogil:
                dereference(self.lora).free()
            self.is_on = False
            self.model.n_users -= 1

    def leave(self):
        """Free what is on the model, and stay for the sets that hold it: with them nothing is computed meanwhile.

        No context may have it in charge. Idempotent.
        """
        self.take_off()

    def exchange(self, Adapter twin not None):
        """Go on with what ``twin`` is, which another model may be under, and leave it what this one was.

        Sets that hold this one use the other's model from now on. No context may have either in charge.
        """
        if self.lora.get() is NULL or twin.lora.get() is NULL:
            raise RuntimeError(f"{self.path} was closed")
        dereference(self.lora).exchange(dereference(twin.lora))
        self.model, twin.model = twin.model, self.model
        self.is_on, twin.is_on = twin.is_on, self.is_on
        self.n_bytes, twin.n_bytes = twin.n_bytes, self.n_bytes
        self.n_host_bytes, twin.n_host_bytes = twin.n_host_bytes, self.n_host_bytes
        self.n_matrices, twin.n_matrices = twin.n_matrices, self.n_matrices

    def close(self):
        """Free it. Idempotent. Raises RuntimeError while a set holds it (see Core.drop_adapters)."""
        if self.lora.use_count() > 1:
            raise RuntimeError(f"{self.path} is in use")
        self.release()


cdef LoraSetPtr build_set(Model model, adapters) except *:
    """A set of (Adapter, scale); no set where all scales are 0. Raises ValueError for one that cannot be used."""
    cdef LoraSetPtr found
    cdef Adapter one
    for one, scale in adapters:
        if not one.is_on or one.model is not model:
            raise ValueError(f"the adapter {one.path} was closed or is of another model")
        if not math.isfinite(scale):
            raise ValueError("the scale of an adapter must be a finite number")
        if scale == 0:
            continue
        if found.get() is NULL:
            found = new_set()
        if not add_to_set(found, one.lora, scale):
            raise ValueError(f"the adapter {one.path} is named twice")
    return found
