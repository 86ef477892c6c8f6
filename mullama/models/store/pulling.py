"""The steps of a pull: lock, sweep, adopt or fetch, verify, place.

Whatever stops it (an error, Ctrl-C, SIGKILL between any two lines), the store holds the model whole or not at all.
What a resumable source had downloaded stays in its temporary folder for the next attempt, for a week.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mullama.errors import ReferenceNotFound, StoreError
from mullama.faults import crash_point
from mullama.files import disk_errors, human_size, sync_folder
from mullama.machine.folders import free_bytes
from mullama.models.files import gguf
from mullama.models.reference import Reference, check_name
from mullama.models.sources.base import (
    Fetched,
    FetchedFile,
    Job,
    Progress,
    ResumableSource,
    Sink,
    Source,
    load_source,
)
from mullama.models.sources.private_addresses import is_private_allowed
from mullama.models.sources.selection import quant_of
from mullama.models.store.digests import hash_file
from mullama.models.store.entry import MADE, Entry, Part, is_digest, is_plain_name, set_digest
from mullama.models.store.store import Store, hash_key, how_to_get, no_progress

#: In the temporary folder of a resumable source; tells the sweep whose it is, and its own age how old.
RESUME_FILE = "resume.json"
_RESUME_SECONDS = 7 * 24 * 3600.0
_READ_ONLY = 0o444
_WAIT_SECONDS = 0.5  # until somebody who waits for another process is asked again whether to go on


def pull(store: Store, reference: Reference, progress: Progress = no_progress, *, force: bool = False) -> Entry:
    """Fetch a reference unless it is there, verify it and place it.

    ``force`` trusts nothing that is there: it is hashed again where the sha256 is known, else fetched again.
    A second process that pulls the same waits and finds it done. Raises ReferenceNotFound (no such model,
    or a local file, which is used where it lies), StoreError (network, disk full, wrong checksum),
    ModelLoadError (what was fetched is not a sound GGUF). Whatever is raised, nothing half-placed stays.
    """
    if reference.is_local:
        raise ReferenceNotFound(
            f"{reference.key} is a local file; it is used where it lies, and mullama pull NAME={reference.key} "
            "keeps a copy of it under a name"
        )
    if not force and (entry := store.find(reference.key)):
        return entry
    if reference.source == MADE:
        raise ReferenceNotFound(f"{reference.key} is not in the store; {how_to_get(reference)}")
    with disk_errors(f"keep {reference.key} in the store {store.root}"):
        store.make_folders()
        with _key_lock(store, reference.key, progress):
            crash_point("pull:start")
            if not force and (entry := store.find(reference.key)):
                return entry
            sweep(store, own=hash_key(reference.key))
            entry = _adopt(store, reference, progress) or _fetch(store, reference, progress, force)
            crash_point("pull:after-ref")
            return entry


def add_file(
    store: Store,
    path: Path,
    *,
    key: str,
    variant_of: str | None = None,
    quant: str | None = None,
    filename: str | None = None,
    progress: Progress = no_progress,
    made_of: Entry | None = None,
) -> Entry:
    """Move a finished file of :meth:`Store.temp_folder` into the store, under a new key; one of that key is replaced.

    ``made_of``, or else the entry of ``variant_of``, gives it its licence and what came beside the weights:
    parameters, template, system message.

    Raises StoreError (disk), ModelLoadError (not a sound GGUF), ConfigError (a key that cannot be a name).
    """
    check_name(key)
    filename = filename or path.name
    with disk_errors(f"keep {key} in the store {store.root}"):
        store.make_folders()
        header = gguf.check(path, label=key)
        size = path.stat().st_size
        digest = hash_file(path, lambda done: progress("hashing", done, size))
        base = made_of or (store.read(variant_of) if variant_of is not None else None)
        # What came beside the weights holds for every quantisation of them.
        beside: dict[str, Any] = {}
        if base is not None:
            beside = {name: getattr(base, name) for name in ("defaults", "template", "system", "license_text")}
        entry = Entry(
            key=key.lower(),
            source=MADE,
            locations=(filename,),
            filename=filename,
            sha256=digest,
            size=size,
            license=base.license if base is not None else _licence_of(header),
            pulled_at=_now(),
            quant=quant,
            variant_of=variant_of,
            **beside,
        )
        with store.store_lock():
            _place_blob(store, path, digest)
            return store.write_entry(entry)


def keep_copy(store: Store, path: Path, key: str, progress: Progress = no_progress) -> Entry:
    """Copy a file of the user's into the store under a name; one that is there under it is replaced.

    Raises what ``add_file`` raises, and StoreError for a model in parts.
    """
    if len(gguf.part_paths(path)) > 1:
        raise StoreError(f"{path} is one part of several; a copy under a name is made of a single file only")
    with store.temp_folder() as folder, disk_errors(f"copy {path} into the store {store.root}"):
        target, size = folder / "model.gguf", path.stat().st_size
        if shutil.disk_usage(folder).free < size:
            raise StoreError(f"cannot copy {path}: the disk of {store.root} has no {human_size(size)} free")
        with path.open("rb") as source, target.open("wb") as file:
            while block := source.read(1 << 22):
                file.write(block)
                progress("copying", file.tell(), size)
        return add_file(store, target, key=key, quant=quant_of(path.name), filename=path.name, progress=progress)


def sweep(store: Store, own: str) -> None:
    """Remove what killed processes left: temporary folders whose lock nobody holds, downloads that nobody resumed."""
    import filelock

    for path in store.tmp.iterdir():
        name = path.name.removesuffix(".json")
        if name == own:  # we hold that lock, and resume or overwrite what lies there
            continue
        with contextlib.suppress(filelock.Timeout), store.lock(name).acquire(timeout=0):
            if path.is_dir() and not _is_resumable(path):
                shutil.rmtree(path, ignore_errors=True)
                if name.startswith("work-"):
                    (store.locks / f"{name}.lock").unlink(missing_ok=True)
            elif path.is_file():
                path.unlink(missing_ok=True)
    store.digests.prune()


def _is_resumable(folder: Path) -> bool:
    """Whether the folder of a download that was broken off is young enough to be gone on with."""
    try:
        return time.time() - (folder / RESUME_FILE).stat().st_mtime < _RESUME_SECONDS
    except OSError:
        return False


def _adopt(store: Store, reference: Reference, progress: Progress) -> Entry | None:
    """A blob that is here already under another key, verified again; None when there is none."""
    if reference.sha256 is None or not is_digest(reference.sha256):
        return None
    path = store.blob_path(reference.sha256)
    try:
        size = path.stat().st_size
        if hash_file(path, lambda done: progress("verifying", done, size)) != reference.sha256:
            return None
        with store.store_lock():
            store.digests.note(path, reference.sha256)  # it may have been removed meanwhile: FileNotFoundError
            other = next((e for e in store.list() if e.sha256 == reference.sha256), None)
            entry = _entry(reference, reference.file_name, reference.sha256, size)
            if other is not None:
                entry = replace(entry, defaults=other.defaults, template=other.template, system=other.system,
                                license_text=other.license_text, license=entry.license or other.license)  # fmt: skip
            return store.write_entry(entry)
    except FileNotFoundError:
        return None


def _fetch(store: Store, reference: Reference, progress: Progress, force: bool) -> Entry:
    source = load_source(reference.source)
    folder = store.tmp / hash_key(reference.key)
    resumes = isinstance(source, ResumableSource)
    if not resumes or not _is_resumable(folder):
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed: we hold its lock
    folder.mkdir(exist_ok=True)
    keep = False
    try:
        if reference.size is not None:
            check_space(store, reference, reference.size)
        if isinstance(source, ResumableSource):
            _write_resume(folder, reference)
            job = Job(
                folder=folder,
                progress=progress,
                allow_private=is_private_allowed(),
                is_forced=force,
                check_space=lambda size: check_space(store, reference, size),
                have=lambda sha256: _have(store, sha256, is_forced=force),
            )
            try:
                fetched = source.obtain(reference, job)
            except (StoreError, KeyboardInterrupt):
                keep = True  # what is on disk of it can be gone on with
                raise
        else:
            fetched = _drain(source, reference, folder, progress)
        crash_point("pull:after-download")
        return _take(store, reference, fetched)
    finally:
        if not keep or not any(folder.glob("*.part")):
            shutil.rmtree(folder, ignore_errors=True)


def _have(store: Store, sha256: str, *, is_forced: bool) -> Path | None:
    """A sound blob; one that changed since it was verified, or any when forced, is hashed first."""
    path = store.blob_path(sha256)
    try:
        return path if (hash_file(path) if is_forced else store.digests.of(path)) == sha256 else None
    except OSError:
        return None


def _drain(source: Source, reference: Reference, folder: Path, progress: Progress) -> Fetched:
    """What a source without resumption writes, as the one file it is."""
    scratch = folder / "source"
    scratch.mkdir()
    path = folder / "model.gguf"
    with path.open("wb") as file:
        sink = Sink(file)
        filename = source.fetch(reference, sink, scratch, progress)
        file.flush()
        os.fsync(file.fileno())
    return Fetched((FetchedFile(path, filename, sink.sha256),))


def _take(store: Store, reference: Reference, fetched: Fetched) -> Entry:
    """Verify what a source has ready, and place it with its ref."""
    first = fetched.files[0]
    # A part is called model-00001-of-00003.gguf in the store, whatever the source says; in place it keeps its name.
    parts = tuple(
        Part(
            file.filename if fetched.is_in_place else f"model-{number:05}-of-{len(fetched.files):05}.gguf",
            file.sha256,
            file.path.stat().st_size,
        )
        for number, file in enumerate(fetched.files, 1)
    )
    digest = first.sha256 if len(parts) == 1 else set_digest(part.sha256 for part in parts)
    if reference.sha256 is not None and digest != reference.sha256:
        raise StoreError(
            f"{reference.key}: what was downloaded is not the file that was expected "
            f"(sha256 {digest}, expected {reference.sha256}); nothing was kept"
        )
    if len(parts) > 1 and not fetched.is_in_place:
        files = [
            file.path.rename(file.path.with_name(part.filename))
            for file, part in zip(fetched.files, parts, strict=True)
        ]
    else:
        files = [file.path for file in fetched.files]
    header = gguf.check(files[0], label=reference.key)
    crash_point("pull:after-verify")
    entry = _entry(reference, first.filename, digest, sum(part.size for part in parts))
    entry = replace(
        entry,
        license=entry.license or fetched.license or _licence_of(header),
        parts=parts if len(parts) > 1 else (),
        place=str(files[0].parent) if fetched.is_in_place else None,
        is_borrowed=fetched.is_borrowed and not _is_ours(store, files[0]),
        revision=fetched.revision,
        quant=fetched.quant or entry.quant,
        defaults=fetched.defaults,
        template=fetched.template,
        system=fetched.system,
        license_text=fetched.license_text,
    )
    if not all(is_plain_name(part.filename) for part in parts):
        raise StoreError(f"{reference.key}: '{first.filename}' is not a file name; nothing was kept")
    with store.store_lock():
        if fetched.is_in_place:
            store.quarantine_path(entry).unlink(missing_ok=True)
            for path, part in zip(files, parts, strict=True):
                store.digests.note(path, part.sha256)
        elif len(files) == 1:
            _place_blob(store, files[0], digest)
        else:
            _place_parts(store, files, parts, digest)
        crash_point("pull:after-place")
        return store.write_entry(entry)


def _is_ours(store: Store, path: Path) -> bool:
    """Whether an entry has a file in another program's cache that was put there for it."""
    return any(
        path == store.path_of(entry) for entry in store.entries() if entry.place is not None and not entry.is_borrowed
    )


