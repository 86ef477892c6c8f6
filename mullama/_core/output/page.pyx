"""The writing side of the instrumentation page (layout and law: abi.h; reading side: abi.py)."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

import errno
import mmap
import os
import time

try:
    import fcntl
except ImportError:  # Windows: nobody can remove a file that is in use
    fcntl = None

from mullama.abi cimport *
from mullama.errors import ModelLoadError


cdef extern from "page_write.h" namespace "mullama" nogil:
    void publish_word(uint64_t * out, uint64_t value)
    ctypedef struct FieldInfo:
        const char * block
        const char * name
        uint32_t offset
        uint32_t size
    const FieldInfo * fields(size_t & n)
    ctypedef struct SiteInfo:
        const char * name
        uint32_t number
        const char * doc
    const SiteInfo * sites(size_t & n)


def layout():
    """Every field as the compiler laid it out: (block, name, offset, size) in declaration order."""
    cdef size_t n = 0
    cdef const FieldInfo * table = fields(n)
    return [(table[i].block.decode(), table[i].name.decode(), table[i].offset, table[i].size) for i in range(n)]


def block_sizes():
    """Bytes of each block."""
    return {"header": sizeof(mullama_header), "counters": sizeof(mullama_counters), "row": sizeof(mullama_row),
            "event": sizeof(mullama_event)}


def site_table():
    """The named call sites: {name: (number, what a and b hold)}."""
    cdef size_t n = 0
    cdef const SiteInfo * table = sites(n)
    return {table[i].name.decode(): (table[i].number, table[i].doc.decode()) for i in range(n)}


def _allocate(fd, size):
    """Have the file system keep room for a whole file. Raises OSError when it has none.

    SAFETY: a write into a mapping of a file for which the disk has no block left is a SIGBUS, which ends the process.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
            raise


cdef class Page:
    """A shared mapping (a file when ``path`` is given, else private memory) of counters, rows and events."""

    def __init__(self, int n_rows, path=None, int n_events=8192):
        if n_rows < 1 or n_events < 1 or n_events & (n_events - 1):
            raise ValueError("n_rows must be positive and n_events a power of two")
        cdef size_t counters_at, rows_at, events_at, size
        counters_at = _aligned(sizeof(mullama_header))
        rows_at = counters_at + _aligned(sizeof(mullama_counters))
        events_at = rows_at + _aligned(n_rows * sizeof(mullama_row))
        size = events_at + n_events * sizeof(mullama_event)
        self.path = ""
        if path is None:
            self.mapping = mmap.mmap(-1, size)
        else:
            self.file = _locked(os.fspath(path))
            self.path = os.fspath(path)
            try:
                os.ftruncate(self.file, size)
                _allocate(self.file, size)
                self.mapping = mmap.mmap(self.file, size)
            except BaseException:
                os.unlink(self.path)
                os.close(self.file)
                self.file, self.path = None, ""
                raise
        self.view = memoryview(self.mapping)
        cdef unsigned char[::1] raw = self.view
        cdef unsigned char * base = &raw[0]
        memset(base, 0, size)
        cdef mullama_header * header = <mullama_header *> base
        header.version = MULLAMA_ABI_VERSION
        header.header_size = sizeof(mullama_header)
        header.page_size = size
        header.counters_offset = counters_at
        header.counters_size = sizeof(mullama_counters)
        header.rows_offset = rows_at
        header.row_size = sizeof(mullama_row)
        header.n_rows = n_rows
        header.events_offset = events_at
        header.event_size = sizeof(mullama_event)
        header.n_events = n_events
        header.pid = os.getpid()
        header.created_ns = time.monotonic_ns()
        header.magic = MULLAMA_ABI_MAGIC  # last: a reader that sees it may read the rest
        self.header = header
        self.blocks.counters = <mullama_counters *> (base + counters_at)
        self.blocks.rows = <mullama_row *> (base + rows_at)
        self.blocks.events = <mullama_event *> (base + events_at)
        self.blocks.n_events = n_events

    def buffer(self):
        """The page as a read-only memoryview, for mullama.abi.Reader."""
        if self.view is None:
            raise ValueError("this page was closed")
        return self.view.toreadonly()

    def close(self):
        """Say that it is closed, remove the file and let go of the mapping; that goes with its last reader."""
        if self.path:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
            self.path = ""
        if self.header is not NULL:
            publish_word(&self.header.closed_ns, time.monotonic_ns())
            self.header = NULL
        if self.file is not None:
            os.close(self.file)
            self.file = None
        if self.view is not None:
            self.blocks = PageBlocks()
            self.view.release()
            self.view = None
            try:
                self.mapping.close()
            except BufferError:
                pass  # somebody reads: the last reader's end closes it
            self.mapping = None


cdef Page page_at(int n_rows, path, bint needed):
    """A page in this file; unless it is ``needed`` there, in private memory where that cannot be. Raises
    ModelLoadError."""
    try:
        return Page(n_rows, path)
    except OSError as error:
        if needed:
            raise ModelLoadError(f"the instrumentation page {path} cannot be made: {error.strerror}") from None
        return Page(n_rows)


cdef size_t _aligned(size_t n) noexcept:
    return (n + 63) // 64 * 64


def _locked(str path):
    """A descriptor of a new file that only the owner may read, locked as long as it is open (see abi.is_alive).

    A file or a link that is there already is not ours.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        if fcntl is None:
            return fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            return fd  # a file system without locks: nobody can take it for dead
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # between the two calls somebody took it for a dead engine's and removed it
