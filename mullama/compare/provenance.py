"""Where a result comes from: what a number needs so that it can be reproduced or doubted."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str | None:
    """``git describe`` of the checkout that mullama runs from; None where it is installed without one."""
    if not (ROOT / ".git").exists():  # another project's repository around an installed package is not ours
        return None
    command = ["git", "describe", "--always", "--dirty", "--tags"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
