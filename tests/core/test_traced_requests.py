"""The three requests that docs/architecture.md traces, run in this process under a profiler: every call that it names
is seen, in the file and on the thread that it says, in its order; and the threads are those of its table.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest
from docs_support import ROOT, Call, calls, table

import mullama
from mullama.cli.server.serving import make_manager, make_swaps
from mullama.config import ServeConfig
from mullama.engine.engine import Engine
from mullama.kv.choice import KvSource
from mullama.web.server import Server, bind
from mullama.web.services import Services

PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = Path(mullama.__file__).parent
LOOP = "the-event-loop"
CHATS = 60  # tries: a loop that another process holds up may get a whole answer at once

#: The page's words for threads, by how their names begin.
THREADS = {
    "MainThread": "loading",
    LOOP: "event loop",
    "mullama-engine-": "engine",
    "mullama-background": "background",
    "mullama-kv-disk": "KV disk",
    "asyncio_": "worker",
    "uvloop_": "worker",
}

Record = dict[str, list[tuple[str, str]]]


class Profile:
    """What is called while it is installed: (file, qualified name) in order, by thread."""

    def __init__(self, wanted: set[tuple[str, str]]) -> None:
        self._files = {str(PACKAGE / file): file for file, _ in wanted}
        self._wanted = wanted
        self._calls: list[tuple[str, str, str]] = []

    def __enter__(self) -> Profile:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _note(self, frame: FrameType, event: str, arg: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        file = self._files.get(code.co_filename)
        if file is None:
            return
        # A function within a function is named by its own name alone.
        name = code.co_qualname.rpartition("<locals>.")[2]
        if (file, name) in self._wanted:
            self._calls.append((threading.current_thread().name, file, name))

    def mark(self) -> int:
        """Now, for ``since``."""
        return len(self._calls)

    def since(self, begin: int, end: int | None = None) -> Record:
        found: Record = defaultdict(list)
        for thread, file, name in self._calls[begin:end]:
            word = next((word for prefix, word in THREADS.items() if thread.startswith(prefix)), thread)
            found[word].append((file, name))
        return found


def missing(trace: list[Call], record: Record) -> list[Call]:
    """The calls of a trace that were not seen on their thread behind the one before them."""
    lost, at = [], defaultdict(int)
    for call in trace:
        if not call.file.endswith(".py"):
            continue
        seen = record[call.thread]
        try:
            at[call.thread] = seen.index((call.file, call.function), at[call.thread]) + 1
        except ValueError:
            lost.append(call)
    return lost


def traced(heading: str) -> list[Call]:
    return calls(PAGE, heading)


class Served:
    """A server of one model in a thread."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.config = ServeConfig(
            port=0, ctx_size=512, parallel=2, threads=1, batch_size=64, admin_key="adm", store_models=False,
            memory_budget="0", kv_host_bytes=1 << 26, kv_disk_dir=str(folder / "kv"), page_dir=str(folder / "pages"),
        )  # fmt: skip
        self.models = make_manager(self.config)
        self.engine = Engine.load(file, name="m", config=self.config)
        self.models.add_loaded("m", self.engine)
        listener = bind(self.config)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.services = Services(self.config, self.models, make_swaps(self.config, self.models))
        self.server = Server(self.config, self.services, listener)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": listener.all}, name=LOOP)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.005)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        answer = httpx.post(self.url + path, json=body, headers={"Authorization": "Bearer adm"}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer

    def chat(self, text: str) -> list[Any]:
        """The events of a streamed chat."""
        body = {
            "model": "m", "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 200,
            "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        lines = self.post("/v1/chat/completions", body).text.split("\n\n")
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def settle(self) -> None:
        """What waits for the disk is written, and the engine knows."""
        disk = self.engine._kv.disk
        assert disk is not None
        disk.written().result()
        self.engine.call(lambda: None).result()

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.services.close()
        self.models.close()


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Profile]:
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "home"))
    headings = ("A chat, traced", "A swap, traced", "How it gets there", "How it comes back")
    with Profile({(call.file, call.function) for heading in headings for call in traced(heading)}) as installed:
        yield installed


@pytest.fixture
def serve(tmp_path: Path, profile: Profile) -> Iterator[Callable[[Path], Served]]:
    """``serve(file)``: all of them keep KV in one folder."""
    started: list[Served] = []

    def start(file: Path) -> Served:
        started.append(Served(file, tmp_path))
        return started[-1]

    yield start
    for one in started:
        if one.thread.is_alive():
            one.close()


TEXT = "the sun is here and all of the others are in it, for the time that we have"


def test_a_chat(serve: Callable[[Path], Served], profile: Profile, tiny_model: Callable[..., Path]) -> None:
    others = set(threading.enumerate())  # of the tests before
    begin = profile.mark()
    served = serve(tiny_model("llama"))
    lost = traced("A chat, traced")
    for _ in range(CHATS):
        assert len(served.chat(TEXT)) > 2
        served.settle()
        lost = missing(traced("A chat, traced"), profile.since(begin))
        if not lost:
            break
    assert lost == []
    # Whatever runs now stands in the page's table.
    known = {row[1].strip("`").removesuffix("NAME") for row in table(PAGE, "Threads") if row[1].startswith("`")}
    running = {thread.name for thread in threading.enumerate() if thread not in others}
    assert [name for name in running if not name.startswith((*known, *THREADS))] == []
    assert {"mullama-engine-m", "mullama-kv-disk"} <= running


def test_a_swap(serve: Callable[[Path], Served], profile: Profile, tiny_model: Callable[..., Path]) -> None:
    old, new = tiny_model("llama", seed=7), tiny_model("llama", seed=8)
    served = serve(old)
    body = {
        "model": "m", "messages": [{"role": "user", "content": TEXT}], "stream": True, "max_tokens": 1_000_000,
        "temperature": 0, "ignore_eos": True, "context_policy": "shift",
    }  # fmt: skip
    begin = profile.mark()
    headers = {"Authorization": "Bearer adm"}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as stream:
        pieces = stream.iter_bytes()
        assert next(pieces)
        report = served.post("/internal/models/m/swap", {"to": str(new)}).json()
    assert (report["way"], report["mode"], report["kv"]) == ("in_place", "beside", "carry")
    assert report["sequences_moved"] == 1
    assert missing(traced("A swap, traced"), profile.since(begin)) == []


def test_a_prefix_restored_from_disk(
    serve: Callable[[Path], Served], profile: Profile, tiny_model: Callable[..., Path]
) -> None:
    first = serve(tiny_model("llama"))
    begin = profile.mark()
    first.chat(TEXT)
    first.settle()
    assert missing(traced("How it gets there"), profile.since(begin)) == []
    first.close()
    begin = profile.mark()
    second = serve(tiny_model("llama"))
    usage = second.chat(TEXT)[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 16
    assert missing(traced("How it comes back"), profile.since(begin)) == []
    assert second.engine._kv.hits[KvSource.DISK] > 16
