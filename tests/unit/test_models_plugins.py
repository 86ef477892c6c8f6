"""Entry-point groups: built-ins and third parties register alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mullama.errors import PluginError, ReferenceNotFound
from mullama.models.parse import parse_reference
from mullama.models.sources.base import SOURCES, load_source
from mullama.models.sources.local import LocalSource
from mullama.models.store.pulling import pull
from mullama.models.store.store import Store
from mullama.plugins.groups import PluginGroup

GROUP = "mullama.test_group"


def install(folder: Path, package: str, group: str, **names: str) -> None:
    """A package as pip would install it: one module, and metadata with entry points."""
    (folder / f"{package}.py").write_text(
        "from mullama.models.sources.local import LocalSource\n"
        "class Mine(LocalSource):\n"
        "    def normalise(self, location): return location\n"
        "    def locate(self, reference): return None\n"
        "    def fetch(self, reference, sink, folder, progress):\n"
        "        sink.write(open(reference.locations[0], 'rb').read())\n"
        "        return 'Fetched.gguf'\n"
    )
    info = folder / f"{package}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    lines = "".join(f"{name} = {value}\n" for name, value in names.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(SOURCES, "_loaded", {})
    return tmp_path


def test_built_ins_need_no_installed_metadata() -> None:
    assert SOURCES.load("file") is LocalSource
    assert SOURCES.has("pypi")
    assert SOURCES.names()[:2] == ["file", "pypi"]


def test_a_third_party_source_works_end_to_end(site: Path) -> None:
    from models_support import make_gguf

    install(site, "third_party_a", "mullama.sources", mine="third_party_a:Mine")
    model = site / "model.bin"
    model.write_bytes(make_gguf())
    reference = parse_reference(f"mine:{model}")
    assert reference.source == "mine"
    entry = pull(Store(site / "home"), reference)
    assert entry.filename == "Fetched.gguf"
    assert "mine" in SOURCES.names()
    sys.modules.pop("third_party_a")


def test_built_in_names_are_reserved(site: Path) -> None:
    install(site, "third_party_b", "mullama.sources", file="third_party_b:Mine")
    assert SOURCES.load("file") is LocalSource
    assert SOURCES.names().count("file") == 1


def test_a_name_offered_twice(site: Path) -> None:
    install(site, "one", GROUP, x="one:Mine")
    install(site, "two", GROUP, x="two:Mine", y="two:Mine")
    group = PluginGroup(GROUP, "thing", {})
    with pytest.raises(PluginError, match=r"several packages offer the thing 'x': one:Mine, two:Mine"):
        group.load("x")
    assert group.load("y").__name__ == "Mine"


def test_what_cannot_be_imported_is_the_plugins_fault(site: Path) -> None:
    install(site, "three", GROUP, absent="three:Nope", broken="four:X")
    (site / "four.py").write_text("1 / 0")
    group = PluginGroup(GROUP, "thing", {})
    with pytest.raises(PluginError, match=r"cannot load the thing 'absent' \(three:Nope\): AttributeError"):
        group.load("absent")
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        group.load("broken")


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(PluginError, match="there is no model source 'x'; there are file, pypi"):
        load_source("x")
    with pytest.raises(ReferenceNotFound):
        parse_reference("x:y")
