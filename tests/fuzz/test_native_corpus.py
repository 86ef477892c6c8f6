"""The corpora of targets that try native code, in a child: a finding would end it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from . import ROOT
from .test_corpus import NATIVE


@pytest.mark.parametrize("name", NATIVE)
def test_the_corpus_of_native_code(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name], cwd=ROOT, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), (done.stdout[-200:], done.stderr[-2000:])
