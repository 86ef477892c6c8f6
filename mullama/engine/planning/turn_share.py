"""What an engine has of the cores beside the others of its process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mullama.errors import InvalidRequest

if TYPE_CHECKING:
    from mullama._core import Core, Embedder


def share_of(core: Core | Embedder) -> tuple[str, dict[str, Any]]:
    """The arbiter's policy, and what this engine has of the cores (see PlanningClient.share)."""
    turns, seat = core.turns, core.turns.seats().get(core.seat, {})
    share = {
        "weight": seat.get("weight", 1.0),
        "priority": seat.get("priority", 0),
        "turns": seat.get("turns", 0),
        "computed_ms": round(seat.get("used_ns", 0) / 1e6, 3),
        "waited_ms": round(seat.get("wait_ns", 0) / 1e6, 3),
        "is_waiting": seat.get("is_waiting", False),
    }
    return turns.policy, share


def set_share(core: Core | Embedder, *, weight: float, priority: int) -> None:
    """What this engine may expect beside others. Raises InvalidRequest."""
    if not -(2**31) <= priority < 2**31:  # SAFETY: it becomes an int of C
        raise InvalidRequest(
            f"a priority must be {-(2**31)} to {2**31 - 1}, got {str(priority)[:40]}", param="priority"
        )
    core.turns.set_share(core.seat, weight=weight, priority=priority)
