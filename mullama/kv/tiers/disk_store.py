"""KV on disk: files that are believed only after they are verified. Mechanism; which of them goes is decided elsewhere.

::

    key               32 random bytes, mode 0600: the secret of the seals
    <identity>/       one folder for each identity (model, KV types, layout, llama.cpp), with its own budget and owner
        <random>.kv   a record, see ``disk_records.py``; never changed after it appears
        <...>.part    one being written
        lock, owner   held by the one process that uses this folder; its process id

A record appears by an atomic rename after it was written whole, so a process may be killed at any moment.

What the seals protect from: bits that rot, files cut short by a crash of the machine, KV of another model or layout,
and people who can write to the folder but cannot read the key. KV that they alter or make is never loaded; they can
only delete it, bring back a record that was removed (it is what it was), or fill the disk. What they do not protect
from: whoever can read the key (this user, root), and being read. Tokens lie there in the clear and KV tells the
prompt, so the files are readable by this user alone; for more, put the folder on an encrypted disk.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from mullama.errors import StoreError
from mullama.files import disk_errors, store_error, sync_folder
from mullama.kv.tiers.disk_records import (
    CHUNK_TOKENS,
    MAX_NAMESPACE_BYTES,
    NO_FOLLOW,
    PRELUDE_BYTES,
    SHORT,
    TOKEN_ID_BYTES,
    BadRecordError,
    DiskRecord,
    Identity,
    Layout,
    Sealer,
    open_plain,
    read_exactly,
    regroup,
    write_all,
)

if TYPE_CHECKING:
    from filelock import BaseFileLock

KEY_BYTES = 32

# Further reasons in ``DiskStore.skipped``; the others are in ``disk_records.py``.
UNREADABLE = "unreadable"
UNFINISHED = "unfinished"

log = logging.getLogger(__name__)
_RECORD = re.compile(r"[0-9a-f]{32}\.kv")
_PART = re.compile(r"([0-9a-f]{16})-[0-9]+\.part")


class DiskStore:
    """The records of one identity in one folder. Any thread may call any method, but ``scan`` belongs to one at a time.

    Use: open, ``scan()`` to its end, then ``put``, ``read`` and ``remove``, ``close()`` at last.
    """

    def __init__(self, folder: Path, budget_bytes: int, identity: Identity, *, secret: bytes | None = None) -> None:
        """Own this identity's part of the folder, made when it is not there.

        ``secret`` (16 bytes or more) takes the place of the key file.
        Raises StoreError: another process owns it (the message says which), the folder cannot be used, or the key
        file is not one that can be trusted.
        """
        if secret is not None and len(secret) < 16:
            raise ValueError("a secret has 16 bytes or more")
        self.budget_bytes = budget_bytes
        self.skipped: Counter[str] = Counter()  # files that scans did not take, by reason
        self._identity = identity
        self._home = folder / identity.digest().hex()
        with disk_errors(f"keep KV in {folder}"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sealer = Sealer(load_secret(folder) if secret is None else secret, identity)
            self._home.mkdir(mode=0o700, exist_ok=True)
            if self._home.is_symlink():
                raise StoreError(f"{self._home} is a link; remove it, KV is not kept where it leads")
            self._owned = _own(self._home)
        self._sizes: dict[Path, int] = {}
        self._used = 0
        self._guard = threading.Lock()  # of the two above
        self._is_closed = False
        self._run = secrets.token_hex(8)  # marks temporary files: those of other runs belong to nobody
        self._numbers = itertools.count()

    # -- the budget

    @property
    def bytes_used(self) -> int:
        """Bytes of the files that were scanned or put, those being written included."""
        return self._used

    def over_budget(self, n_bytes: int) -> int:
        """How many bytes must go before ``n_bytes`` more fit. ``put`` does not ask: its caller has made room."""
        return max(self._used + n_bytes - self.budget_bytes, 0)

    def size_of(self, namespace: bytes, start: int, end: int, checkpoint_bytes: int | None) -> int:
        """What a record would take on disk. ``checkpoint_bytes`` None: no checkpoint."""
        return Layout(start, end, len(namespace), self._identity.token_bytes, checkpoint_bytes).n_bytes

    def __contains__(self, record: DiskRecord) -> bool:
        """Whether the record can still be read, as far as is known."""
        return record.path in self._sizes

    # -- writing

    def put(
        self,
        namespace: bytes,
        tokens: bytes,
        start: int,
        payload: Sequence[memoryview | bytes],
        checkpoint: bytes | None,
        *,
        sync: bool = True,
    ) -> DiskRecord:
        """Write a record; blocks. ``payload``: the rows of the tokens from ``start`` on, in pieces that are joined.

        The buffers must not change meanwhile. ``sync``: survive a crash of the machine as well; without it, what a
        crash spoils is found out when it is read. Raises StoreError (disk full, ...) and leaves nothing half-placed,
        ValueError when the sizes do not fit together.
        """
        self._require_open()
        pieces = [memoryview(piece).cast("B") for piece in payload if memoryview(piece).nbytes]
        layout = self._layout_of(namespace, tokens, start, sum(map(len, pieces)), checkpoint)
        part = self._home / f"{self._run}-{next(self._numbers)}.part"
        # SAFETY: nothing of a name comes from the prompt.
        path = self._home / f"{secrets.token_hex(16)}.kv"
        self._count(path, layout.n_bytes)
        try:
            with disk_errors(f"keep KV in {self._home}"):
                seals = self._write(part, layout, namespace, tokens, pieces, checkpoint, sync)
                part.replace(path)
                if sync:
                    sync_folder(self._home)
        except BaseException:
            self._forget(path)
            _discard(part)
            _discard(path)
            raise
        return DiskRecord(
            path=path,
            namespace=namespace,
            tokens=tokens,
            start=start,
            end=layout.end,
            n_bytes=layout.n_bytes,
            has_checkpoint=checkpoint is not None,
            token_bytes=layout.token_bytes,
            checkpoint_bytes=layout.checkpoint_bytes or 0,
            seals=seals,
        )

    def _layout_of(
        self, namespace: bytes, tokens: bytes, start: int, n_payload: int, checkpoint: bytes | None
    ) -> Layout:
        """The layout of a new record. Raises ValueError when the parts do not fit together."""
        end, odd = divmod(len(tokens), TOKEN_ID_BYTES)
        if odd or not end:
            raise ValueError(f"{len(tokens)} bytes are not a path of tokens")
        if len(namespace) > MAX_NAMESPACE_BYTES:
            raise ValueError(f"a namespace has at most {MAX_NAMESPACE_BYTES} bytes, not {len(namespace)}")
        # A stretch may be empty where only the state at its end is kept.
        if not 0 <= start <= end or (start == end and checkpoint is None):
            raise ValueError(f"no KV in [{start}, {end})")
        if n_payload != (end - start) * self._identity.token_bytes:
            raise ValueError(f"{n_payload} bytes are not {end - start} rows of {self._identity.token_bytes} bytes each")
        checkpoint_bytes = None if checkpoint is None else len(checkpoint)
        return Layout(start, end, len(namespace), self._identity.token_bytes, checkpoint_bytes)

    def _write(
        self,
        part: Path,
        layout: Layout,
        namespace: bytes,
        tokens: bytes,
        pieces: list[memoryview],
        checkpoint: bytes | None,
        sync: bool,
    ) -> bytes:
        """Write a whole file and return its seals."""
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o600)
        try:
            # PERF: a chunk is sealed and written while the processor's cache has it; so the header, which holds
            # the seals, comes last.
            os.lseek(descriptor, layout.rows_at, os.SEEK_SET)
            seals = bytearray()
            for chunk in regroup(pieces, layout):
                hasher = self._sealer.rows()
                for view in chunk:
                    hasher.update(view)
                    write_all(descriptor, view)
                seals += hasher.digest()
            if checkpoint is not None:
                hasher = self._sealer.checkpoint()
                hasher.update(checkpoint)
                write_all(descriptor, memoryview(checkpoint))
                seals += hasher.digest()
            os.lseek(descriptor, 0, os.SEEK_SET)
            write_all(descriptor, memoryview(self._sealer.pack(layout, namespace, tokens, bytes(seals))))
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return bytes(seals)

    # -- reading

    def scan(self) -> Iterator[DiskRecord]:
        """Every record here, oldest first, by headers alone: rows are verified when they are read.

        What is not a sound record is counted in ``skipped`` and deleted, as is what killed processes were writing;
        files with names that are none of ours are left alone. Raises StoreError when the folder cannot be read.
        """
        self._require_open()
        before = Counter(self.skipped)
        for name in self._names():
            path = self._home / name
            try:
                record = self._read_header(path)
            except BadRecordError as error:
                self.skipped[str(error)] += 1
                self._forget(path)
                _discard(path)
            except FileNotFoundError:
                self._forget(path)
            except OSError:  # it may be readable the next time
                self.skipped[UNREADABLE] += 1
            else:
                self._count(path, record.n_bytes)
                yield record
        if found := self.skipped - before:
            reasons = ", ".join(f"{count} {reason}" for reason, count in found.most_common())
            log.warning("%s: %d files are no use: %s", self._home, found.total(), reasons)

    def read(self, record: DiskRecord, a: int, b: int) -> bytes:
        """The rows of the tokens [a, b), absolute positions within the record, verified.

        Raises StoreError: the file is gone, cannot be read, or is not what was written (it is deleted then). The
        record is worth nothing after that; ``remove`` it. ValueError: not a part of [start, end).
        """
        if not record.start <= a <= b <= record.end:
            raise ValueError(f"[{a}, {b}) is not part of [{record.start}, {record.end})")
        first, last = (a - record.start) // CHUNK_TOKENS, -(-(b - record.start) // CHUNK_TOKENS)
        # What is read is more at both ends: [low, high).
        low, high = record.start + first * CHUNK_TOKENS, min(record.start + last * CHUNK_TOKENS, record.end)
        # PERF: only the chunks at the ends are cut, so that the rest is copied by join(), which lets the GIL go (a
        # slice does not), or not at all.
        cuts = {first, last}
        if low < a:
            cuts.add(first + 1)
        if b < high:
            cuts.add(last - 1)
        with self._reading(record) as file:
            file.seek(record.layout.rows_at + (low - record.start) * record.token_bytes)
            pieces = [self._read_rows(file, record, range(*pair)) for pair in itertools.pairwise(sorted(cuts))]
        if pieces:
            pieces[-1] = pieces[-1][: len(pieces[-1]) - (high - b) * record.token_bytes]
            pieces[0] = pieces[0][(a - low) * record.token_bytes :]
        return b"".join(pieces)

    def read_checkpoint(self, record: DiskRecord) -> bytes:
        """The checkpoint, verified. Raises StoreError as ``read`` does, ValueError when there is none."""
        if not record.has_checkpoint:
            raise ValueError(f"{record.path.name} has no checkpoint")
        with self._reading(record) as file:
            file.seek(record.layout.checkpoint_at)
            checkpoint = read_exactly(file, record.checkpoint_bytes)
            self._sealer.check_checkpoint(record, checkpoint)
        return checkpoint

    def _read_rows(self, file: FileIO, record: DiskRecord, chunks: range) -> bytes:
        # SAFETY: read into our own memory, then verified there. A mapping of the file could change between the check
        # and the use, and kills the process when somebody truncates the file.
        sizes = [record.layout.chunk_bytes(chunk) for chunk in chunks]
        rows = read_exactly(file, sum(sizes))
        at = 0
        for chunk, size in zip(chunks, sizes, strict=True):
            self._sealer.check_rows(record, chunk, memoryview(rows)[at : at + size])
            at += size
        return rows

    def _read_header(self, path: Path) -> DiskRecord:
        """Raises BadRecordError, OSError."""
        with open_plain(path) as file:
            prelude = read_exactly(file, PRELUDE_BYTES)
            layout = self._sealer.read_prelude(prelude)
            if os.fstat(file.fileno()).st_size != layout.n_bytes:
                raise BadRecordError(SHORT)
            return self._sealer.read_header(path, layout, prelude, read_exactly(file, layout.header_bytes))

    @contextlib.contextmanager
    def _reading(self, record: DiskRecord) -> Iterator[FileIO]:
        """The file of a record; turns what goes wrong into StoreError, and forgets what is of no use any more."""
        self._require_open()
        name = record.path.name
        try:
            if record not in self:
                raise FileNotFoundError
            with open_plain(record.path) as file:
                yield file
        except FileNotFoundError:
            self._forget(record.path)
            raise StoreError(f"KV record {name} is gone") from None
        except BadRecordError as error:
            self._forget(record.path)
            _discard(record.path)
            raise StoreError(f"KV record {name} is {error}; it was deleted") from None
        except OSError as error:
            raise store_error(f"read KV record {name}", error) from error

    # -- the end of a record, and of the store

    def remove(self, record: DiskRecord) -> None:
        """Delete a record; nothing happens when it is gone already. Who is reading it gets it whole.

        Raises StoreError when it cannot be deleted; it still counts then.
        """
        self._require_open()  # another process may own the folder now
        with disk_errors(f"remove KV record {record.path.name}"):
            record.path.unlink(missing_ok=True)
        self._forget(record.path)

    def close(self) -> None:
        """Let another process own the folder. The records stay. Call it after the last ``put``; twice is harmless."""
        if self._is_closed:
            return
        self._is_closed = True
        _discard(self._home / "owner")
        self._owned.release()

    def _require_open(self) -> None:
        if self._is_closed:
            raise StoreError(f"the KV store {self._home} is closed")

    def _names(self) -> list[str]:
        """Names of the records, oldest first. Removes what killed processes were writing."""
        found = []
        with disk_errors(f"read the KV in {self._home}"), os.scandir(self._home) as entries:
            for entry in entries:
                part = _PART.fullmatch(entry.name)
                if part and part[1] != self._run:  # we own the folder: nobody writes it any more
                    self.skipped[UNFINISHED] += 1
                    _discard(self._home / entry.name)
                elif _RECORD.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
        return [name for _, name in sorted(found)]

    def _count(self, path: Path, n_bytes: int) -> None:
        with self._guard:
            self._used += n_bytes - self._sizes.get(path, 0)
            self._sizes[path] = n_bytes

    def _forget(self, path: Path) -> None:
        with self._guard:
            self._used -= self._sizes.pop(path, 0)


# -- the key and the lock


def load_secret(folder: Path) -> bytes:
    """The secret of the folder's key file, which is made when there is none; two processes make one.

    Raises StoreError when others could have read or written it, or when it is not a key. OSError.
    """
    import filelock

    path = folder / "key"
    with contextlib.suppress(FileNotFoundError):
        return _read_key(path)
    try:
        with filelock.FileLock(folder / "key.lock", timeout=10):
            with contextlib.suppress(FileNotFoundError):
                return _read_key(path)
            _make_key(path)
    except filelock.Timeout:
        raise StoreError(f"another process holds {folder / 'key.lock'} and makes no key; end it") from None
    return _read_key(path)


def _make_key(path: Path) -> None:
    """The caller holds the lock of the key."""
    part = path.with_name("key.part")
    part.unlink(missing_ok=True)  # of a process that was killed
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o600)
    try:
        write_all(descriptor, memoryview(secrets.token_bytes(KEY_BYTES)))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.replace(path)
    sync_folder(path.parent)


def _read_key(path: Path) -> bytes:
    try:
        with open_plain(path) as file:
            status = os.fstat(file.fileno())
            key = file.read(KEY_BYTES + 1)
    except BadRecordError:
        raise StoreError(f"{path} is not a plain file; remove it, and a new key is made") from None
    again = "remove it, and a new key is made (the KV kept under the old one is lost)"
    if os.name != "nt":
        if status.st_uid != os.geteuid():
            raise StoreError(
                f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}, who runs mullama; {again}"
            )
        if status.st_mode & 0o077:
            raise StoreError(
                f"others can use {path} (mode {status.st_mode & 0o777:o}): run 'chmod 600 {path}', or if they may have "
                f"done so, {again}"
            )
    if len(key) != KEY_BYTES:
        raise StoreError(f"{path} is not a key of {KEY_BYTES} bytes; {again}")
    return key


def _own(home: Path) -> BaseFileLock:
    """The lock of a folder, held. Raises StoreError when another process (or this one) has it already."""
    import filelock

    # Not of this thread alone: another one may close the store.
    lock = filelock.FileLock(home / "lock", thread_local=False)
    owner = home / "owner"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(f"the KV in {home} is used by {_holder(owner)}; give this one another folder") from None
    # It is only told to people: not worth failing for.
    with contextlib.suppress(OSError):
        part = owner.with_name("owner.part")
        part.unlink(missing_ok=True)
        with part.open("x", encoding="ascii") as file:
            file.write(str(os.getpid()))
        part.replace(owner)
    return lock


def _holder(owner: Path) -> str:
    try:
        with open_plain(owner) as file:
            return f"process {int(file.read(16))}"
    except (OSError, BadRecordError, ValueError):
        return "another process"


# -- files


def _discard(path: Path) -> None:
    """Delete a file if that is possible; a link, not what it leads to."""
    with contextlib.suppress(OSError):
        path.unlink()
