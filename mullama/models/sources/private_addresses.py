"""What sources may do in this process. Light enough for every start."""

from __future__ import annotations

import logging
import os

VARIABLE = "MULLAMA_ALLOW_PRIVATE_SOURCES"

_allowed: bool | None = None


def allow_private(allowed: bool) -> None:
    """Set for this process what ``allow_private_sources`` of the configuration says."""
    global _allowed
    _allowed = allowed


def is_private_allowed() -> bool:
    """What :func:`allow_private` was told, else the environment."""
    if _allowed is not None:
        return _allowed
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "yes", "on")


def quiet_logs() -> None:
    """Keep the HTTP libraries from logging every address they ask: those of storage are signed, and so are secrets."""
    for name in ("httpx", "httpx2"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
