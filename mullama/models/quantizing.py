"""Quantised variants: another type of the same weights, made here and kept in the store beside the model.

llama.cpp quantises without progress, without a way to stop, and writes in place; so a child of low priority does it,
into a temporary folder of the store, and what it leaves is placed only when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mullama import child
from mullama.errors import DiskFull, InvalidRequest, LoadCancelled, ModelLoadError, StoreError
from mullama.models.files import gguf
from mullama.models.files.gguf import TENSOR_TYPES, Header
from mullama.models.files.imatrix import check_matches, read_imatrix
from mullama.models.reference import check_name, name_of_file
from mullama.models.sources.base import Progress
from mullama.models.sources.selection import quant_of
from mullama.models.store.digests import digest_of
from mullama.models.store.entry import Entry
from mullama.models.store.pulling import add_file, sweep
from mullama.models.store.store import Store, hash_key, no_progress

log = logging.getLogger(__name__)

Cancel = Callable[[], bool]  # answers True when the work should stop

_TENSOR_LINE = re.compile(rb"\[ *(\d+)/ *(\d+)\] +(\S+) ")
_POLL_SECONDS = 0.1
_NEED_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "Q2_K_S"}
_PLAIN = {"F32", "F16", "BF16"}  # types that lose little when they are quantised


#: Begins the step that says what is made of what, before it is made.
MAKING = "making "


@dataclass(frozen=True, slots=True)
class Source:
    """The model that is quantised. ``key`` is what its variants are kept under as ``variant_of``."""

    key: str
    label: str  # what messages call it
    name: str  # what a variant's key is made of
    path: Path
    filename: str
    since: str = ""  # when it was pulled; variants that are older were made of something else


def never() -> bool:
    return False


def quantize_variant(
    store: Store,
    model: Entry | Path,
    ftype: str,
    progress: Progress = no_progress,
    cancel: Cancel = never,
    *,
    key: str | None = None,
    imatrix: Path | None = None,
    n_threads: int = 1,
) -> Entry:
    """The model in another quantisation: from the store, else made and placed there.

    Callers that ask for the same at once, in whatever process, do the work once. With an ``imatrix`` it is always made,
    and replaces one that is there. ``progress`` gets bytes of the model's tensors. Blocks for seconds to minutes;
    raises LoadCancelled when ``cancel`` answered True, InvalidRequest (no such type, or one that needs an imatrix),
    ModelLoadError (llama.cpp's reason, or the wrong imatrix), StoreError (disk); then, and after KeyboardInterrupt,
    nothing is left behind.
    """
    ftype = check_type(ftype)
    source = source_of(store, model)
    key = check_name(key).lower() if key else variant_key(source, ftype)
    if imatrix is None and (found := find_variant(store, source, ftype, key)):
        return found
    if imatrix is None and ftype in _NEED_IMATRIX:
        raise InvalidRequest(f"{ftype} needs an importance matrix: --imatrix FILE", param="imatrix")
    header = gguf.check(source.path)
    if imatrix is not None:
        check_matches(read_imatrix(imatrix), header, imatrix)
    _check_free(store, source, key)
    previous = requantised_from(header)
    if previous:
        log.warning(
            "%s is %s already; quantising it again to %s loses more than from F16", source.label, previous, ftype
        )
    with _one_at_a_time(store, key, progress, cancel):
        if imatrix is None and (found := find_variant(store, source, ftype, key)):
            return found
        loss = f" out of {previous}, which loses more than out of F16" if previous else ""
        progress(f"{MAKING}{ftype}{loss}", 0, None)
        sweep(store, own="")  # what a process that was killed while it did this left behind
        with store.temp_folder() as folder:
            _check_space(folder, header, ftype, store)
            target = folder / "model.gguf"
            run_child(
                source.path, target, ftype, header, progress, cancel,
                imatrix=imatrix, n_threads=n_threads, label=source.label,
            )  # fmt: skip
            return add_file(
                store,
                target, key=key, variant_of=source.key, quant=ftype,
                filename=_filename(source.filename, ftype), progress=progress,
                made_of=model if isinstance(model, Entry) else None,
            )  # fmt: skip


def check_type(ftype: str) -> str:
    """The name of a type as llama.cpp spells it. Raises InvalidRequest."""
    from mullama._core import quantize_types

    known = {name.upper(): name for name in quantize_types()}
    if ftype.upper() not in known:
        raise InvalidRequest(f"'{ftype[:40]}' is not a quantisation type; there are {', '.join(known)}", param="type")
    return known[ftype.upper()]


def source_of(store: Store, model: Entry | Path) -> Source:
    """What is known of a model before it is quantised. Raises StoreError (damaged, or a file that cannot be read)."""
    if isinstance(model, Path):
        digest = digest_of(model, root=store.root)
        name = _plain_name(name_of_file(model.name))
        return Source(f"sha256:{digest}", str(model), name, model.absolute(), model.name)
    base = store.find(model.variant_of) if model.variant_of else None
    named = base or model
    # The base of a variant may be gone, or a local file; then the variant's own name is what there is.
    own_name = named.key if base or not model.variant_of else _plain_name(named.key)
    name = own_name if named.is_named else _plain_name(name_of_file(named.filename))
    path = store.checked_path(model)
    return Source(model.variant_of or model.key, model.key, name, path, model.filename, named.pulled_at)


def variant_key(source: Source, ftype: str) -> str:
    """The name of a variant: ``smollm2:135m`` in Q8_0 is ``smollm2:135m-q8_0``."""
    return f"{source.name}-{ftype.lower()}"


def find_variant(store: Store, source: Source, ftype: str, key: str | None = None) -> Entry | None:
    """A variant of that type that is in the store and was made of what the model is now."""
    for entry in store.variants(source.key):
        if entry.quant == ftype and entry.pulled_at >= source.since and (key is None or entry.key == key):
            return entry
    return None


def requantised_from(header: Header) -> str | None:
    """The type of most weights, when it is a quantised one: quantising again adds to what was lost."""
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        sizes[tensor.type] += tensor.n_elements
    common = sizes.most_common(1)
    return common[0][0] if common and common[0][0] not in _PLAIN else None


def _plain_name(name: str) -> str:
    """A name without the quantisation at its end: ``model-f16`` and ``model.q4_1`` are ``model``."""
    quant = quant_of(f"{name}.gguf")
    if quant and name.upper().endswith(quant):
        name = name[: -len(quant)].rstrip("-._:") or name
    return name


def _filename(base: str, ftype: str) -> str:
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", base, flags=re.IGNORECASE)
    quant = quant_of(f"{stem}.gguf")
    if quant and stem.upper().endswith(quant):
        stem = stem[: -len(quant)].rstrip("-._") or stem
    return f"{stem}-{ftype}.gguf"


def _check_free(store: Store, source: Source, key: str) -> None:
    """Refuse a name that belongs to something else before minutes of work."""
    from mullama.models.reference import aliases

    there = store.read(key)
    if key in aliases() or (there is not None and there.variant_of != source.key):
        raise StoreError(f"'{key}' is another model; choose a name for the variant with --name")


def _check_space(folder: Path, header: Header, ftype: str, store: Store) -> None:
    """Refuse what certainly does not fit the disk."""
    base = next((name for name in (ftype, ftype.rsplit("_", 1)[0]) if name in _BLOCKS), None)
    if base is None:
        return
    block, size = _BLOCKS[base]
    needed = sum(t.n_elements for t in header.tensors if len(t.shape) > 1) * size // block
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"cannot quantise: the result has at least {needed / 1e6:.0f} MB and the disk of {store.root} has "
            f"{free / 1e6:.0f} MB free"
        )


_BLOCKS = {name: (block, size) for name, block, size in TENSOR_TYPES.values()}


@contextlib.contextmanager
def _one_at_a_time(store: Store, key: str, progress: Progress, cancel: Cancel) -> Iterator[None]:
    """Hold the lock of a variant; it is released by the system if this process dies."""
    import filelock

    store.make_folders()
    lock = store.lock(f"quantize-{hash_key(key)}")
    while True:
        try:
            lock.acquire(timeout=_POLL_SECONDS)
            break
        except filelock.Timeout:
            progress("waiting for another process that makes the same", 0, None)
            if cancel():
                raise LoadCancelled(f"quantising to {key} was cancelled") from None
    try:
        yield
    finally:
        lock.release()


# -- the child


def run_child(
    source: Path,
    target: Path,
    ftype: str,
    header: Header,
    progress: Progress,
    cancel: Cancel,
    *,
    imatrix: Path | None = None,
    n_threads: int = 1,
    label: str = "",
    module: str = "mullama.models.child.quantize_child",
) -> None:
    """Quantise in a process of its own and wait for it. Raises as ``quantize_variant``; ``target`` may then hold
    anything."""
    arguments = [str(source), str(target), ftype, str(n_threads)]
    process = child.start(module, arguments + ([str(imatrix.absolute())] if imatrix else []))
    try:
        words = _watch(process, header, progress, cancel)
        told = _result(process.stdout)
        status = process.wait()
    finally:
        child.stop(process)
    if told and told.get("ok") and status == 0:
        return
    if shutil.disk_usage(target.parent).free < 1 << 20:
        raise DiskFull("cannot quantise: the disk is full")
    if told and "reason" in told:
        reason = " ".join(str(told["reason"]).split())
    elif status < 0:
        reason = f"llama.cpp crashed ({child.signal_name(-status)}): {words}"
    else:
        reason = words or f"the process ended with status {status}"
    reason = reason.replace(f"{source}: ", "")
    if not reason.strip("= "):  # llama.cpp underlines its longer messages
        reason = words
    raise ModelLoadError(f"{label or source} cannot be quantised to {ftype}: {reason}")


def _watch(process: subprocess.Popen[bytes], header: Header, progress: Progress, cancel: Cancel) -> str:
    """Follow llama.cpp's lines to the end of the process; returns the last of them. Raises LoadCancelled."""
    pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process.stderr, pieces), name="quantize-log", daemon=True)
    reader.start()
    sizes = {tensor.name: tensor.size or 0 for tensor in header.tensors}
    total = sum(sizes.values())
    done, seen, text = 0, 0, b""
    current = ""
    try:
        while True:
            if cancel():
                raise LoadCancelled("quantising was cancelled")
            try:
                piece = pieces.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if not piece:
                break
            text = (text + piece)[-8192:]
            for match in _TENSOR_LINE.finditer(text):
                number, name = int(match[1]), match[3].decode("utf-8", "replace")
                if number > seen:
                    done, seen, current = done + sizes.get(current, 0), number, name
                    progress("quantising", min(done, total), total)
    except BaseException:
        process.kill()
        raise
    finally:
        reader.join(timeout=5)
    return _last_line(text)


def _read(pipe: BinaryIO | None, pieces: queue.SimpleQueue[bytes]) -> None:
    """Hand on what comes; an empty piece at the end."""
    try:
        while pipe is not None and (piece := pipe.read1(4096)):  # type: ignore[attr-defined]
            pieces.put(piece)
    except (OSError, ValueError):  # closed under us
        pass
    pieces.put(b"")


def _result(pipe: object) -> dict[str, object]:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        lines = pipe.read().splitlines()  # type: ignore[attr-defined]
        found = json.loads(lines[-1]) if lines else {}
        return found if isinstance(found, dict) else {}
    return {}


def _last_line(text: bytes) -> str:
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip(" =\n")]
    return "".join(c if c.isprintable() else "\ufffd" for c in lines[-1][:300]) if lines else ""
