"""Which file ``--model`` means, and requantised copies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import models


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert models.model_file(str(file)) == file.resolve()


def test_a_name_that_is_not_in_the_store_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path))
    with pytest.raises(models.NoModel, match=r"mullama pull smollm2:135m.*--model FILE"):
        models.model_file("smollm2:135m")


@pytest.fixture
def quantize(tmp_path: Path) -> Path:
    """A program with llama-quantize's arguments that copies, and fails for the type BAD."""
    program = tmp_path / "quantize"
    program.write_text(
        f"#!{sys.executable} -S\nimport shutil, sys\n"
        "assert sys.argv[1] == '--allow-requantize'\n"
        "if sys.argv[4] == 'BAD': sys.exit('invalid ftype')\n"
        "shutil.copy(sys.argv[2], sys.argv[3])\n"
    )
    program.chmod(0o755)
    return program


@pytest.mark.skipif(sys.platform == "win32", reason="starts a script by its first line")
def test_a_requantised_copy_is_made_once(tmp_path: Path, quantize: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(b"weights")
    made = models.quantized(source, "Q8_0", quantize, tmp_path / "out")
    assert made.name == "m-Q8_0.gguf"
    assert made.read_bytes() == b"weights"
    source.write_bytes(b"changed")
    assert models.quantized(source, "Q8_0", quantize, tmp_path / "out").read_bytes() == b"weights"


@pytest.mark.skipif(sys.platform == "win32", reason="starts a script by its first line")
def test_a_failed_copy_leaves_no_file(tmp_path: Path, quantize: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(b"weights")
    with pytest.raises(models.NoModel, match="invalid ftype"):
        models.quantized(source, "BAD", quantize, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
