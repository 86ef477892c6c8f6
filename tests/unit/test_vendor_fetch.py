"""What a new source looks like to the build tools that know the old one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "vendor" / "fetch.py"
LONG_AGO, BUILT = 1_600_000_000, 1_700_000_000


@pytest.fixture
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendor_fetch", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, files: dict[str, str], time: int | None) -> None:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if time is not None:
            os.utime(file, (time, time))


def test_only_what_changed_is_newer_than_the_objects(tmp_path: Path, fetch: ModuleType) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write(old, {"same.c": "a", "src/patched.c": "before", "gone.c": "x", "kind": "a file"}, LONG_AGO)
    write(new, {"same.c": "a", "src/patched.c": "after.", "new.c": "y", "kind/inner.c": "z"}, None)
    fetch.keep_times(new, old)
    times = {str(f.relative_to(new)): f.stat().st_mtime for f in new.rglob("*.c")}
    assert times.pop("same.c") == LONG_AGO
    assert set(times) == {"src/patched.c", "new.c", "kind/inner.c"}
    assert all(time > BUILT for time in times.values())


def test_an_archive_s_times_are_not_taken(tmp_path: Path, fetch: ModuleType) -> None:
    """Another archive's files may be older than the objects that were built of this one's."""
    import io
    import tarfile

    sdist = tmp_path / "x.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        info = tarfile.TarInfo("x-1/llama/ggml/a.c")
        info.size, info.mtime = 4, LONG_AGO
        archive.addfile(info, io.BytesIO(b"text"))
    fetch.unpack(sdist, {"root": "llama", "paths": ["ggml"]}, tmp_path / "out")
    assert (tmp_path / "out" / "ggml" / "a.c").stat().st_mtime > BUILT
