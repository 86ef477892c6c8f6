"""Quantisation by llama.cpp. It writes in place, reports nothing and cannot be stopped: for a process of its own."""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, uint32_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from mullama._core.model.model import _last_error, init_backend
from mullama.errors import InvalidRequest, ModelLoadError

cdef extern from "llama.h" nogil:
    ctypedef enum llama_ftype:
        pass
    ctypedef struct llama_model_imatrix_data:
        const char * name
        const float * data
        size_t size
    ctypedef struct llama_model_quantize_params:
        int32_t nthread
        llama_ftype ftype
        cbool allow_requantize
        cbool only_copy
        const llama_model_imatrix_data * imatrix
    llama_model_quantize_params llama_model_quantize_default_params()
    uint32_t llama_model_quantize(const char * src, const char * dst,
                                  const llama_model_quantize_params * params) except +

# llama_ftype of llama.h
FTYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18,
    "Q5_0": 8, "Q5_1": 9, "Q5_K_S": 16, "Q5_K_M": 17,
    "Q4_0": 2, "Q4_1": 3, "Q4_K_S": 14, "Q4_K_M": 15, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4_MOE": 38,
    "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "IQ3_XXS": 23, "IQ3_XS": 22, "IQ3_S": 26, "IQ3_M": 27,
    "Q2_K": 10, "Q2_K_S": 21, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ2_M": 29,
    "IQ1_S": 24, "IQ1_M": 31, "TQ1_0": 36, "TQ2_0": 37,
}


def quantize_types():
    """Names of the types that ``quantize`` knows."""
    return list(FTYPES)


def quantize(src, dst, ftype, *, int n_threads=1, imatrix=None, bint allow_requantize=True, bint only_copy=False):
    """Write ``src``, a GGUF, quantised to ``ftype`` as ``dst``. The GIL is released. Returns the bytes written.

    ``imatrix``: by tensor name, the importance of each column as a buffer of 32-bit floats. Raises InvalidRequest for
    an unknown type, ModelLoadError with llama.cpp's reason; then ``dst`` may hold anything.
    """
    init_backend()
    if ftype not in FTYPES:
        raise InvalidRequest(f"'{ftype}' is not a quantisation type; there are {', '.join(FTYPES)}", param="type")
    if not 1 <= n_threads <= 512:
        raise InvalidRequest(f"n_threads must be 1 to 512, got {n_threads}", param="threads")
    if not os.path.isfile(src):
        raise ModelLoadError(f"{src}: no such file")
    cdef bytes c_src = os.fsencode(src), c_dst = os.fsencode(dst)
    cdef const char * from_path = c_src
    cdef const char * to_path = c_dst
    cdef llama_model_quantize_params params = llama_model_quantize_default_params()
    cdef vector[llama_model_imatrix_data] entries
    cdef llama_model_imatrix_data entry
    cdef vector[Py_buffer] views
    cdef Py_buffer view
    cdef uint32_t rc = 1
    cdef size_t i
    names = []
    params.nthread = n_threads
    params.ftype = <llama_ftype> (<int> FTYPES[ftype])
    params.allow_requantize = allow_requantize
    params.only_copy = only_copy
    reason = "llama.cpp could not quantise it"
    try:
        for name, values in (imatrix or {}).items():
            encoded = name.encode()
            names.append(encoded)  # the entry points into it
            PyObject_GetBuffer(values, &view, PyBUF_SIMPLE)
            views.push_back(view)
            entry.name = <const char *> encoded
            entry.data = <const float *> view.buf
            entry.size = view.len // sizeof(float)
            entries.push_back(entry)
        if not entries.empty():
            entry.name = NULL
            entry.data = NULL
            entry.size = 0
            entries.push_back(entry)  # the list ends here
            params.imatrix = entries.data()
        with nogil:
            rc = llama_model_quantize(from_path, to_path, &params)
    except RuntimeError as error:
        reason = str(error)
    finally:
        for i in range(views.size()):
            PyBuffer_Release(&views[i])
    if rc != 0:
        raise ModelLoadError(f"{src}: {_last_error(reason)}")
    return os.path.getsize(dst)
