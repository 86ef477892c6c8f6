"""Opening a new model file in a throw-away process first, and remembering what came of it.

    check_model(path)    # the one call before a file is loaded: returns, or raises ModelLoadError with the reason

What llama.cpp does to its process with a malicious or damaged file (an assertion, a crash, a loop without end, all
the memory) it does to the child. The verdict is kept in ``$MULLAMA_HOME/verdicts``; a second look at an unchanged file
costs a stat and a read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mullama import child
from mullama.errors import ModelLoadError, StoreError
from mullama.home import default_root
from mullama.installation import VERSION
from mullama.machine import kernels
from mullama.models.files import gguf
from mullama.models.files.matrices import matrices
from mullama.models.files.shape import check_sense

log = logging.getLogger(__name__)

FORMAT = 1  # of the verdicts; another one is looked at again
TEMPLATE_SECONDS = 2.0  # of processor time; a real one takes milliseconds

_MIB = 1 << 20
#: Exit statuses of a child that used up its processor time, and of one that somebody killed; Windows has no signals.
_OUT_OF_TIME = {-getattr(signal, name) for name in ("SIGPROF", "SIGXCPU") if hasattr(signal, name)}
_KILLED = -getattr(signal, "SIGKILL", 1 << 30)
_LAST_WORDS = 300  # characters of what the child wrote to stderr


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What came of a file. ``ok`` False: it must not be loaded, and ``reason`` says why in one line."""

    ok: bool
    reason: str = ""
    stage: str = ""  # the last one that was entered
    finite: bool | None = None  # whether the first token's logits are; None: it did not come to that
    template: str = ""  # "ok", "none", or what the template said when it refused three plain messages
    wall_ms: int = 0  # of the child, from start to end
    lasting: bool = True  # False: the machine's state may have caused it, so it is not remembered


def check_model(
    path: str | Path,
    *,
    digest: str | None = None,
    known_good: bool = False,
    root: Path | None = None,
    timeout_s: float | None = None,
) -> ProbeResult:
    """Make sure that a file may be loaded into this process.

    Always: header and tensor bounds, and the sha256 where ``digest`` gives the one it must have (hashed once while the
    file does not change). Then the child, unless its verdict is remembered or the file is ``known_good``: its digest is
    one that came with mullama, whose makers loaded that file. ``root`` is the store's folder.

    Raises ModelLoadError, which names the file and the reason. What loads but computes garbage passes, with ``finite``
    False.
    """
    path = Path(path)
    check_sense(gguf.check(path), str(path))
    if digest is not None:
        _check_digest(path, digest, root)
        if known_good:
            return ProbeResult(ok=True)
    found = Verdicts(root).of(path, digest, lambda: probe(path, timeout_s=timeout_s), said=str(path))
    if not found.ok:
        raise ModelLoadError(_named(path, found.reason))
    return found


def _check_digest(path: Path, digest: str, root: Path | None) -> None:
    from mullama.models.store.digests import digest_of

    try:
        actual = digest_of(path, root=root)
    except StoreError as error:
        raise ModelLoadError(f"{path}: {error.message}") from None
    if actual != digest:
        raise ModelLoadError(
            f"{path}: the file is damaged or was replaced: its sha256 is {actual}, it was verified as {digest}"
        )


# -- the child


