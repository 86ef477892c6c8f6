"""Files of saved KV: what is found and read is what was written, or is refused; and what our own key sealed is bounded.

The first byte of an input says what becomes of the rest, the file: 0 it lies in the folder as it is; 1 the fields of
its prelude are sealed anew; 2 prelude and header; 3 the rows as well. So the code behind the seals is tried, too.
"""

from __future__ import annotations

import logging
import random
import struct
import tempfile
from pathlib import Path

from mullama.errors import StoreError
from mullama.kv.eviction import registry
from mullama.kv.index.tree import PrefixTree
from mullama.kv.tiers.disk_records import (
    _FIELDS,
    _MAGIC,
    CHUNK_TOKENS,
    PRELUDE_BYTES,
    SEAL_BYTES,
    Identity,
    Layout,
    Sealer,
)
from mullama.kv.tiers.disk_store import DiskStore
from mullama.kv.tiers.disk_tier import DiskRows, DiskTier

SECRET = b"the secret of the fuzzer"
IDENTITY = Identity("ab" * 32, "llama", "f16", "f16", 3, "rows", "1")
NAME = "0123456789abcdef" * 2 + ".kv"
BUDGET = 1 << 20


class Target:
    words = [_MAGIC, IDENTITY.digest()]

    def __init__(self) -> None:
        logging.disable(logging.WARNING)  # what is no use is told of in the log, each time
        self._folder = tempfile.TemporaryDirectory()
        self._sealer = Sealer(SECRET, IDENTITY)
        self._home = Path(self._folder.name) / IDENTITY.digest().hex()
        self._written: dict[bytes, tuple[bytes, bytes]] = {}

    def __call__(self, data: bytes) -> None:
        mode, file = (data[0] % 4, data[1:]) if data else (0, b"")
        if mode:
            file = self.sealed(file, mode)
        store = DiskStore(Path(self._folder.name), BUDGET, IDENTITY, secret=SECRET)
        (self._home / NAME).write_bytes(file)
        tree = PrefixTree()
        tier = DiskTier(store, tree, lambda: registry.create("lru"), IDENTITY.token_bytes, _post, lambda node: None)
        try:
            _check(tree)
            found = [node for node in tree.nodes() if isinstance(node.disk, DiskRows)]
            assert mode or not found, "a file was believed that no key of ours has sealed"
            for node in found:
                record = node.disk.shared.record  # type: ignore[union-attr]
                assert 0 <= record.start <= record.end and len(record.tokens) == 4 * record.end
                for a, b in ((node.start, node.end), (record.start, min(record.end, record.start + 1))):
                    try:
                        assert len(store.read(record, a, b)) == (b - a) * IDENTITY.token_bytes
                    except StoreError:
                        break
                tier.read(node)
                _check(tree)
        finally:
            tier.close()
            for path in self._home.glob("*.kv"):
                path.unlink()

    def sealed(self, file: bytes, mode: int) -> bytes:
        """The file with what it says under our seals, as far as it is long enough."""
        if len(file) < PRELUDE_BYTES:
            file = file + bytes(PRELUDE_BYTES - len(file))
        _, _, start, end, namespace_bytes, flags, checkpoint_bytes = _FIELDS.unpack_from(file)
        fields = _FIELDS.pack(_MAGIC, IDENTITY.digest(), start, end, namespace_bytes, flags, checkpoint_bytes)
        prelude = fields + self._sealer._seal(b"prelude", fields)
        rest = file[PRELUDE_BYTES:]
        if mode == 1:
            return prelude + rest
        layout = Layout(start, end, namespace_bytes, IDENTITY.token_bytes, checkpoint_bytes if flags & 1 else None)
        size = layout.header_bytes
        if not SEAL_BYTES <= size <= len(rest):
            return prelude + rest
        header, rows = rest[: size - SEAL_BYTES], rest[size:]
        if mode == 3 and start <= end and len(rows) >= (end - start) * IDENTITY.token_bytes:
            seals, at = b"", 0
            for chunk in range(layout.n_chunks):
                seals += self._sealer._seal(b"rows", rows[at : at + layout.chunk_bytes(chunk)])
                at += layout.chunk_bytes(chunk)
            if layout.checkpoint_bytes is not None:
                seals += self._sealer._seal(b"checkpoint", rows[at:])
            header = header[: len(header) - len(seals)] + seals
        return prelude + header + self._sealer._seal(b"header", prelude + header) + rows

    def change(self, rng: random.Random, data: bytes) -> bytes:
        """Another number in the prelude, or a file whose sizes fit together."""
        if rng.random() < 0.4:
            end = rng.choice((0, 1, 2, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS))
            return bytes([rng.randrange(4)]) + whole(
                rng.choice((0, end // 2, end, end + 1)), end, rng.randbytes(rng.choice((0, 5, 256, 300))),
                rng.choice((None, b"", b"state")), shuffled=rng.random() < 0.5, rng=rng,
            )  # fmt: skip
        changed = bytearray(data.ljust(1 + PRELUDE_BYTES, b"\0"))
        at, code = rng.choice(((40, "<I"), (44, "<I"), (48, "<I"), (52, "<I"), (56, "<Q")))
        odd = (0, 1, 2, 63, 64, 65, 0x7FFFFFFF, 0xFFFFFFFF) + ((1 << 63, (1 << 64) - 1) if code == "<Q" else ())
        struct.pack_into(code, changed, 1 + at, rng.choice(odd))
        changed[0] = rng.randrange(4)
        return bytes(changed)

    def close(self) -> None:
        logging.disable(logging.NOTSET)
        self._folder.cleanup()


def _check(tree: PrefixTree) -> None:
    """The tree is one, and every stretch of a record lies where it says."""
    for node in tree.nodes():
        assert node.parent is not None and node.parent.children[node.key[:4]] is node
        assert 0 <= node.start < node.end and len(node.tokens()) == 4 * node.end
        held = node.disk
        if isinstance(held, DiskRows):
            record = held.shared.record
            assert (held.start, held.end) == (
                node.start,
                node.end,
            ) and record.start <= held.start < held.end <= record.end
            assert record.tokens[: 4 * node.end] == node.tokens() and record.namespace == node.namespace


def _post(work: object) -> None:
    """There is no engine thread, and nothing is written."""


def whole(
    start: int, end: int, namespace: bytes, checkpoint: bytes | None, *, shuffled: bool, rng: random.Random
) -> bytes:
    """A file whose sizes are what its prelude says; its seals are empty."""
    tokens = [rng.randrange(1 << 31) if shuffled else n for n in range(end)]
    fields = _FIELDS.pack(
        _MAGIC, IDENTITY.digest(), start, end, len(namespace), checkpoint is not None, len(checkpoint or b"")
    )
    layout = Layout(start, end, len(namespace), IDENTITY.token_bytes, None if checkpoint is None else len(checkpoint))
    body = namespace + struct.pack(f"<{end}i", *tokens) + bytes(layout.seals_bytes + SEAL_BYTES)
    rows = bytes(max(end - start, 0) * IDENTITY.token_bytes)
    return fields + bytes(SEAL_BYTES) + body + rows + (checkpoint or b"")
