"""LoRA adapters, and sets of them.

nogil code has sets by shared pointers, never an Adapter. What a set points to is exchanged or freed by the engine
thread alone, when no context has it in charge; loading, in any thread, has a lock of its own in C++ (adapters.h).
"""

from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr

from mullama._core.llama cimport llama_context, llama_model
from mullama._core.model.model cimport Model


cdef extern from "adapters.h" namespace "mullama" nogil:
    cppclass Lora:
        void free()
        void exchange(Lora & other)
    ctypedef shared_ptr[Lora] LoraPtr "mullama::LoraPtr"
    cppclass LoraSet:
        cbool is_new
    ctypedef shared_ptr[LoraSet] LoraSetPtr "mullama::LoraSetPtr"
    LoraPtr load_lora(llama_model * model, const char * path) except +
    size_t lora_bytes(const LoraPtr & lora)
    size_t lora_host_bytes(const LoraPtr & lora)
    size_t lora_tensors(const LoraPtr & lora)
    LoraSetPtr new_set() except +
    cbool add_to_set(const LoraSetPtr & set, const LoraPtr & lora, float scale) except +
    cbool same_set(const LoraSetPtr & a, const LoraSetPtr & b)
    cbool use_set(llama_context * ctx, const LoraSetPtr & set)


cdef class Adapter:
    cdef LoraPtr lora
    cdef readonly Model model          # that it is on, or was
    cdef readonly bint is_on           # so that it can be used
    cdef readonly str path
    cdef readonly size_t n_bytes
    cdef readonly size_t n_host_bytes  # of them, in this process's memory
    cdef readonly size_t n_matrices    # of the model that it changes

    cdef void release(self) noexcept
    cdef void take_off(self) noexcept


cdef LoraSetPtr build_set(Model model, adapters) except *
