"""The examples of README and docs that need a model, run as they are written.

``python model`` loads the engine, ``python server`` and ``sh server`` talk to a running server. Only the model's
reference and the server's address are replaced.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_support import Block, all_blocks

from .support import ServerProcess, clean_env

REFERENCE = '"smollm2:135m"'
ADDRESS = "http://127.0.0.1:8080"


def of(info: str) -> pytest.MarkDecorator:
    found = all_blocks(info)
    assert found, f"no page has an example tagged '{info}'"
    return pytest.mark.parametrize("block", found, ids=lambda block: block.id)


def run_python(source: str, folder: Path) -> str:
    """Run an example in a process of its own, as a user would; its output."""
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, env=clean_env())
    assert done.returncode == 0, done.stderr
    return done.stdout


@of("python model")
def test_python_with_a_model(block: Block, smollm2: Path, tmp_path: Path) -> None:
    assert REFERENCE in block.text
    run_python(block.text.replace(REFERENCE, repr(str(smollm2))), tmp_path)


@of("python server")
def test_python_with_a_server(block: Block, server: ServerProcess, tmp_path: Path) -> None:
    assert ADDRESS in block.text
    done = run_python(block.text.replace(ADDRESS, server.url), tmp_path)
    assert done.strip()


@of("sh server")
def test_shell_with_a_server(block: Block, server: ServerProcess, tmp_path: Path) -> None:
    """Every answer is JSON or a stream without an error."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    assert ADDRESS in block.text
    script = block.text.replace(ADDRESS, server.url)
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if done.stdout.startswith("data: "):
        assert done.stdout.rstrip().endswith("data: [DONE]")
        return
    decoder, text = json.JSONDecoder(), done.stdout.strip()
    while text:
        answer, end = decoder.raw_decode(text)
        assert "error" not in answer, answer
        if "X-Profile" in script:
            assert answer["profile"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        text = text[end:].lstrip()
