"""The memory of an instrumentation page. No code without the GIL has a Page: it is given the blocks (output.pxd)."""

from mullama._core.output.output cimport PageBlocks
from mullama.abi cimport mullama_header


cdef class Page:
    cdef object mapping              # mmap.mmap
    cdef object view                 # keeps the buffer exported
    cdef readonly str path           # "" for a private page
    cdef object file                 # its descriptor, which holds the lock; None for a private page
    cdef mullama_header * header
    cdef PageBlocks blocks             # what is written; none once it is closed


cdef Page page_at(int n_rows, path, bint needed)
