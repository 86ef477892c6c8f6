"""Where a result comes from: what a number needs so that it can be reproduced or doubted."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from mullama.installation import VERSION, llama_commit

ROOT = Path(__file__).resolve().parents[2]


def build() -> dict[str, str | None]:
    """Which mullama, on which llama.cpp, and when."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"version": VERSION, "commit": commit(), "llama_cpp": llama_commit(), "date": date}


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


def source_of(policy: object) -> dict[str, str] | None:
    """The file that a policy comes from and its sha256; None for mullama's own, and where there is no file."""
    kind = type(policy)
    if kind.__module__.split(".")[0] == "mullama":
        return None
    try:
        file = inspect.getsourcefile(kind)
        if file is None:
            return None
        return {"file": file, "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    except (OSError, TypeError):
        return None
