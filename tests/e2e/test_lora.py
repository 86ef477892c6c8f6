"""LoRA adapters on a real server: loaded and unloaded under streams, damaged files, the command line.

Tiny random models: what counts is that everybody gets the adapter that was asked for, and nobody else does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapters
import httpx
import pytest

from .support import CHAT, COMPLETIONS, ServerProcess, run_mullama

ADMIN = {"Authorization": "Bearer adm"}
ADAPTERS = "/internal/models/m/adapters"


@pytest.fixture(scope="module")
def files(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [adapters.build(folder / f"{name}.gguf", tiny_model(), seed=n) for n, name in enumerate("abc")]


@pytest.fixture
def server(tiny_model: Callable[..., Path], tmp_path: Path, files: list[Path]) -> Iterator[ServerProcess]:
    """The tiny model as ``m`` with the adapter ``a``."""
    args = ["--model", f"m={tiny_model()}", "--lora", f"a={files[0]}", "--threads", "1", "--ctx-size", "512"]
    with ServerProcess(tmp_path, [*args, "--parallel", "4", "--admin-key", "adm", "--no-store-models"]) as server:
        yield server


def complete(server: ServerProcess, model: str = "m", n: int = 24, **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": "the sun is here", "max_tokens": n, "temperature": 0, "ignore_eos": True, **more}
    answer = httpx.post(server.url + COMPLETIONS, json=body, headers={"X-Profile": "true"}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def text(server: ServerProcess, model: str = "m", n: int = 24, **more: Any) -> str:
    return str(complete(server, model, n, **more)["choices"][0]["text"])


def load(server: ServerProcess, path: Path, name: str, scale: float = 1.0) -> httpx.Response:
    body = {"path": str(path), "id": name, "scale": scale}
    return httpx.post(server.url + ADAPTERS, json=body, headers=ADMIN, timeout=60)


def unload(server: ServerProcess, name: str) -> httpx.Response:
    return httpx.request("DELETE", f"{server.url}{ADAPTERS}/{name}", json={}, headers=ADMIN, timeout=60)


def test_names_fields_and_profiles(server: ServerProcess, files: list[Path]) -> None:
    assert load(server, files[1], "b", 0.5).json()["scale"] == 0.5
    bare, a, b = text(server), text(server, "m+a"), text(server, "m+b")
    assert len({bare, a, b}) == 3
    assert text(server, lora=[{"id": "a"}]) == a
    assert text(server, lora=[{"id": "a", "scale": 0}]) == bare
    assert text(server, lora=[{"id": "b", "scale": 0.5}]) == b
    both = complete(server, "m+a", lora=[{"id": "b"}])
    assert both["model"] == "m+a"
    assert both["choices"][0]["text"] not in (bare, a, b)
    assert both["profile"]["adapters"] == [{"id": "a", "scale": 1.0}, {"id": "b", "scale": 0.5}]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    answers = [
        httpx.post(server.url + CHAT, json={**chat, "model": name}, timeout=60).json() for name in ("m", "m+a", "m")
    ]
    said = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert said[0] == said[2] != said[1]
    listed = [one["id"] for one in httpx.get(server.url + "/v1/models").json()["data"]]
    assert listed == ["m", "m+a", "m+b"]
    memory = httpx.get(server.url + "/internal/memory", headers={"Authorization": "Bearer adm"}).json()["models"]["m"][
        "adapters"
    ]
    assert [one["id"] for one in memory] == ["a", "b"] and all(one["resident_bytes"] > 0 for one in memory)
    refused = httpx.post(server.url + COMPLETIONS, json={"model": "m+nosuch", "prompt": "x"})
    assert (refused.status_code, "loaded adapters: a, b" in refused.text) == (404, True)


def test_adapters_come_and_go_under_load(server: ServerProcess, files: list[Path]) -> None:
    """Every answer is the one that its adapter gives alone, whoever runs beside it and whatever is loaded."""
    alone = {name: text(server, name, 60) for name in ("m", "m+a")}
    with ThreadPoolExecutor(4) as pool:
        work = [(name, pool.submit(text, server, name, 60)) for name in ("m", "m+a") * 12]
        for n in range(6):
            assert load(server, files[1 + n % 2], "x").status_code == 200
            assert unload(server, "x").status_code == 200
        assert {(name, one.result()) for name, one in work} == set(alone.items())
    found = httpx.get(server.url + ADAPTERS).json()["adapters"]
    assert [(one["id"], one["requests"]) for one in found] == [("a", 0)]


def test_unloading_what_is_in_use(server: ServerProcess) -> None:
    body = {"model": "m+a", "prompt": "the", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60) as stream:
        chunks = stream.iter_lines()
        next(chunks)
        refused = unload(server, "a")
        if refused.status_code != 200:  # else it had ended already
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_busy")
        assert [line for line in chunks if line][-1] == "data: [DONE]"


def test_damaged_files(server: ServerProcess, files: list[Path], tmp_path: Path) -> None:
    bare, a = text(server), text(server, "m+a")
    whole = files[1].read_bytes()
    bad = tmp_path / "bad.gguf"
    for share in (0.0, 0.01, 0.3, 0.9, 0.999):
        bad.write_bytes(whole[: int(share * len(whole))])
        answer = load(server, bad, "bad")
        assert answer.status_code == 400 and "bad.gguf" in answer.json()["error"]["message"], answer.text
    for seed in range(10):
        rng, spoilt = random.Random(seed), bytearray(whole)
        for _ in range(2):
            spoilt[rng.randrange(8, 1200)] ^= 1 << rng.randrange(8)  # of the header
        bad.write_bytes(spoilt)
        answer = load(server, bad, "bad")
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 200:
            assert unload(server, "bad").status_code == 200
    assert (text(server), text(server, "m+a")) == (bare, a)


def test_the_command_line(server: ServerProcess, files: list[Path]) -> None:
    def lora(*args: str) -> Any:
        return run_mullama("lora", *args, "--url", server.url, "--key", "adm")

    loaded = lora("load", "m", str(files[2]), "--scale", "0.5")
    assert (loaded.returncode, loaded.stdout.split(b":")[0]) == (0, b"m+c"), loaded.stderr
    found = json.loads(lora("list", "m", "--json").stdout)
    assert [(one["id"], one["scale"]) for one in found["adapters"]] == [("a", 1.0), ("c", 0.5)]
    table = lora("list", "m").stdout.decode().splitlines()
    assert table[0].split() == ["ID", "SCALE", "RANK", "SIZE", "REQUESTS", "FILE"]
    assert lora("unload", "m", "c").stdout == b"m+c: unloaded\n"
    again = lora("unload", "m", "c")
    assert (again.returncode, b"no adapter 'c' is loaded" in again.stderr) == (1, True)
    assert json.loads(lora("load", "m", str(files[2]), "--id", "z", "--json").stdout)["id"] == "z"


def test_a_start_with_a_damaged_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    found = run_mullama("serve", "--port", "0", "--model", f"m={tiny_model()}", "--lora", f"a={bad}")
    assert found.returncode == 1 and b"bad.gguf" in found.stderr and b"Traceback" not in found.stderr
