"""What is told of a build whose files are missing or damaged. Nothing here is loaded."""

from __future__ import annotations

import json
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from mullama.errors import MachineUnfit
from mullama.installation import instructions, libraries

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def elf(size: int = 4096) -> bytes:
    """A file that is a library as far as its head and its length tell: the table of sections ends with it."""
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", head, 0x28, size - 2 * 64)
    struct.pack_into("<HH", head, 0x3A, 64, 2)
    return bytes(head) + bytes(size - 64)


class Build:
    def __init__(self, folder: Path) -> None:
        self.lib, self.core = folder / "lib", folder / "_core"
        for one in (self.lib, self.core):
            one.mkdir()
        self.library = self.lib / "libggml.so"
        self.module = self.core / f"loop{SUFFIX}"
        self.library.write_bytes(elf())
        self.module.write_bytes(elf())
        self.record()

    def record(self, **changes: object) -> None:
        record = {"python": HERE, "libraries": ["libggml.so"], "modules": ["loop"], **changes}
        (self.lib / "build.json").write_text(json.dumps(record))
        instructions.build_record.cache_clear()


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    monkeypatch.setattr(instructions, "library_folder", lambda: tmp_path / "lib")
    made = Build(tmp_path)
    yield made
    instructions.build_record.cache_clear()


def test_a_whole_build(build: Build) -> None:
    assert libraries.faults() == []
    assert [(one.name, one.size, one.fault) for one in libraries.libraries()] == [
        ("libggml.so", 4096, None),
        (f"loop{SUFFIX}", 4096, None),
    ]


def test_each_missing_file_has_a_line(build: Build) -> None:
    build.library.unlink()
    (first,) = libraries.faults()
    assert first.startswith(f"the library {build.library} is missing; install mullama again")
    build.module.unlink()
    assert len(libraries.faults()) == 2
    with pytest.raises(MachineUnfit) as unfit:
        libraries.check()
    assert unfit.value.faults == libraries.faults()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only ELF files are understood")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>" * 10, "is damaged: it is not a library"),
        (b"\x7fELF", "is damaged: it is not a library"),
        (elf()[:4000], "is damaged: it is cut off after 4000 bytes"),
        (elf()[:64], "is damaged: it is cut off after 64 bytes"),
    ],
)
def test_a_damaged_file_is_not_loaded(build: Build, content: bytes, words: str) -> None:
    build.library.write_bytes(content)
    (line,) = libraries.faults()
    assert line.startswith(f"the library {build.library} {words}; ")


def test_a_folder_in_the_place_of_a_file(build: Build) -> None:
    build.library.unlink()
    build.library.mkdir()
    (line,) = libraries.faults()
    assert "cannot be read: Is a directory" in line


def test_another_python(build: Build) -> None:
    build.record(python="2.7")
    assert libraries.faults() == []  # its modules are there: it is the same after all
    build.module.unlink()
    (line,) = libraries.faults()
    assert f"was built for Python 2.7, this is Python {HERE}" in line


@pytest.mark.parametrize("record", [None, "not json", "[]"])
def test_without_a_record(build: Build, record: str | None) -> None:
    file = build.lib / "build.json"
    file.unlink()
    if record is not None:
        file.write_text(record)
    instructions.build_record.cache_clear()
    (line,) = libraries.faults()
    assert line.startswith(f"the record of the build {file} is missing or damaged; ")
    assert libraries.libraries() == []


def test_a_library_that_does_not_load_is_named(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("libggml.so: undefined symbol:\nggml_x")

    monkeypatch.setattr(libraries.importlib, "import_module", refuse)
    with pytest.raises(MachineUnfit) as unfit:
        libraries.check()
    (line,) = unfit.value.faults
    assert line.startswith(
        "the library loop does not load: libggml.so: undefined symbol: ggml_x; install mullama again"
    )
