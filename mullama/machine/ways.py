"""Ways of computing: which there are here, what came of proving and timing them."""

from __future__ import annotations

from typing import Any


def ways_report() -> list[dict[str, Any]]:
    """What is known of each way, for ``mullama doctor`` and ``GET /internal/machine``; empty: nothing is yet."""
    return []