def _make_durable(path: Path) -> None:
    """Make a file read-only and durable, before it is renamed into the blobs."""
    if os.name != "nt":  # there, only who writes a file can sync it
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    path.chmod(_READ_ONLY)


def _place_blob(store: Store, path: Path, digest: str) -> None:
    """Move a verified file among the blobs. The caller holds the store's lock."""
    blob = store.blob_path(digest)
    _make_durable(path)
    # One that is there already is replaced, for it may be damaged; who has it open keeps the old one.
    # On Windows an open file cannot be replaced, and need not be.
    with contextlib.suppress(*((PermissionError,) if blob.exists() else ())):
        path.replace(blob)
    sync_folder(store.blobs)
    store.digests.note(blob, digest)
    (store.quarantine / blob.name).unlink(missing_ok=True)


def _place_parts(store: Store, files: list[Path], parts: tuple[Part, ...], digest: str) -> None:
    """Move the verified parts of one model among the blobs, as a folder. The caller holds the store's lock."""
    ready = files[0].parent / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    for path in files:
        _make_durable(path)
        path.rename(ready / path.name)
    sync_folder(ready)
    target = store.blobs / f"sha256-{digest}.parts"
    if target.exists():  # damaged, or it would have been found: out of the way, since a folder cannot be replaced
        target.rename(files[0].parent / "old")
    ready.rename(target)
    sync_folder(store.blobs)
    for part in parts:
        store.digests.note(target / part.filename, part.sha256)
    store.quarantine.joinpath(f"sha256-{digest}.gguf").unlink(missing_ok=True)


