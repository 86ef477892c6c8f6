"""What keeps a server from starting, and what is only worth a note."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from models_support import make_gguf

from mullama import abi
from mullama.cli.main import main
from mullama.config import ServeConfig
from mullama.errors import ConfigError, MachineUnfit
from mullama.installation import instructions, libraries
from mullama.machine import folders
from mullama.models.store import pulling
from mullama.serving import readiness


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store and a runtime folder of this test's own, and libraries that nobody looks at."""
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(abi, "runtime_dir", lambda: tmp_path / "run" / "mullama")
    monkeypatch.setattr(libraries, "check", lambda: None)
    monkeypatch.setattr(instructions, "check", lambda: None)
    monkeypatch.setattr(readiness, "_fits", lambda path, config, name: None)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "m.gguf"
    file.write_bytes(make_gguf())
    return str(file)


@pytest.fixture
def blocked(tmp_path: Path) -> Callable[[str], Path]:
    """A folder that cannot be made, whoever asks: a file lies in its way."""

    def make(name: str) -> Path:
        (tmp_path / f"{name}.file").write_text("")
        return tmp_path / f"{name}.file" / name

    return make


def find(config: ServeConfig) -> readiness.Findings:
    return readiness.examine(config, readiness.folders_of(config))


def test_all_is_well(model: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    found = find(ServeConfig(model=[model], kv_disk_dir=str(place / "deep" / "kv")))
    assert (found.faults, found.notes) == ([], [])
    assert sorted(place.rglob("*")) == before  # folders were tried, and nothing is left
    readiness.require(ServeConfig(model=[model]))


def test_a_store_that_cannot_be_written_to(
    model: str, blocked: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = blocked("store")
    monkeypatch.setenv("MULLAMA_HOME", str(store))
    found = find(ServeConfig(model=[model]))
    assert found.faults == []
    assert found.notes == [
        f"nothing can be written to the store {store}: Not a directory; name another with MULLAMA_HOME"
    ]
    found = find(ServeConfig())  # whose model would have to be fetched
    assert found.faults == [f"smollm2:135m is not here, and the store {store} cannot be written to fetch it"]


def test_a_page_folder_that_cannot_be_made(
    model: str, blocked: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = blocked("pages")
    line = f"nothing can be written to the page folder {pages}: Not a directory; name another with --page-dir"
    assert find(ServeConfig(model=[model], page_dir=str(pages))).faults == [line]
    monkeypatch.setattr(abi, "runtime_dir", lambda: pages)
    found = find(ServeConfig(model=[model]))
    assert (found.faults, found.notes) == ([], [line])


def test_no_write_access_anywhere(model: str, blocked: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setenv("MULLAMA_HOME", str(blocked("store")))
    monkeypatch.setattr(abi, "runtime_dir", none)
    found = find(ServeConfig(model=[model]))
    assert [line.partition(":")[0].rpartition(" ")[0] for line in found.faults] == [
        "nothing can be written to the page folder",
        "nothing can be written to the store",
    ]
    assert "No usable temporary directory found" in found.faults[0]


def test_the_folder_of_the_disk_tier(model: str, blocked: Callable[[str], Path]) -> None:
    disk = blocked("kv")
    (line,) = find(ServeConfig(model=[model], kv_disk_dir=str(disk))).faults
    assert line.startswith(f"nothing can be written to the folder of cached KV {disk}: ")


def test_no_room_on_the_disk(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(pulling, "free_bytes", lambda path: 1_000_000)
    assert find(ServeConfig()).faults == [
        f"cannot pull smollm2:135m: it needs 98 MB and the disk of {place / 'home'} has 1 MB free"
    ]


def test_models_that_are_not_there(place: Path) -> None:
    found = find(ServeConfig(model=[str(place / "none.gguf"), "b=" + str(place / "neither.gguf")]))
    assert len(found.faults) == 2  # a line each
    assert "none.gguf" in found.faults[0]
    with pytest.raises(ConfigError):
        find(ServeConfig(model=[".bad name.=" + str(place / "none.gguf")]))


def test_faults_of_the_build_come_first(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit() -> None:
        raise MachineUnfit(["the library a is missing", "the library b is missing"])

    monkeypatch.setattr(libraries, "check", unfit)
    found = find(ServeConfig(model=[model, model + ".none"]))
    assert found.faults[:2] == ["the library a is missing", "the library b is missing"]
    assert len(found.faults) == 3
    with pytest.raises(MachineUnfit) as raised:
        readiness.require(ServeConfig(model=[model, model + ".none"]))
    assert raised.value.faults == found.faults


# -- the commands


def test_serve_and_doctor_say_the_same(
    model: str, blocked: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    args = ["--model", model, "--page-dir", str(blocked("pages")), "--kv-disk-dir", str(blocked("kv"))]
    assert main(["serve", *args]) == 1
    refused = capsys.readouterr()
    assert refused.out == ""
    lines = refused.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: nothing can be written to the ") for line in lines)
    assert main(["doctor", *args]) == 1
    told = capsys.readouterr()
    assert told.err.splitlines() == lines
    assert "nothing is wrong" not in told.out
    assert main(["doctor", "--json", *args]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [f"error: {fault}" for fault in report["faults"]] == lines


def test_doctor_where_all_is_well(model: str, capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert main(["doctor", "--model", model, "--threads", "3"]) == 0
    out = capsys.readouterr().out
    for name in ("processor", "instructions", "threads", "memory", "store", "page folder", "build", "libraries"):
        assert f"\n{name} " in f"\n{out}", name
    assert "3 to compute with" in out
    assert out.endswith("nothing is wrong\n")
    assert not (place / "home").exists()


# -- folders


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    found = folders.look(tmp_path / "a" / "b")
    assert (found.problem, (tmp_path / "a").exists()) == (None, False)
    assert found.free is not None
    (tmp_path / "a").mkdir()
    assert folders.look(tmp_path / "a" / "b").problem is None
    assert list((tmp_path / "a").iterdir()) == []


def test_a_link_to_nowhere_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert folders.look(tmp_path / "link").problem == "No such file or directory"
