"""Pulls in real processes: two at once, over HTTP beside a running model, given up, and broken off by a shutdown."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from homes import home
from hub_support import LocalServer, Registry, Reply, Seen, file_reply

from .support import ServerProcess, clean_env, mullama, run_mullama

PULL = "/internal/models/pull"


class Gate:
    """Serves a registry, and holds the second half of every blob back until it is opened."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.is_open = threading.Event()

    def __call__(self, seen: Seen) -> Reply | None:
        if seen.path.startswith("/cdn/") and "range" in seen.headers:
            self.is_open.wait(60)
        return self.registry(seen)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> Iterator[Registry]:
    """A registry at OLLAMA_REGISTRY with the tiny model, and an empty store. ``.server`` and ``.gate`` belong to it."""
    layers = {
        "model": tiny_model().read_bytes(),
        "template": b"{{ .Prompt }}",
        "params": b'{"temperature": 0.1}',
        "license": b"MIT",
    }
    registry = Registry("library/tiny", "1b", layers)
    gate = Gate(registry)
    with LocalServer(gate) as server:
        registry.server, registry.gate, registry.url = server, gate, server.url  # type: ignore[attr-defined]
        monkeypatch.setenv("OLLAMA_REGISTRY", server.url)
        monkeypatch.setenv("MULLAMA_HOME", home(tmp_path / "home"))
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield registry
        gate.is_open.set()


def events(text: str) -> list[tuple[str, dict[str, object]]]:
    found = []
    for event in text.split("\n\n"):
        if event.startswith("event: "):
            kind, data = event.split("\n")
            found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_ollama_from_the_command_line(registry: Registry) -> None:
    pulled = run_mullama("pull", "ollama:tiny:1b", "--json")
    assert pulled.returncode == 0, pulled.stderr
    assert json.loads(pulled.stdout)["license"] == "MIT"
    shown = json.loads(run_mullama("show", "ollama:tiny:1b", "--json").stdout)
    assert (shown["name"], shown["template"], shown["defaults"]) == ("tiny:1b", "{{ .Prompt }}", {"temperature": 0.1})
    asked = run_mullama("run", "ollama:tiny:1b", "Hi", "--max-tokens", "3", "--threads", "1")
    assert (asked.returncode, bool(asked.stdout.strip())) == (0, True), asked.stderr


def test_two_processes_download_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> None:
    data = tiny_model().read_bytes()
    both = threading.Barrier(2)
    waiting = threading.Event()

    def route(seen: Seen) -> Reply | None:
        if seen.path != "/m.gguf":
            return None
        waiting.wait(60)  # until the second process waits for the first
        return file_reply(seen, data, '"v1"')

    with LocalServer(route) as server:
        monkeypatch.setenv("MULLAMA_HOME", home(tmp_path / "home"))
        env = clean_env(MULLAMA_ALLOW_PRIVATE_SOURCES="1")
        processes = [
            subprocess.Popen(
                mullama("pull", f"{server.url}/m.gguf", "--json"),
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        said = []

        def read(process: subprocess.Popen[str]) -> None:
            assert process.stderr is not None
            both.wait(60)
            for line in process.stderr:
                said.append(line)
                if "waiting for another process" in line:
                    waiting.set()

        readers = [threading.Thread(target=read, args=(process,)) for process in processes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(120)
        answers = [json.loads(process.stdout.read()) for process in processes if process.stdout is not None]
        assert [process.wait(60) for process in processes] == [0, 0], said
        assert answers[0]["sha256"] == answers[1]["sha256"]
        assert server.paths() == ["/m.gguf"]
    for process in processes:
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def test_a_pull_over_http_beside_a_running_model(
    registry: Registry, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    registry.cut = 10_000  # the first request breaks off; the second waits at the gate
    gate: Gate = registry.gate  # type: ignore[attr-defined]
    args = ["--model", f"tiny={tiny_model()}", "--threads", "1"]
    with ServerProcess(tmp_path / "server", args) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"model": "Mine=ollama:tiny:1b", "stream": True}
        with client.stream("POST", PULL, json=body) as first:
            lines = first.iter_lines()
            assert "downloading" in next(line for line in lines if "downloading" in line)
            # A second client joins, and leaves again; the model that runs answers meanwhile.
            with client.stream("POST", PULL, json=body) as second:
                assert second.status_code == 200
            server.complete("Hello", max_tokens=4)
            gate.is_open.set()
            rest = "\n".join(lines)
        assert events(rest + "\n\n")[-1][0] == "done"
        blobs = [path for path in registry.server.paths() if path.startswith("/cdn/")]  # type: ignore[attr-defined]
        assert blobs.count(f"/cdn/{registry.digest(registry.layers['model'])}") == 2  # the one that broke off, the rest
        assert client.post(PULL, json={"model": "mine"}).json()["downloaded"] is False
        assert client.post(PULL, json={"model": "ollama:nosuch"}).status_code == 404
        assert client.post(PULL, json={"model": "https://127.0.0.1/x.gguf"}).status_code == 403
    listed = json.loads(run_mullama("list", "--json").stdout)
    assert [entry["name"] for entry in listed] == ["mine"]


def test_the_last_client_leaves_and_a_shutdown_does_not_wait(
    registry: Registry, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    registry.cut = 10_000
    gate: Gate = registry.gate  # type: ignore[attr-defined]
    body = {"model": "ollama:tiny:1b", "stream": True}
    server = ServerProcess(tmp_path / "server", ["--model", f"tiny={tiny_model()}", "--threads", "1"]).wait_ready()
    try:
        with httpx.stream("POST", server.url + PULL, json=body, timeout=60) as reply:
            next(line for line in reply.iter_lines() if "downloading" in line)
        server.complete("Hello", max_tokens=2)  # whoever left, it serves
        with httpx.stream("POST", server.url + PULL, json=body, timeout=60) as reply:
            assert reply.status_code == 200
            assert server.terminate() == 0  # the download waits at the gate, and nobody waits for it
            reply.read()
        assert "Traceback" not in server.stderr
        assert "signature" not in server.stderr
    finally:
        server.kill()
    gate.is_open.set()
    # What the next process finds is whole or nothing, and a pull brings it.
    assert run_mullama("pull", "ollama:tiny:1b").returncode == 0
    assert run_mullama("verify").returncode == 0
    assert [path.name for path in (tmp_path / "home" / "tmp").iterdir()] == []
