"""Homes of a test's own (``$MULLAMA_HOME``) that share what is known of this machine's ways of computing.

In a home that knows nothing of them, the first load of every type of weights tries them all: seconds, in each test.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from mullama.home import default_root

_SHARED = default_root() / "kernels"  # before any test sets a home


def home(folder: Path) -> str:
    """Make it; what to set the variable to."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # no links here: then it is found out once more
        _SHARED.mkdir(parents=True, exist_ok=True)
        (folder / "kernels").symlink_to(_SHARED, target_is_directory=True)
    return str(folder)
