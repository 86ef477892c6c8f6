"""How a namespace is shown to people and to routers. It is what keeps KV of equal tokens apart: salt, adapters."""

from __future__ import annotations

import hashlib


def short_namespace(namespace: bytes) -> str:
    """12 hex digits of its SHA-256, which do not tell the salt; empty for the namespace that everybody shares."""
    return hashlib.sha256(namespace).hexdigest()[:12] if namespace else ""
