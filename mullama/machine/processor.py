"""The processor: its name, what instructions it and its system carry, whether AMX tiles may be used."""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass, replace
from pathlib import Path

from mullama.installation import instructions

CPUINFO = Path("/proc/cpuinfo")

_SYS_ARCH_PRCTL = 158  # x86-64
_GET_SUPPORTED, _GET_PERMITTED = 0x1021, 0x1022  # ARCH_GET_XCOMP_SUPP, ARCH_GET_XCOMP_PERM: they change nothing
_TILE_DATA = 1 << 18

#: Instruction sets that products of matrices can use, by Linux's names, the oldest first.
TOLD = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512vbmi"),
    *("avx512_bf16", "avx512_fp16", "avx_vnni", "avx_vnni_int8", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


@dataclass(frozen=True, slots=True)
class Processor:
    """Unknown values are None. ``flags``: everything it carries, by Linux's names."""

    name: str | None
    architecture: str
    vendor: str | None
    family: int | None
    model: int | None
    stepping: int | None
    flags: frozenset[str]

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """Those of ``flags`` that computing can use."""
        return tuple(name for name in TOLD if name in self.flags)


@functools.cache
def processor() -> Processor:
    """The one that this process runs on. Under an emulator the flags are those of the one that is emulated."""
    found = parse_cpuinfo(_cpuinfo(), platform.machine().lower())
    carried = instructions.carried()
    if carried is None:
        return found
    asked = {one.flag for one in instructions.SETS}
    return replace(found, flags=(found.flags - asked) | carried)


def parse_cpuinfo(text: str, architecture: str) -> Processor:
    """The first processor of ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in text.strip().partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()

    def number(name: str) -> int | None:
        text = fields.get(name, "")
        return int(text) if text.isdecimal() else None

    return Processor(
        name=fields.get("model name") or platform.processor() or None,
        architecture=architecture,
        vendor=fields.get("vendor_id") or fields.get("CPU implementer"),
        family=number("cpu family"),
        model=number("model"),
        stepping=number("stepping"),
        flags=frozenset((fields.get("flags") or fields.get("Features") or "").split()),
    )


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


@dataclass(frozen=True, slots=True)
class Tiles:
    """AMX. ``supported``: the system can save a thread's tiles; ``permitted``: this process has asked for them."""

    supported: bool
    permitted: bool


def amx_tiles() -> Tiles | None:
    """Whether AMX tiles may be used; None on a processor without them. Asks, and changes nothing."""
    if "amx_tile" not in processor().flags:
        return None
    return Tiles(_has_tiles(_GET_SUPPORTED), _has_tiles(_GET_PERMITTED))


def _has_tiles(question: int) -> bool:
    found = ctypes.c_uint64(0)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        refused = libc.syscall(ctypes.c_long(_SYS_ARCH_PRCTL), ctypes.c_long(question), ctypes.byref(found))
    except (OSError, AttributeError):
        return False
    return refused == 0 and bool(found.value & _TILE_DATA)
