"""What was installed here: its version, and whether its compiled part is whole and runs on this processor. Internal."""

from __future__ import annotations

VERSION = "0.1.0"


def llama_commit() -> str | None:
    """The upstream commit of the llama.cpp in use, from the lock file: installed beside it, or of the checkout."""
    import tomllib
    from pathlib import Path

    package = Path(__file__).resolve().parents[1]
    for file in (package / "lib" / "llama.lock.toml", package.parent / "vendor" / "llama.lock.toml"):
        try:
            return str(tomllib.loads(file.read_text(encoding="utf-8"))["upstream_commit"])
        except (OSError, KeyError, tomllib.TOMLDecodeError):
            continue
    return None