def probe(
    path: str | Path,
    *,
    timeout_s: float | None = None,
    memory_limit: int | None = None,
    adapter: Path | None = None,
) -> ProbeResult:
    """Open a file in a child: load it, decode a token on one thread, render its template. Never raises for the file.

    ``adapter``: a LoRA adapter that the token is decoded with; then the template is left alone.
    ``timeout_s`` (default by the file's size: 60 s, and one more for each 20 MiB) bounds the child's life,
    ``memory_limit`` its address space in bytes (default 2 GiB and three times the file).
    """
    size = _size(path) + (_size(adapter) if adapter is not None else 0)
    timeout_s = timeout_s if timeout_s is not None else 60 + size / (20 * _MIB)
    memory = memory_limit if memory_limit is not None else (2 << 30) + 3 * size
    cpu_s = max(1, round(30 + size / (50 * _MIB)))
    started = time.monotonic()
    process = child.start(
        "mullama.models.child.probe_child",
        [
            *(str(Path(path).absolute()), str(memory), str(cpu_s), str(TEMPLATE_SECONDS)),
            *([] if adapter is None else [str(adapter.absolute())]),
        ],
        _kernels(path),
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
        is_late = False
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        is_late = True
    except BaseException:
        child.stop(process)
        raise
    stage, last = _told(out)
    return _verdict(
        stage, last, process.returncode, err, round((time.monotonic() - started) * 1000), timeout_s if is_late else 0
    )


def _kernels(path: str | Path) -> dict[str, str]:
    """What the child is to compute with: a kernel that crashes on this machine says nothing of the file."""
    try:
        return kernels.for_child(matrices(gguf.check(path)))
    except ModelLoadError:  # what is wrong with the file is found in the child
        return {}


def _told(out: bytes) -> tuple[str, dict[str, Any]]:
    """The last stage that the child entered, and its result; empty where it died before."""
    stage = "starting"
    result: dict[str, Any] = {}
    for line in out.splitlines():
        with contextlib.suppress(ValueError):
            fields = json.loads(line)
            if isinstance(fields, dict):
                stage = str(fields.get("stage", stage))
                result = fields if "ok" in fields else result
    return stage, result


def _verdict(
    stage: str, told: dict[str, Any], status: int, err: bytes, wall_ms: int, late_after_s: float
) -> ProbeResult:
    def refused(reason: str, *, lasting: bool = True) -> ProbeResult:
        return ProbeResult(False, reason, stage, wall_ms=wall_ms, lasting=lasting)

    if told and status == 0:
        if told["ok"]:
            return ProbeResult(True, "", stage, told["finite"], told["template"], wall_ms)
        if told.get("memory"):
            return refused(f"{stage} needs more memory than a file of this size may take")
        return refused(" ".join(str(told["reason"]).split()), lasting=told.get("lasting", True))
    words = _last_words(err)
    if late_after_s:
        return refused(f"{stage} hung: a test process was stopped after {late_after_s:.0f} seconds{words}")
    if status in _OUT_OF_TIME:
        return refused(f"{stage} hung: a test process was stopped for using too much processor time{words}")
    if status == _KILLED:  # by the system, when memory is short, or by somebody
        return refused(f"{stage} in a test process was killed; the machine may be short of memory", lasting=False)
    if status < 0:
        return refused(f"{stage} crashed a test process ({child.signal_name(-status)}){words}")
    if b"MemoryError" in err or b"bad_alloc" in err:
        return refused(f"{stage} needs more memory than a file of this size may take")
    return refused(f"{stage} ended a test process with status {status}{words}", lasting=False)


def _last_words(err: bytes) -> str:
    """The end of what the child wrote to stderr, for one line of a message."""
    text = " ".join(err.decode("utf-8", "replace").split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return f": {text[-_LAST_WORDS:]}" if text else ""


def _named(path: Path, reason: str) -> str:
    """The reason with the file's name in front, once."""
    return reason if reason.startswith(f"{path}") else f"{path}: {reason}"


def _size(path: str | Path) -> int:
    try:
        return sum(part.stat().st_size for part in gguf.part_paths(path))
    except OSError:
        return 0


# -- what is remembered


class Verdicts:
    """Verdicts on disk; several processes may read and write them at once.

    A file whose digest is known has its verdict under that digest. Any other has it under its path, with device,
    inode, size and time of change inside; both hold for the versions of mullama and llama.cpp that gave them.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.folder = (root if root is not None else default_root()) / "verdicts"

    def of(self, path: Path, digest: str | None, look: Callable[[], ProbeResult], *, said: str) -> ProbeResult:
        """What is remembered of the file, or else what ``look`` finds. ``said``: what the log calls it."""
        found = self.find(path, digest)
        if found is None:
            found = look()
            if found.lasting:
                self.note(path, digest, found)
            log.info("%s: probed in %d ms: %s", said, found.wall_ms, found.reason or "ok")
        return found

    def find(self, path: Path, digest: str | None) -> ProbeResult | None:
        try:
            record = json.loads(self._record(path, digest).read_bytes())
            if record["file"] != _identity(path, digest) or record["versions"] != _versions():
                return None
            return ProbeResult(**record["verdict"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def note(self, path: Path, digest: str | None, result: ProbeResult) -> None:
        """Remember. A store that cannot be written to costs the next start a child, and no more."""
        with contextlib.suppress(OSError):
            record = self._record(path, digest)
            fields = {"file": _identity(path, digest), "versions": _versions(), "verdict": asdict(result)}
            self.folder.mkdir(parents=True, exist_ok=True)
            part = record.with_suffix(f".{secrets.token_hex(4)}")
            try:
                part.write_text(json.dumps({"path": str(path), **fields}, indent=1), encoding="utf-8")
                part.replace(record)
            finally:
                part.unlink(missing_ok=True)

    def forget(self, path: Path, digest: str | None = None) -> None:
        """Have the file opened in a child again at the next look."""
        with contextlib.suppress(OSError):
            self._record(path, digest).unlink(missing_ok=True)

    def _record(self, path: Path, digest: str | None) -> Path:
        if digest:
            return self.folder / f"sha256-{digest}.json"
        hashed = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
        return self.folder / f"path-{hashed[:32]}.json"


def _identity(path: Path, digest: str | None) -> list[list[int]] | str:
    """What must be the same for a verdict to hold: the digest, or of each file what changes when it is written."""
    if digest:
        return digest
    infos = [part.stat() for part in gguf.part_paths(path)]
    return [[info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns] for info in infos]


def _versions() -> list[str | int]:
    from mullama._core import llama_cpp_version

    return [FORMAT, VERSION, llama_cpp_version()]
