"""What is committed of the corpora, and some hundred inputs made of it: nothing may be found.

(Those of native code are in ``test_native_corpus.py``.)
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from . import ROOT
from .campaign import _escaped
from .gguf_files import change_file, taken_apart
from .targets import CORPUS, corpus, load, shaken

PYTHON = ("headers", "records", "bodies")
NATIVE = ("vocabularies", "templates")
CHANGED = 300


@pytest.mark.parametrize("name", PYTHON)
def test_the_corpus(name: str) -> None:
    """In this process, and then what a campaign begins with."""
    target = load(name)
    try:
        cases = corpus(name)
        for case, data in cases.items():
            try:
                target(data)
            except Exception as error:
                raise AssertionError(f"{name}: {case}") from error
        rng, kept = random.Random(1), list(cases.values())
        for _ in range(CHANGED):
            data = rng.choice(kept)
            data = target.change(rng, data) if rng.random() < 0.7 else shaken(rng, data)
            try:
                target(data)
            except Exception as error:
                raise AssertionError(f"{name}: {data.hex()}") from error
    finally:
        target.close()


@pytest.mark.parametrize("name", PYTHON + NATIVE)
def test_a_corpus_is_small_and_without_doubles(name: str) -> None:
    found = corpus(name)
    assert len(found) >= 10 and len(set(found.values())) == len(found)
    assert (CORPUS / f"{name}.json").stat().st_size < 50_000


def test_the_files_of_the_corpus_are_what_their_descriptions_say() -> None:
    for name in ("headers", "vocabularies"):
        for case, data in corpus(name).items():
            assert taken_apart(data).joined() == data, case
            assert isinstance(change_file(random.Random(1), data), bytes)
    assert isinstance(change_file(random.Random(1), b"GGUF"), bytes)


def test_a_finding_is_reported(tmp_path: Path) -> None:
    """By the command, for a file that is given: a target that never fails would find nothing."""
    bad = tmp_path / "input"
    bad.write_bytes(b"GET /internal/nothing\n\n")
    command = [sys.executable, "-c", (
        "import sys; from tests.fuzz import bodies, __main__ as m\n"
        "bodies.Target.__call__ = lambda self, data: 1 / 0\n"
        f"sys.argv = ['', 'bodies', {str(bad)!r}]\n"
        "sys.exit(m.main())"
    )]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and str(bad) in done.stdout


def test_words_are_written_as_libfuzzer_reads_them() -> None:
    assert _escaped(b'a"\\\x00\xe2{') == "a\\x22\\x5c\\x00\\xe2{"
