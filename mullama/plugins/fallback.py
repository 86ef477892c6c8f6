"""A user's policy that failed loses the job: told in the log to its author, and shown in the reports."""

from __future__ import annotations

import logging
import time
from typing import Any


def replaced(
    log: logging.Logger, kind: str, spec: str, by: str, reason: str, error: BaseException | None
) -> dict[str, Any]:
    """What the reports show as ``fallback``: ``from``, ``reason``, ``unix_time``.

    ``error`` is what the policy's own code raised, whose traceback tells its author where.
    """
    log.error("%s '%s' is replaced by %s: %s", kind, spec, by, reason, exc_info=error)
    return {"from": spec, "reason": reason, "unix_time": round(time.time(), 3)}