def _entry(reference: Reference, filename: str, sha256: str, size: int) -> Entry:
    return Entry(
        key=reference.key,
        source=reference.source,
        locations=reference.locations,
        filename=filename,
        sha256=sha256,
        size=size,
        license=reference.license,
        pulled_at=_now(),
        quant=reference.quant or quant_of(filename),
    )


def _licence_of(header: gguf.Header) -> str | None:
    """It is printed later; the file must not steer the terminal then."""
    licence = header.get("general.license")
    return "".join(filter(str.isprintable, licence[:100])) or None if isinstance(licence, str) else None


def check_space(store: Store, reference: Reference, size: int) -> None:
    """Refuse before the download what cannot fit."""
    free = free_bytes(store.tmp)
    if free is not None and free < size:
        raise StoreError(
            f"cannot pull {reference.key}: it needs {size / 1e6:.0f} MB and the disk of {store.root} "
            f"has {free / 1e6:.0f} MB free"
        )


def _write_resume(folder: Path, reference: Reference) -> None:
    (folder / RESUME_FILE).write_text(json.dumps({"key": reference.key}), encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _key_lock(store: Store, key: str, progress: Progress) -> Iterator[None]:
    import filelock

    lock = store.lock(hash_key(key))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        # In short waits, so that the progress has a say in whether it goes on.
        while not lock.is_locked:
            progress("waiting for another process that pulls the same", 0, None)
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=_WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()
