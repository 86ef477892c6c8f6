"""How a namespace is shown to people and to routers. It is what keeps KV of equal tokens apart: salt, adapters."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable


def short_namespace(namespace: bytes) -> str:
    """12 hex digits of its SHA-256, which do not tell the salt; empty for the namespace that everybody shares."""
    return hashlib.sha256(namespace).hexdigest()[:12] if namespace else ""


def adapters_key(adapters: Iterable[tuple[str, float]]) -> bytes:
    """32 bytes that tell a set of (sha256 of the file, scale) from all others; empty for the bare model.

    Scales are told apart as the core has them, with 32 bits; an adapter at 0 is none, and the order says nothing.
    """
    parts = sorted((digest.encode(), struct.pack("<f", scale)) for digest, scale in adapters if scale != 0)
    if not parts:
        return b""
    hashed = hashlib.sha256()
    for digest, scale in parts:
        hashed.update(struct.pack("<I", len(digest)) + digest + scale)
    return hashed.digest()
