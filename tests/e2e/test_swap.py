"""Hot-swap and many models on a real process: changes under streams, damaged files, crashes, models that take turns.

Tiny random models: what counts here is that nothing is dropped, refused or mixed up, not what is said.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import damage
import httpx
import pytest

from mullama.models.files.estimate import estimate

from .support import COMPLETIONS, ServerProcess, clean_env, mullama, wait_until

ADMIN = {"Authorization": "Bearer adm"}
SIZES = ("--threads", "1", "--ctx-size", "512", "--parallel", "4", "--admin-key", "adm", "--no-store-models")
DAMAGED = 200 if os.environ.get("MULLAMA_LONG") else 40


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """``serve("a=FILE", "b=FILE", "--flag", …)``: a ready server of these models."""
    started: list[ServerProcess] = []

    def run(*args: str) -> ServerProcess:
        models = [word for arg in args if "=" in arg and not arg.startswith("-") for word in ("--model", arg)]
        rest = [arg for arg in args if "=" not in arg or arg.startswith("-")]
        server = ServerProcess(tmp_path / f"server{len(started)}", [*models, *SIZES, *rest])
        started.append(server)
        return server.wait_ready()

    yield run
    for server in started:
        server.kill()


def complete(server: ServerProcess, n: int, *, model: str = "m", prompt: str = "the sun is") -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(server.url + COMPLETIONS, json=body, headers={"X-Profile": "true"}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["usage"]["completion_tokens"] == n
    return found


def swap(server: ServerProcess, to: Path | str, kv: str = "auto", **params: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/internal/models/m/swap", json={"to": str(to), "kv": kv}, headers=ADMIN, params=params, timeout=60
    )


class Load:
    """Clients that ask without a pause until ``stop``; every answer is checked."""

    def __init__(self, server: ServerProcess, clients: int = 4) -> None:
        self.answers: list[dict[str, Any]] = []
        self._server = server
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._work = [self._pool.submit(self._run, i) for i in range(clients)]

    def _run(self, index: int) -> None:
        while not self._stopped.is_set():
            self.answers.append(complete(self._server, 120, prompt=f"number {index} of all the others"))

    def stop(self) -> None:
        self._stopped.set()
        for one in self._work:
            one.result()
        self._pool.shutdown()


@pytest.mark.parametrize("kv", ["carry", "recompute", "drain"])
def test_weights_change_under_streams(
    serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path], kv: str
) -> None:
    files = [tiny_model("llama", seed=seed) for seed in (7, 8, 9)]
    server = serve(f"m={files[0]}")
    load = Load(server)
    wait_until(lambda: load.answers)
    for i in range(9):
        answer = swap(server, files[(i + 1) % 3], kv)
        assert answer.status_code == 200, answer.text
        report = answer.json()
        assert report["weights_to"] == files[(i + 1) % 3].stem
        assert report["kv"] == kv
        assert complete(server, 2)["profile"]["weights"][-1]["weights"] == report["weights_to"]
    load.stop()
    names = {file.stem for file in files}
    for answer_ in load.answers:
        spans = answer_["profile"]["weights"]
        assert {span["weights"] for span in spans} <= names
        assert [span["from_token"] for span in spans] == sorted({span["from_token"] for span in spans})
    history = httpx.get(f"{server.url}/internal/swaps", headers=ADMIN, timeout=30).json()["swaps"]
    assert [one["state"] for one in history] == ["done"] * 9


@pytest.mark.parametrize("kv", ["carry", "recompute"])
def test_a_budget_for_one_makes_gaps(
    serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path], kv: str
) -> None:
    """Nothing is dropped; without leave for a gap the old weights stay."""
    files = [tiny_model("llama", seed=seed) for seed in (7, 8)]
    budget = estimate(files[0], n_ctx=512, n_parallel=4).total * 3 // 2
    server = serve(f"m={files[0]}", "--memory-budget", str(budget))
    load = Load(server)
    wait_until(lambda: load.answers)
    for i in range(6):
        report = swap(server, files[(i + 1) % 2], kv).json()
        assert (report["mode"], report["kv"], report["way"]) == ("gap", kv, "in_place")
        assert report["gap_ms"] > 0
        assert complete(server, 2)["profile"]["weights"][-1]["weights"] == files[(i + 1) % 2].stem
    body = {"to": str(files[1]), "gap": "never"}
    refused = httpx.post(f"{server.url}/internal/models/m/swap", json=body, headers=ADMIN, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "memory_too_small")
    load.stop()
    assert load.answers


def test_other_models_under_one_name(serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path]) -> None:
    files = [tiny_model("llama"), tiny_model("gemma3"), tiny_model("mamba")]
    server = serve(f"m={files[0]}")
    load = Load(server)
    wait_until(lambda: load.answers)
    for i, kv in enumerate(("recompute", "drain", "auto") * 2):
        answer = swap(server, files[(i + 1) % 3], kv)
        assert answer.status_code == 200, answer.text
        assert answer.json()["way"] == "side_by_side"
    load.stop()
    # The engines that were replaced are freed: one page is left.
    wait_until(lambda: len(list(server.page_dir.iterdir())) == 1)


def test_damaged_files_leave_the_old_weights(
    serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    good = tiny_model("llama")
    server = serve(f"m={good}")
    load = Load(server, clients=2)
    cases = [case for case in damage.cases(good) if case.kind != "weights"]
    step = max(len(cases) // DAMAGED, 1)
    for i, case in enumerate(cases[::step][:DAMAGED]):
        bad = case.write(tmp_path / f"bad{i}.gguf")
        answer = swap(server, bad)
        assert answer.status_code == 400, (case.name, answer.text)
        assert str(bad) in answer.json()["error"]["message"] or bad.stem in answer.json()["error"]["message"]
        bad.unlink()
    load.stop()
    assert load.answers
    assert {span["weights"] for one in load.answers for span in one["profile"]["weights"]} == {good.stem}


def test_swaps_are_refused_with_a_reason(serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path]) -> None:
    server = serve(f"m={tiny_model('llama')}")
    assert swap(server, tiny_model("mamba"), "carry").status_code == 400
    assert "architecture" in swap(server, tiny_model("mamba"), "carry").json()["error"]["message"]
    assert swap(server, "no/such.gguf").status_code == 404
    assert swap(server, tiny_model("llama"), "sideways").status_code == 400
    plain = httpx.post(f"{server.url}/internal/models/m/swap", json={"to": "Q8_0"}, timeout=30)
    assert plain.status_code in (401, 403)
    later = swap(server, tiny_model("llama", seed=8), wait="false")
    assert later.status_code == 202
    path = f"{server.url}/internal/swaps/{later.json()['id']}"
    wait_until(lambda: httpx.get(path, headers=ADMIN, timeout=30).json()["state"] == "done")


def test_two_models_take_turns_in_one_place(
    serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path]
) -> None:
    server = serve(f"a={tiny_model('llama')}", f"b={tiny_model('gemma3')}", "--max-models", "1")
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(complete, server, 20, model="ab"[i % 2]) for i in range(30)]
        assert all(one.result() for one in asked)
    rows = {
        one["name"]: one
        for one in httpx.get(f"{server.url}/internal/models", headers=ADMIN, timeout=30).json()["models"]
    }
    assert sorted(one["state"] for one in rows.values()) == ["ready", "unloaded"]
    assert rows["a"]["requests"] == rows["b"]["requests"] == 15
    listed = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    assert [one["id"] for one in listed] == ["a", "b"]


def test_two_models_compute_at_once(serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path]) -> None:
    server = serve(f"a={tiny_model('llama')}", f"b={tiny_model('llama', seed=8)}", "--arbiter", "weighted")
    alone = {name: complete(server, 100, model=name)["choices"] for name in "ab"}
    with ThreadPoolExecutor(8) as pool:
        asked = [(name, pool.submit(complete, server, 100, model=name)) for _ in range(4) for name in "ab"]
        for name, one in asked:
            assert one.result()["choices"] == alone[name]
    shares = httpx.get(f"{server.url}/internal/arbiter", headers=ADMIN, timeout=30).json()
    assert shares["policy"] == "weighted"
    assert all(share["turns"] > 100 for share in shares["models"].values())


@pytest.mark.parametrize("point", ["swap:after-load", "swap:before-commit", "swap:in-gap", "swap:after-commit"])
def test_a_crash_during_a_swap(tiny_model: Callable[..., Path], tmp_path: Path, point: str) -> None:
    """The next start is clean and serves; what is on disk has not changed."""
    files = [tiny_model("llama"), tiny_model("llama", seed=8)]
    before = [file.read_bytes() for file in files]
    args = [
        "--model",
        f"m={files[0]}",
        *SIZES,
        "--kv-disk-dir",
        str(tmp_path / "kv"),
        "--page-dir",
        str(tmp_path / "p"),
    ]
    env = clean_env(MULLAMA_CRASH_AT=point)
    if point == "swap:in-gap":
        args += ["--memory-budget", str(estimate(files[0], n_ctx=512, n_parallel=4).total * 3 // 2)]
    process = subprocess.Popen(mullama("serve", "--port", "0", *args), stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    port = int(process.stdout.readline().decode().rsplit(":", 1)[1])
    body = {"prompt": "the sun is here", "max_tokens": 30, "temperature": 0}
    httpx.post(f"http://127.0.0.1:{port}{COMPLETIONS}", json=body, timeout=60)
    with pytest.raises(httpx.HTTPError):
        url = f"http://127.0.0.1:{port}/internal/models/m/swap"
        httpx.post(url, json={"to": str(files[1])}, headers=ADMIN, timeout=60)
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    with ServerProcess(tmp_path / "again", args) as server:
        complete(server, 5)
        assert len(list((tmp_path / "p").glob("*.page"))) == 1
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("point", ["load:before-weights", "load:after-weights", "load:after-context"])
def test_a_crash_during_a_load(tiny_model: Callable[..., Path], tmp_path: Path, point: str) -> None:
    args = ["--model", f"m={tiny_model('llama')}", *SIZES, "--page-dir", str(tmp_path / "p")]
    process = subprocess.run(
        mullama("serve", "--port", "0", *args), capture_output=True, env=clean_env(MULLAMA_CRASH_AT=point), timeout=60
    )
    assert process.returncode == -signal.SIGKILL
    with ServerProcess(tmp_path / "again", args) as server:
        complete(server, 5)
        assert len(list((tmp_path / "p").glob("*.page"))) == 1
