"""The compiled part of this installation: whether its libraries are there, whole, and load.

    check()    # raises MachineUnfit, a line for each library that is at fault

A library that is cut off can end the process that loads it, so files are looked at first.
"""

from __future__ import annotations

import importlib
import struct
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from mullama.errors import MachineUnfit
from mullama.installation import instructions

BUILD_AGAIN = "install mullama again (docs/building.md, Troubleshooting)"


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library or an extension module. ``fault``: what is wrong with the file, None: nothing is."""

    name: str
    path: Path
    size: int | None  # bytes; None: there is no such file
    fault: str | None


def libraries() -> list[Library]:
    """Every library and module that the build made; empty where it left no record."""
    record, folder = instructions.build_record(), instructions.library_folder()
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    files = [folder / name for name in _texts(record.get("libraries"))]
    modules = [folder.parent / "_core" / f"{path}{suffix}" for path in _texts(record.get("modules"))]
    return [_look(path) for path in files + modules]


def _texts(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _look(path: Path) -> Library:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return Library(path.name, path, None, "is missing" if missing else f"cannot be read: {error.strerror}")
    return Library(path.name, path, size, _damage(head, size))


def _damage(head: bytes, size: int) -> str | None:
    """What the first bytes of a file tell against it. Only ELF's are understood: of others, being empty."""
    if size == 0:
        return "is empty"
    if not sys.platform.startswith("linux"):
        return None
    if head[:4] != b"\x7fELF" or len(head) < 64:
        return "is damaged: it is not a library"
    if head[4:6] == b"\x02\x01":  # 64 bits, little endian
        # The table of sections is the last thing in a file: where it begins, bytes of an entry, entries.
        (begin,) = struct.unpack_from("<Q", head, 0x28)
        entry, number = struct.unpack_from("<HH", head, 0x3A)
        if begin + entry * number > size:
            return f"is damaged: it is cut off after {size} bytes"
    return None


def faults() -> list[str]:
    """A line for each file that is missing or damaged. Nothing is loaded."""
    record = instructions.build_record()
    if not record:
        where = instructions.library_folder() / "build.json"
        return [f"the record of the build {where} is missing or damaged; {BUILD_AGAIN}"]
    found = [f"the library {one.path} {one.fault}; {BUILD_AGAIN}" for one in libraries() if one.fault is not None]
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if found and record.get("python") != here:
        return [f"mullama was built for Python {record.get('python')}, this is Python {here}; {BUILD_AGAIN}"]
    return found


def check() -> None:
    """Load the compiled modules. Raises MachineUnfit where a file is at fault, or one does not load."""
    found = faults()
    if found:
        raise MachineUnfit(found)
    for name in _texts(instructions.build_record().get("modules")):
        try:
            importlib.import_module(f"mullama._core.{name.replace('/', '.')}")
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise MachineUnfit([f"the library {name} does not load: {reason}; {BUILD_AGAIN}"]) from error
