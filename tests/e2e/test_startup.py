"""Starting: what goes wrong ends with a non-zero exit code and one line on stderr, soon; and what goes right."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .support import NAME, ServerProcess, run_mullama, wait_until

SECONDS = 30.0  # 10 on a machine that has nothing else to do


def fails(*args: str, **env: str) -> str:
    """Run ``mullama serve``; the one line it ends with."""
    done = run_mullama("serve", "--port", "0", *args, timeout=SECONDS, **env)
    stderr = done.stderr.decode()
    assert done.returncode in (1, 2), stderr
    assert done.stdout == b""
    assert "Traceback" not in stderr
    # A line may say first that a model is being loaded (on a slow machine), or asked for.
    # Lines of the log may say first what is being done.
    (line,) = [line for line in stderr.splitlines() if " INFO " not in line and ": asking for " not in line]
    assert line.startswith("error: ")
    return line


def test_a_missing_file(tmp_path: Path) -> None:
    for missing in (tmp_path / "nothing.gguf", tmp_path / "no folder" / "nothing.gguf"):
        assert "nothing.gguf" in fails("--model", str(missing))
    assert str(tmp_path) in fails("--model", str(tmp_path))


@pytest.mark.parametrize("size", [0, 3, 4, 100, 5000, 3_000_000, 98_000_000])
def test_a_truncated_file(tmp_path: Path, smollm2: Path, size: int) -> None:
    file = tmp_path / "cut.gguf"
    with smollm2.open("rb") as source:
        file.write_bytes(source.read(size))
    assert "cut.gguf" in fails("--model", str(file))


@pytest.mark.parametrize(
    ("offset", "damage"),
    [
        (0, b"GGML"),
        (4, b"\xff\xff\xff\xff"),  # the version
        (8, b"\xff" * 8),  # the number of tensors
        (16, b"\xff" * 8),  # the number of metadata pairs
        (24, b"\xff" * 8),  # the length of the first key
        (24, b"\x00" * 200),
        (60, b"\xff" * 64),
    ],
)
def test_a_damaged_header(tmp_path: Path, smollm2: Path, offset: int, damage: bytes) -> None:
    file = tmp_path / "damaged.gguf"
    shutil.copyfile(smollm2, file)
    with file.open("r+b") as target:
        target.seek(offset)
        target.write(damage)
    assert "damaged.gguf" in fails("--model", str(file))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "random.gguf"
    file.write_bytes(bytes(range(256)) * 4096)
    assert "random.gguf" in fails("--model", str(file))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    file = tmp_path / "secret.gguf"
    file.write_bytes(b"GGUF")
    file.chmod(0)
    assert "secret.gguf" in fails("--model", str(file))


def test_a_context_that_no_memory_holds(smollm2: Path) -> None:
    line = fails("--model", str(smollm2), "--ctx-size", "1000000", "--parallel", "256")
    assert "with 256 x 1000192 tokens does not fit: " in line and "lower --ctx-size" in line
    done = run_mullama("run", str(smollm2), "hi", "--ctx-size", "1000000000")
    assert (done.returncode, done.stdout) == (1, b"")
    (line,) = done.stderr.decode().splitlines()
    assert "does not fit: " in line


def test_a_port_in_use(smollm2: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = fails("--model", str(smollm2), "--port", str(port))
    assert str(port) in line and "in use" in line


def test_the_port_of_another_server(server: ServerProcess, smollm2: Path) -> None:
    assert "in use" in fails("--model", str(smollm2), "--port", str(server.port))
    server.assert_serving()


@pytest.mark.parametrize("reference", ["nothing:7b", "Nothing", "hf:a/b", "ftp://x/y.gguf", "=", "bad name=x", ""])
def test_references_that_name_nothing(reference: str) -> None:
    assert fails("--model", reference, HF_ENDPOINT="http://127.0.0.1:9")  # nothing leaves the machine


@pytest.mark.parametrize(
    "args",
    [
        ("--port", "65536"), ("--port", "-1"), ("--port", "http"), ("--ctx-size", "many"), ("--parallel", "257"),
        ("--parallel", "-1"), ("--flash-attn", "maybe"), ("--gpu-layers", "all"), ("--drain-timeout", "nan"),
        ("--host", "no.such.host.invalid"), ("--host", "203.0.113.7"), ("--profile-log", "/no/such/folder/x.jsonl"),
        ("--config", "/no/such/file.toml"), ("--chat-template", "@/no/such/file"), ("--max-queue", "1.5"),
        ("--tensor-split", "a,b"), ("--device", "no-such-device"), ("--page-dir", "/dev/null/x"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_values(smollm2: Path, args: tuple[str, ...]) -> None:
    line = fails("--model", str(smollm2), *args)
    named = args[0].removeprefix("--")
    assert args[1].lstrip("@") in line or named in line or named.replace("-", "_") in line, line


def test_bad_values_from_elsewhere(smollm2: Path, tmp_path: Path) -> None:
    assert "MULLAMA_PARALLEL" in fails("--model", str(smollm2), MULLAMA_PARALLEL="lots")
    file = tmp_path / "mullama.toml"
    for text, word in (("parallel = 'lots'", "parallel"), ("paralel = 1", "paralel"), ("parallel = [", "TOML")):
        file.write_text(text)
        assert word in fails("--model", str(smollm2), "--config", str(file))


def test_two_models_of_one_name(smollm2: Path) -> None:
    assert "one" in fails("--model", f"one={smollm2}", "--model", f"one={smollm2}")


def test_a_context_that_does_not_fit_memory(smollm2: Path) -> None:
    line = fails("--model", str(smollm2), "--ctx-size", "1000000000", "--parallel", "256")
    assert "memory" in line or "ctx-size" in line


def test_an_unknown_flag_is_wrong_usage() -> None:
    done = run_mullama("serve", "--no-such-flag")
    assert done.returncode == 2 and b"--no-such-flag" in done.stderr and b"Traceback" not in done.stderr


def test_an_options_file_and_the_environment(
    start: Callable[..., ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mullama.toml"
    file.write_text("ctx_size = 512\nparallel = 3\nmax-queue = 7\n")
    running = start("--config", str(file), "--parallel", "2")
    assert running.kv()["cells_per_slot"] == 512
    assert len(running.kv()["slots"]) == 2, "a flag wins over the file"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the process through /proc")
def test_a_server_is_one_process(server: ServerProcess) -> None:
    children = [
        child
        for task in Path(f"/proc/{server.pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    assert children == []
    # And it is the one that was started: the page, which the engine itself writes, is of this pid.
    (page,) = server.page_dir.glob("*.page")
    assert page.name.startswith(f"{server.pid}-")
    assert NAME.replace(":", "_") in page.name


def test_the_page_can_be_read_from_outside(server: ServerProcess) -> None:
    from mullama import abi

    (page,) = server.page_dir.glob("*.page")
    reader = abi.Reader.attach(page)
    before = abi.as_dict(reader.counters())
    server.complete("One, two, three,", max_tokens=3)
    after = abi.as_dict(reader.counters())
    assert after["steps"] >= before["steps"] + 3
    assert server.scheduler()["counters"].keys() == after.keys()


def test_its_log_is_json_where_that_is_asked_for(start: Callable[..., ServerProcess]) -> None:
    server = start("--log-format", "json", "--log-requests", "--ctx-size", "256", "--parallel", "2")
    headers = {"X-Request-ID": "from-the-client"}
    reply = server.post("/v1/completions", {"prompt": "One, two,", "max_tokens": 3, "stream": True}, headers=headers)
    assert reply.headers["x-request-id"] == "from-the-client"
    wait_until(lambda: "from-the-client" in server.stderr)
    lines = [json.loads(line) for line in server.stderr.splitlines() if line.startswith("{")]
    (loaded,) = [line for line in lines if line["message"] == f"{NAME} is loaded"]
    assert (loaded["context"], loaded["slots"], loaded["threads"]) == (256, 2, 1)
    assert loaded["subject"] == "cli.serve" and loaded["level"] == "info"
    (line,) = [line for line in lines if line["subject"] == "requests" and line["id"] == "from-the-client"]
    assert (line["status"], line["completion_tokens"], line["model"], line["finish"]) == (200, 3, NAME, "length")
    assert any(line["message"] == f"listening on {server.url}" for line in lines)
