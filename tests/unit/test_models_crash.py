"""kill -9 at every named point of a pull: the next start is clean, and the next pull has the model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_support import Hub, LocalServer, Registry, Reply, Seen, file_reply
from models_support import METADATA, make_gguf

from mullama.faults import POINTS, VARIABLE, crash_point
from mullama.models.parse import parse_reference
from mullama.models.sources import private_addresses
from mullama.models.store.entry import Entry
from mullama.models.store.store import Store
from mullama.models.store.upkeep import verify

ROOT = Path(__file__).parents[2]
PULL_POINTS = [point for point in POINTS if point.startswith("pull:")]
DATA = make_gguf(tensors=[("token_embd.weight", (32, 60_000), 8, 60_000 * 34)])
#: The points after which the model is in the store.
DONE = {"pull:after-ref"}

_PULL = """
import sys
from pathlib import Path
from mullama.models.sources import base as sources
from mullama.models.sources.local import LocalSource
from mullama.models.parse import parse_reference
from mullama.models.store.pulling import pull
from mullama.models.store.store import Store

class Copied(LocalSource):
    def normalise(self, location): return location
    def locate(self, reference): return None
    def fetch(self, reference, sink, folder, progress):
        data = Path(reference.locations[0]).read_bytes()
        for start in range(0, len(data), 100_000):
            sink.write(data[start : start + 100_000])
        return "copied.gguf"

sources.SOURCES._builtins["copied"] = "__main__:Copied"
pull(Store(Path(sys.argv[1])), parse_reference(sys.argv[2]))
"""


def parts() -> dict[str, bytes]:
    keys = {"split.count": 2, "split.tensors.count": 2}
    tensors = [[(f"blk.{n}.x", (32, 30_000), 8, 30_000 * 34)] for n in range(2)]
    return {
        "m-00001-of-00002.gguf": make_gguf({**METADATA, "split.no": 0, **keys}, tensors[0]),
        "m-00002-of-00002.gguf": make_gguf({"split.no": 1, **keys}, tensors[1]),
    }


def in_pieces(reply: Reply | None) -> Reply | None:
    if reply is not None:
        reply.pieces = 20
    return reply


class World:
    """All servers at once, on one port, and the environment in which a process finds them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {"/whole.gguf": DATA, **{f"/{name}": data for name, data in parts().items()}}
        self.hub = Hub("owner/repo", {name.replace("m-", "x-Q4_K_M-"): data for name, data in parts().items()})
        self.registry = Registry("library/tiny", "1b", {"model": DATA, "params": b'{"top_k": 3}'})
        self.hub.pieces = self.registry.pieces = 20
        self.server = LocalServer(self._web, self._ours)
        (folder / "local.bin").write_bytes(DATA)

    def _web(self, seen: Seen) -> Reply | None:
        data = self.files.get(seen.path)
        return in_pieces(file_reply(seen, data, '"v1"')) if data is not None else None

    def _ours(self, seen: Seen) -> Reply | None:
        is_registry = seen.path.startswith(("/v2/", "/cdn/"))
        return self.registry(seen) if is_registry else self.hub(seen)

    def reference(self, kind: str) -> str:
        return {
            "web": f"{self.server.url}/whole.gguf",
            "parts": f"{self.server.url}/m-00001-of-00002.gguf",
            "ollama": "ollama:tiny:1b",
            "hub": "owner/repo",
            "classic": f"copied:{self.folder}/local.bin",
        }[kind]

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        return {
            **kept,
            "PYTHONPATH": str(ROOT),
            "OLLAMA_REGISTRY": self.server.url,
            "HF_ENDPOINT": self.server.url,
            "HF_HOME": str(self.folder / "hf"),
            "HF_TOKEN": "",
            private_addresses.VARIABLE: "1",
            **extra,
        }

    def pull(self, kind: str, **extra: str) -> Any:
        """In a process of its own, which may die."""
        command = [sys.executable, "-c", _PULL, str(self.folder / "home"), self.reference(kind)]
        return subprocess.run(command, env=self.environment(**extra), capture_output=True, text=True, check=False)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    with world.server:
        yield world


CASES = [
    *(("web", point) for point in PULL_POINTS),
    *(("parts", point) for point in ("pull:in-download", "pull:after-verify", "pull:after-place")),
    *(("ollama", point) for point in ("pull:in-download", "pull:after-place")),
    *(("hub", point) for point in ("pull:in-download", "pull:after-download", "pull:after-place", "pull:after-ref")),
    *(("classic", point) for point in ("pull:in-download", "pull:after-verify")),
]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize(("kind", "point"), CASES)
def test_the_next_start_is_clean(world: World, kind: str, point: str) -> None:
    died = world.pull(kind, **{VARIABLE: point})
    assert died.returncode == -signal.SIGKILL, died.stderr
    store = Store(world.folder / "home")
    key = world.reference(kind) if kind == "classic" else parse_reference(world.reference(kind)).key
    # Whole or not at all: what is listed is sound.
    assert (store.find(key) is not None) == (point in DONE)
    assert [verify(store, entry, lambda *_: None) for entry in store.list()] == (["ok"] if point in DONE else [])

    before = len(world.server.seen)
    done = world.pull(kind)
    assert done.returncode == 0, done.stderr
    entry = store.find(key)
    assert isinstance(entry, Entry)
    assert verify(store, entry, lambda *_: None) == "ok"
    assert store.checked_path(entry).exists()
    # Nothing of the first attempt is left over.
    assert list(store.tmp.iterdir()) == []
    blobs = {path.name for path in store.blobs.iterdir()}
    assert len(blobs) == (0 if kind == "hub" else 1)
    if point in DONE:
        assert len(world.server.seen) == before
    elif point == "pull:in-download" and kind in ("web", "parts", "ollama"):
        asked = [seen.headers["range"] for seen in world.server.seen[before:] if "range" in seen.headers]
        assert asked, "the second attempt began at zero"
        assert int(asked[0][len("bytes=") : -1]) > 0


def test_every_point_is_passed_by_a_pull(world: World) -> None:
    """A point that no code passes would be tested by nothing above."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mullama").rglob("*.py"))
    assert [point for point in PULL_POINTS if f'crash_point("{point}")' not in source] == []
    assert set(PULL_POINTS) == {point for kind, point in CASES if kind == "web"}


def test_a_point_that_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    crash_point("nosuch")  # costs nothing and checks nothing in service
    monkeypatch.setenv(VARIABLE, "pull:start")
    with pytest.raises(AssertionError, match="nosuch"):
        crash_point("nosuch")
    crash_point("pull:after-ref")  # another one than the wanted
