"""The format of a file of KV on disk, the seals that prove it, and how plain files are read and written.

::

    prelude     96 bytes: magic, identity, start, end, sizes, seal
    header      namespace · tokens of the whole path · a seal for each chunk of rows · the checkpoint's · seal
    rows        of tokens [start, end), token-major: (end - start) × token_bytes
    checkpoint  opaque; may be absent

A seal is a keyed BLAKE2b of 32 bytes. The prelude's comes first, so that no size is believed (and nothing is
allocated for one) before it is known to be ours. The header's covers prelude and header, and with them the seals of
all that follows: a part of the rows is verified without the rest, and no part can come from another file.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path

TOKEN_ID_BYTES = 4  # a token id is an int32, little-endian
CHUNK_TOKENS = 64  # rows under one seal
SEAL_BYTES = 32
MAX_NAMESPACE_BYTES = 256

_MAGIC = b"mulkv\r\n\x01"  # the last byte is the version of the format
_FIELDS = struct.Struct("<8s32sIIIIQ")  # magic, identity, start, end, bytes of the namespace, flags, of the checkpoint
_HAS_CHECKPOINT = 1
PRELUDE_BYTES = _FIELDS.size + SEAL_BYTES

# Why a file is not taken: keys of ``DiskStore.skipped``.
SHORT = "truncated"
NO_RECORD = "not a record"
FOREIGN = "of another model or version"
ALTERED = "altered or damaged"
NO_FILE = "a link or not a plain file"

NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # flags of os.open
_NO_WAIT: int = getattr(os, "O_NONBLOCK", 0)  # opening a pipe must not hang

# What a seal is for: one must never pass for another.
_PRELUDE, _HEADER, _ROWS, _CHECKPOINT = b"prelude", b"header", b"rows", b"checkpoint"


class BadRecordError(Exception):
    """A file that is not what it should be; the argument is one of the reasons above."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What KV depends on besides the tokens and the namespace. KV of one identity is never read under another."""

    weights: str  # hash of the model file, hex
    architecture: str
    kv_type_k: str
    kv_type_v: str
    token_bytes: int  # a token's row, all layers, K and V
    layout: str  # of a row: flash attention, transposition, rope settings, whatever changes its bytes
    state_version: str  # llama.cpp's commit

    def digest(self) -> bytes:
        """32 bytes that differ for any two identities, and for any two versions of the file format."""
        return hashlib.sha256(_MAGIC + json.dumps(asdict(self), sort_keys=True).encode()).digest()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of one file lie, in bytes. ``checkpoint_bytes`` None: it has no checkpoint."""

    start: int
    end: int
    namespace_bytes: int
    token_bytes: int
    checkpoint_bytes: int | None

    @property
    def n_chunks(self) -> int:
        return -(-(self.end - self.start) // CHUNK_TOKENS)

    @property
    def seals_bytes(self) -> int:
        return SEAL_BYTES * (self.n_chunks + (self.checkpoint_bytes is not None))

    @property
    def header_bytes(self) -> int:
        return self.namespace_bytes + self.end * TOKEN_ID_BYTES + self.seals_bytes + SEAL_BYTES

    @property
    def rows_at(self) -> int:
        return PRELUDE_BYTES + self.header_bytes

    @property
    def checkpoint_at(self) -> int:
        return self.rows_at + (self.end - self.start) * self.token_bytes

    @property
    def n_bytes(self) -> int:
        """Of the whole file."""
        return self.checkpoint_at + (self.checkpoint_bytes or 0)

    def chunk_bytes(self, chunk: int) -> int:
        """Of the rows in a chunk; the last one may be shorter."""
        return min(CHUNK_TOKENS, self.end - self.start - chunk * CHUNK_TOKENS) * self.token_bytes


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A file of the store: KV of the tokens [start, end) of a path. Two are equal when they are the same file."""

    path: Path
    namespace: bytes = field(compare=False)
    tokens: bytes = field(compare=False, repr=False)  # the whole path [0, end): int32, little-endian
    start: int = field(compare=False)
    end: int = field(compare=False)
    n_bytes: int = field(compare=False)  # of the file
    has_checkpoint: bool = field(compare=False)
    token_bytes: int = field(compare=False)
    checkpoint_bytes: int = field(default=0, compare=False)
    # Of the chunks of rows, then of the checkpoint. Known good, so what is read later need not ask the header again.
    seals: bytes = field(default=b"", compare=False, repr=False)

    @property
    def layout(self) -> Layout:
        checkpoint_bytes = self.checkpoint_bytes if self.has_checkpoint else None
        return Layout(self.start, self.end, len(self.namespace), self.token_bytes, checkpoint_bytes)


