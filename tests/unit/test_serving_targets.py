"""What a swap's ``to`` means; quantising and the check by a child process are fakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models_support import make_gguf

from mullama.errors import InvalidRequest, PermissionDenied, ReferenceNotFound
from mullama.models.store.store import Store
from mullama.serving import targets
from mullama.serving.targets import find_target, known_digest


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "home"))
    found: list[Path] = []
    monkeypatch.setattr(targets, "check_model", lambda path, **options: found.append(path))
    monkeypatch.setattr(targets, "check_type", _check_type)  # the real one asks llama.cpp
    return found


def _check_type(name: str) -> str:
    if name.upper() not in ("Q8_0", "Q4_0"):
        raise InvalidRequest(f"'{name}' is not a quantisation type", param="type")
    return name.upper()


def find(to: str, reference: str = "./m.gguf", *, may_read_files: bool = True) -> targets.Target:
    return find_target(to, reference, store=Store(), progress=lambda *_: None, may_read_files=may_read_files)


def test_a_file_takes_the_right_to_read_files(checked: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "Other.gguf"
    path.write_bytes(make_gguf())
    with pytest.raises(PermissionDenied, match="--admin-key"):
        find(str(path), may_read_files=False)
    assert checked == []
    target = find(str(path))
    assert (target.path, target.label, checked) == (path, "Other", [path])


def test_a_quantisation_of_the_served_file(
    checked: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, str]] = []

    class Made(Exception):
        pass

    def quantize(store: Store, base: Any, ftype: str, progress: Any) -> Any:
        asked.append((base, ftype))
        raise Made

    monkeypatch.setattr(targets, "quantize_variant", quantize)
    path = tmp_path / "m-Q8_0.gguf"
    with pytest.raises(ReferenceNotFound, match="not there any more"):
        find("Q4_0", str(path))
    path.write_bytes(make_gguf())
    with pytest.raises(Made):
        find("q4_0", str(path), may_read_files=False)
    assert asked == [(path, "Q4_0")]
    assert find("Q8_0", str(path)).path == path  # it is one already
    with pytest.raises(ReferenceNotFound, match="not in the store"):
        find("Q4_0", "hf:owner/nosuch")


def test_a_model_without_an_entry_has_no_known_digest() -> None:
    assert known_digest(None) == (None, False)
