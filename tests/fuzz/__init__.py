"""Fuzzing: five targets, their small corpora, and what runs them.

    python -m tests.fuzz headers                 what the corpus holds, once (needs nothing installed)
    python -m tests.fuzz headers FILE ...        these inputs, once
    python -m tests.fuzz headers --seconds 3600  guided by coverage, for so much processor time (needs atheris)

A target is a module with a class ``Target``; ``__call__`` takes one input and raises for what must not happen.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent

# As tests/conftest.py does: mullama is imported from where it is installed, what tests share from tests/.
sys.path[:] = [entry for entry in sys.path if entry not in ("", str(ROOT))] + [str(TESTS), str(ROOT)]

NAMES = ("headers", "vocabularies", "records", "bodies", "templates")
