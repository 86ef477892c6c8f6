"""A real server without HOME, a name for its user id and a folder for temporary files."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import httpx
import pytest
from homes import homeless


def test_it_serves_a_file(smollm2: Path, tmp_path: Path) -> None:
    server = homeless(
        tmp_path, "serve", "--port", "0", "--threads", "1", "--ctx-size", "512", "--model", f"m={smollm2}"
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.fullmatch(r"mullama ready on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, server.communicate()[1]
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        reply = httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=60)
        assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 4
        server.send_signal(signal.SIGTERM)
        _, stderr = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert "Traceback" not in stderr
    assert "the instrumentation page is this process's own" in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["serve", "--port", "0"], "set MULLAMA_HOME to a folder"),
        (["run", "smollm2:135m", "hi"], "set MULLAMA_HOME to a folder"),
        (
            ["serve", "--port", "0", "--profile-log", "~/p.jsonl", "--model", "FILE"],
            "nobody knows the home that '~' means",
        ),
        (["serve", "--port", "0", "--kv-disk-dir", "~/kv", "--model", "FILE"], "nobody knows the home that '~' means"),
    ],
)
def test_it_says_in_a_line_what_it_needs(smollm2: Path, tmp_path: Path, args: list[str], said: str) -> None:
    process = homeless(tmp_path, *[str(smollm2) if arg == "FILE" else arg for arg in args])
    try:
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, stderr
    assert said in stderr and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
