"""Ways of computing products of weights: which there are, trying and timing one, choosing.

A choice holds for the whole process, from the next graph on. ``Products`` may crash the process where a way uses what
the processor lacks, so that it is used in a process of its own (``mullama/machine/trial_child.py``).
"""

from libc.stdint cimport int64_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from mullama._core.llama cimport *
from mullama._core.model.model cimport Model
from mullama._core.model.model import init_backend

cdef extern from "llama-kernels.h" nogil:
    cbool llama_kernels_allow(ggml_type type, const char * buft_name, cbool yes)
    void llama_kernels_each_tensor(
        const llama_model * model,
        void (*visit)(void * data, const char * name, ggml_type type, uint64_t n_bytes,
                      const char * buft_name) noexcept,
        void * data)

cdef extern from "products.h" namespace "mullama" nogil:
    enum class Columns:
        dense
        strided
        batched
    cppclass Difference:
        cbool is_finite
        cbool is_exact
        double error
    Difference compare(const vector[float] & found, const vector[float] & wanted) except +
    cppclass CProducts "mullama::Products":
        CProducts(int type, int64_t k, int64_t n, const string & layout, int copies) except +
        cbool can(int64_t m, Columns columns) except +
        vector[float] multiply(int64_t m, Columns columns, int threads, cbool reference) except +
        double time(int64_t m, int threads, int matrices, int rounds) except +
    cppclass Attention:
        int64_t cells
        int64_t tokens
        vector[float] compute(int threads, cbool reference, double * seconds) except +
    vector[string] layout_names() except +
    void c_set_kernel "mullama::set_kernel"(int type, int log2_columns, int kernel) except +
    void c_set_attention "mullama::set_attention"(cbool on) except +
    cbool c_has_attention "mullama::has_attention"() except +
    void c_kernel_counts "mullama::kernel_counts"(uint64_t * counts) except +

#: What ``set_kernel`` takes, in the order of llama.cpp's (patched) enum; ``auto`` leaves the choice to ggml.
KERNELS = ("auto", "plain", "sgemm", "tiles", "tiled")

#: What ``counts`` tells apart.
COUNTED = ("plain", "sgemm", "tiles", "tiled", "repack", "amx")

#: Classes of columns that a choice tells apart: 1, 2 to 3, 4 to 7 and so on.
N_CLASSES = 16

_COLUMNS = {"dense": 0, "strided": 1, "batched": 2}


def layouts():
    """The layouts of their own that weights may be loaded into here, by ggml's names, the preferred one first."""
    init_backend()
    return [name.decode() for name in layout_names()]


def set_kernel(int kind, int log2_columns, str kernel):
    """Products of this type with ``2**log2_columns`` columns and more, up to the next power of two, go this way."""
    init_backend()
    c_set_kernel(kind, log2_columns, KERNELS.index(kernel))


def allow_layout(int kind, str layout, bint yes):
    """Whether weights of this type may be loaded into that layout, from the next model on. False: no such layout."""
    cdef bytes name = layout.encode()
    return llama_kernels_allow(<ggml_type> kind, name, yes)


def set_attention(bint on):
    """Whether attention of decoded tokens is computed for several heads at a time."""
    init_backend()
    c_set_attention(on)


def has_attention():
    """Whether attention is computed for several heads at a time here: this build has it, and it is on."""
    init_backend()
    return c_has_attention()


def check_attention(int64_t cells, int64_t tokens, int threads):
    """Attention as it is set beside the reference computations: ``(is_finite, is_exact, error, seconds)``.

    The error is relative to the size of the result.
    """
    init_backend()
    cdef Attention attention
    attention.cells = cells
    attention.tokens = tokens
    cdef double seconds = 0
    cdef vector[float] found, wanted
    with nogil:
        found = attention.compute(threads, False, &seconds)
        wanted = attention.compute(1, True, NULL)
    cdef Difference difference = compare(found, wanted)
    return difference.is_finite, difference.is_exact, difference.error, seconds


def counts():
    """Products computed since the process started, by the way they went."""
    cdef uint64_t numbers[16]
    for i in range(16):
        numbers[i] = 0
    init_backend()
    c_kernel_counts(numbers)
    return {name: numbers[i + 1] for i, name in enumerate(COUNTED)}


cdef void _visit(void * data, const char * name, ggml_type type, uint64_t n_bytes,
                 const char * layout) noexcept with gil:
    found = <dict> data
    key = (ggml_type_name(type).decode().upper(), layout.decode("utf-8", "replace"))
    found[key] = found.get(key, 0) + n_bytes


def weights_by_layout(Model model):
    """Bytes of a model's weights by type and the name of the buffers they lie in."""
    found = {}
    llama_kernels_each_tensor(model.ptr, _visit, <void *> found)
    return found


cdef class Products:
    """Matrices of weights of one type, of ``n`` rows of ``k`` values, in a layout ("": that of the file).

    ``copies`` of them, so that timing reads them from memory. Raises ValueError for what this machine does not have.
    """

    cdef unique_ptr[CProducts] products

    def __init__(self, int kind, int64_t k, int64_t n, str layout="", int copies=1):
        init_backend()
        cdef string name = layout.encode()
        self.products.reset(new CProducts(kind, k, n, name, copies))

    def can(self, int64_t m, str columns="dense"):
        """Whether the backend takes a product with ``m`` columns that lie so: dense, strided or batched."""
        return self.products.get().can(m, <Columns> <int> _COLUMNS[columns])

    def check(self, Products reference, int64_t m, str columns="dense", int threads=1):
        """One product beside the reference computation of ``reference``, the same weights in the layout of the file.

        Returns ``(is_finite, is_exact, error)``; the error is relative to the size of the result.
        """
        cdef Columns lie = <Columns> <int> _COLUMNS[columns]
        cdef vector[float] found
        cdef vector[float] wanted
        with nogil:
            found = self.products.get().multiply(m, lie, threads, False)
            wanted = reference.products.get().multiply(m, lie, 1, True)
        cdef Difference difference = compare(found, wanted)
        return difference.is_finite, difference.is_exact, difference.error

    def is_steady(self, int64_t m, int threads):
        """Whether the first of ``m`` columns has the bits that it has alone, and those with several threads."""
        cdef vector[float] alone, together, threaded
        cdef size_t n
        with nogil:
            alone = self.products.get().multiply(1, Columns.dense, 1, False)
            together = self.products.get().multiply(m, Columns.dense, 1, False)
            threaded = self.products.get().multiply(m, Columns.dense, threads, False)
        n = alone.size()
        cdef cbool by_threads = compare(threaded, together).is_exact
        together.resize(n)
        return compare(together, alone).is_exact, by_threads

    def time(self, int64_t m, int threads, int matrices, int rounds):
        """Seconds of one product with ``m`` columns: the best of some rounds over ``matrices`` of the copies."""
        cdef double seconds
        with nogil:
            seconds = self.products.get().time(m, threads, matrices, rounds)
        return seconds