class Sealer:
    """Makes, packs and checks records of one identity under one secret."""

    def __init__(self, secret: bytes, identity: Identity) -> None:
        self._identity = identity.digest()
        self._token_bytes = identity.token_bytes
        self._key = hmac.digest(secret, b"mullama kv " + self._identity, "sha512")

    def rows(self) -> hashlib.blake2b:
        """A hasher whose digest is the seal of a chunk of rows."""
        return self._hasher(_ROWS)

    def checkpoint(self) -> hashlib.blake2b:
        return self._hasher(_CHECKPOINT)

    def check_rows(self, record: DiskRecord, chunk: int, rows: memoryview) -> None:
        """Raises BadRecordError unless these are the rows of that chunk."""
        self._check(self._seal(_ROWS, rows), record.seals[chunk * SEAL_BYTES : (chunk + 1) * SEAL_BYTES])

    def check_checkpoint(self, record: DiskRecord, checkpoint: bytes) -> None:
        self._check(self._seal(_CHECKPOINT, checkpoint), record.seals[-SEAL_BYTES:])

    def pack(self, layout: Layout, namespace: bytes, tokens: bytes, seals: bytes) -> bytes:
        """Prelude and header of a file with these seals."""
        fields = _FIELDS.pack(
            _MAGIC,
            self._identity,
            layout.start,
            layout.end,
            layout.namespace_bytes,
            0 if layout.checkpoint_bytes is None else _HAS_CHECKPOINT,
            layout.checkpoint_bytes or 0,
        )
        prelude = fields + self._seal(_PRELUDE, fields)
        sealed = prelude + namespace + tokens + seals
        return sealed + self._seal(_HEADER, sealed)

    def read_prelude(self, prelude: bytes) -> Layout:
        """What a file's first PRELUDE_BYTES say. Raises BadRecordError unless they are ours."""
        magic, identity, start, end, namespace_bytes, flags, checkpoint_bytes = _FIELDS.unpack_from(prelude)
        if magic != _MAGIC:
            raise BadRecordError(NO_RECORD)
        if identity != self._identity:
            raise BadRecordError(FOREIGN)
        self._check(self._seal(_PRELUDE, prelude[: _FIELDS.size]), prelude[_FIELDS.size :])
        # Nothing of ours has other numbers; but a seal tells who wrote it, and not that it was right.
        if not 0 <= start <= end or not end or (start == end and not flags & _HAS_CHECKPOINT):
            raise BadRecordError(NO_RECORD)
        if namespace_bytes > MAX_NAMESPACE_BYTES:
            raise BadRecordError(NO_RECORD)
        return Layout(
            start, end, namespace_bytes, self._token_bytes, checkpoint_bytes if flags & _HAS_CHECKPOINT else None
        )

    def read_header(self, path: Path, layout: Layout, prelude: bytes, header: bytes) -> DiskRecord:
        """The record of a file, its rows not looked at. Raises BadRecordError unless the header is ours."""
        self._check(self._seal(_HEADER, prelude + header[:-SEAL_BYTES]), header[-SEAL_BYTES:])
        tokens_at = layout.namespace_bytes
        seals_at = tokens_at + layout.end * TOKEN_ID_BYTES
        return DiskRecord(
            path=path,
            namespace=header[:tokens_at],
            tokens=header[tokens_at:seals_at],
            start=layout.start,
            end=layout.end,
            n_bytes=layout.n_bytes,
            has_checkpoint=layout.checkpoint_bytes is not None,
            token_bytes=layout.token_bytes,
            checkpoint_bytes=layout.checkpoint_bytes or 0,
            seals=header[seals_at:-SEAL_BYTES],
        )

    def _hasher(self, part: bytes) -> hashlib.blake2b:
        return hashlib.blake2b(key=self._key, digest_size=SEAL_BYTES, person=part)

    def _seal(self, part: bytes, data: bytes | memoryview) -> bytes:
        hasher = self._hasher(part)
        hasher.update(data)
        return hasher.digest()

    @staticmethod
    def _check(found: bytes, expected: bytes) -> None:
        if not hmac.compare_digest(found, expected):
            raise BadRecordError(ALTERED)


# -- files


def open_plain(path: Path) -> FileIO:
    """A plain file for reading. Raises BadRecordError for anything else, OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW | _NO_WAIT)
    except OSError as error:
        # A link, a socket: errno as open(2) has it.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise BadRecordError(NO_FILE) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadRecordError(NO_FILE)
        return FileIO(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_exactly(file: FileIO, n: int) -> bytes:
    """The next ``n`` bytes. Raises BadRecordError when the file ends before, OSError."""
    data: bytes = file.read(n)
    while len(data) < n:  # Linux gives 2 GB at once at most
        more: bytes = file.read(n - len(data))
        if not more:
            raise BadRecordError(SHORT)
        data += more
    return data


def write_all(descriptor: int, view: memoryview) -> None:
    """Write all of the view. Raises OSError, some of it may be written then."""
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done:])


def regroup(pieces: list[memoryview], layout: Layout) -> Iterator[list[memoryview]]:
    """The rows in chunks of the file, each in one piece or several; nothing is copied."""
    rest = iter(pieces)
    piece = memoryview(b"")
    for number in range(layout.n_chunks):
        missing = layout.chunk_bytes(number)
        chunk = []
        while missing:
            if not piece:
                piece = next(rest)
            chunk.append(piece[:missing])
            piece = piece[missing:]
            missing -= len(chunk[-1])
        yield chunk
