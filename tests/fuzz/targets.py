"""What a target is, where its corpus lies, and changes that suit many targets."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from .gguf_files import made_of

CORPUS = Path(__file__).parent / "corpus"


class Target(Protocol):
    #: What the fuzzer's dictionary holds besides what it learns by itself.
    words: list[bytes]

    def __call__(self, data: bytes) -> None:
        """Try one input. Raises for what must not happen; may end the process where native code is tried."""

    def change(self, rng: random.Random, data: bytes) -> bytes:
        """Another input, changed where changing it at random would rarely lead anywhere."""

    def close(self) -> None: ...


def load(name: str) -> Target:
    """The target of that name; its modules are imported now, so that they may be instrumented."""
    return cast(Callable[[], Target], importlib.import_module(f"{__package__}.{name}").Target)()


def corpus(name: str) -> dict[str, bytes]:
    """The committed inputs by their names: text as it is, GGUF as in ``gguf_files``, other bytes in hex."""
    found: dict[str, Any] = json.loads((CORPUS / f"{name}.json").read_text(encoding="utf-8"))
    return {case: _bytes_of(one) for case, one in found.items()}


def _bytes_of(one: Any) -> bytes:
    if isinstance(one, str):
        return one.encode("utf-8", "surrogatepass")
    return made_of(one["gguf"]) if "gguf" in one else bytes.fromhex(one["hex"])


def shaken(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, removed, doubled or inserted."""
    changed = bytearray(data or b"x")
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(changed) + 1)
        n = rng.choice((1, 1, 2, 4, 16))
        how = rng.randrange(4)
        if how == 0:
            changed[at : at + n] = bytes(rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))) for _ in range(n))
        elif how == 1 and len(changed) > n:
            del changed[at : at + n]
        elif how == 2:
            changed[at:at] = changed[at : at + n]
        elif at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)
