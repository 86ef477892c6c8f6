"""Whether this processor carries the instructions that the build uses, asked before any of its code runs.

    check()    # raises MachineUnfit, which names what is missing

A build records which instructions its compiler was allowed (``mullama/lib/build.json``); a small library that needs
none of them asks the processor. What a processor carries but its system does not save for each thread is missing too.
"""

from __future__ import annotations

import ctypes
import functools
import json
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mullama.errors import MachineUnfit

_AVX, _AVX512, _AMX, _APX = 0x6, 0xE6, 0x60000, 0x80000  # bits of XCR0

EAX, EBX, ECX, EDX = range(4)
EXTENDED = 0x80000001


class Instructions(NamedTuple):
    """A set of instructions. ``macro``: the compiler's word for it, ``flag``: Linux's.

    The others are where CPUID tells of it, and the registers that the system must save (bits of XCR0).
    """

    macro: str
    name: str
    flag: str
    leaf: int
    subleaf: int
    register: int
    bit: int
    state: int = 0


#: What compilers use on their own, or ggml by name. Not what only systems and cryptography use: a virtual machine often
#: hides some of that, and nothing here would miss it.
SETS = tuple(
    Instructions(*row)
    for row in (
        ("__SSE3__", "SSE3", "pni", 1, 0, ECX, 0),
        ("__SSSE3__", "SSSE3", "ssse3", 1, 0, ECX, 9),
        ("__SSE4_1__", "SSE4.1", "sse4_1", 1, 0, ECX, 19),
        ("__SSE4_2__", "SSE4.2", "sse4_2", 1, 0, ECX, 20),
        ("__POPCNT__", "POPCNT", "popcnt", 1, 0, ECX, 23),
        ("__MOVBE__", "MOVBE", "movbe", 1, 0, ECX, 22),
        ("__AVX__", "AVX", "avx", 1, 0, ECX, 28, _AVX),
        ("__F16C__", "F16C", "f16c", 1, 0, ECX, 29, _AVX),
        ("__FMA__", "FMA", "fma", 1, 0, ECX, 12, _AVX),
        ("__LZCNT__", "LZCNT", "abm", EXTENDED, 0, ECX, 5),
        ("__XOP__", "XOP", "xop", EXTENDED, 0, ECX, 11, _AVX),
        ("__FMA4__", "FMA4", "fma4", EXTENDED, 0, ECX, 16, _AVX),
        ("__TBM__", "TBM", "tbm", EXTENDED, 0, ECX, 21),
        ("__BMI__", "BMI1", "bmi1", 7, 0, EBX, 3),
        ("__AVX2__", "AVX2", "avx2", 7, 0, EBX, 5, _AVX),
        ("__BMI2__", "BMI2", "bmi2", 7, 0, EBX, 8),
        ("__ADX__", "ADX", "adx", 7, 0, EBX, 19),
        ("__AVX512F__", "AVX512F", "avx512f", 7, 0, EBX, 16, _AVX512),
        ("__AVX512DQ__", "AVX512DQ", "avx512dq", 7, 0, EBX, 17, _AVX512),
        ("__AVX512IFMA__", "AVX512IFMA", "avx512ifma", 7, 0, EBX, 21, _AVX512),
        ("__AVX512PF__", "AVX512PF", "avx512pf", 7, 0, EBX, 26, _AVX512),
        ("__AVX512ER__", "AVX512ER", "avx512er", 7, 0, EBX, 27, _AVX512),
        ("__AVX512CD__", "AVX512CD", "avx512cd", 7, 0, EBX, 28, _AVX512),
        ("__AVX512BW__", "AVX512BW", "avx512bw", 7, 0, EBX, 30, _AVX512),
        ("__AVX512VL__", "AVX512VL", "avx512vl", 7, 0, EBX, 31, _AVX512),
        ("__AVX512VBMI__", "AVX512VBMI", "avx512vbmi", 7, 0, ECX, 1, _AVX512),
        ("__AVX512VBMI2__", "AVX512VBMI2", "avx512_vbmi2", 7, 0, ECX, 6, _AVX512),
        ("__GFNI__", "GFNI", "gfni", 7, 0, ECX, 8),
        ("__AVX512VNNI__", "AVX512VNNI", "avx512_vnni", 7, 0, ECX, 11, _AVX512),
        ("__AVX512BITALG__", "AVX512BITALG", "avx512_bitalg", 7, 0, ECX, 12, _AVX512),
        ("__AVX512VPOPCNTDQ__", "AVX512VPOPCNTDQ", "avx512_vpopcntdq", 7, 0, ECX, 14, _AVX512),
        ("__AVX512FP16__", "AVX512FP16", "avx512_fp16", 7, 0, EDX, 23, _AVX512),
        ("__AMX_BF16__", "AMX-BF16", "amx_bf16", 7, 0, EDX, 22, _AMX),
        ("__AMX_TILE__", "AMX-TILE", "amx_tile", 7, 0, EDX, 24, _AMX),
        ("__AMX_INT8__", "AMX-INT8", "amx_int8", 7, 0, EDX, 25, _AMX),
        ("__AVXVNNI__", "AVX-VNNI", "avx_vnni", 7, 1, EAX, 4, _AVX),
        ("__AVX512BF16__", "AVX512BF16", "avx512_bf16", 7, 1, EAX, 5, _AVX512),
        ("__AMX_FP16__", "AMX-FP16", "amx_fp16", 7, 1, EAX, 21, _AMX),
        ("__AVXIFMA__", "AVX-IFMA", "avx_ifma", 7, 1, EAX, 23, _AVX),
        ("__AVXVNNIINT8__", "AVX-VNNI-INT8", "avx_vnni_int8", 7, 1, EDX, 4, _AVX),
        ("__AVXNECONVERT__", "AVX-NE-CONVERT", "avx_ne_convert", 7, 1, EDX, 5, _AVX),
        ("__AVXVNNIINT16__", "AVX-VNNI-INT16", "avx_vnni_int16", 7, 1, EDX, 10, _AVX),
        ("__AVX10_1__", "AVX10.1", "avx10", 7, 1, EDX, 19, _AVX512),
        ("__APX_F__", "APX", "apx", 7, 1, EDX, 21, _APX),
    )
)

#: ``ask(leaf, subleaf)``: eax, ebx, ecx, edx, or None where there is no such leaf.
Ask = Callable[[int, int], tuple[int, int, int, int] | None]

CPUID_LIBRARY = {"Darwin": "libmullama-cpuid.dylib", "Windows": "mullama-cpuid.dll"}.get(
    platform.system(), "libmullama-cpuid.so"
)


def library_folder() -> Path:
    """Where the shared libraries of this installation lie, or should: ``mullama/lib``."""
    found = [Path(folder) / "lib" for folder in sys.modules["mullama"].__path__]  # an editable install has two folders
    return next((folder for folder in found if folder.is_dir()), found[-1])


@functools.cache
def build_record() -> dict[str, Any]:
    """What the build wrote down of itself (``lib/build.json``); empty where there is nothing readable."""
    try:
        found = json.loads((library_folder() / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def carried() -> frozenset[str] | None:
    """Linux's names of the sets that the processor and its system carry; None where there is nobody to ask."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "i386"):
        return None
    try:
        library = ctypes.CDLL(str(library_folder() / CPUID_LIBRARY))
        library.mullama_saved_state.restype = ctypes.c_uint64
    except (OSError, AttributeError):
        return None
    out = (ctypes.c_uint32 * 4)()

    def ask(leaf: int, subleaf: int) -> tuple[int, int, int, int] | None:
        if not library.mullama_cpuid(ctypes.c_uint32(leaf), ctypes.c_uint32(subleaf), out):
            return None
        return out[0], out[1], out[2], out[3]

    return carried_by(ask, library.mullama_saved_state())


def carried_by(ask: Ask, state: int) -> frozenset[str]:
    """The same of a processor that answers ``ask``, under a system that saves ``state``."""
    subleaves = (ask(7, 0) or (0,))[0]  # eax: the last one
    found = set()
    for one in SETS:
        words = ask(one.leaf, one.subleaf) if one.leaf != 7 or one.subleaf <= subleaves else None
        if words is not None and words[one.register] >> one.bit & 1 and state & one.state == one.state:
            found.add(one.flag)
    return frozenset(found)


def missing(used: Iterable[str], carries: frozenset[str]) -> list[str]:
    """Names of the sets of which the build used the macro, and that are not carried.

    Not those of AMX: ggml asks the system for them when it runs, and goes without.
    """
    macros = set(used)
    return [one.name for one in SETS if one.macro in macros and one.flag not in carries and one.state != _AMX]


@functools.cache
def check() -> None:
    """Raise MachineUnfit where this build uses what the processor or its system does not carry."""
    used = build_record().get("instructions")
    carries = carried()
    if not isinstance(used, list) or carries is None:
        return
    names = missing(used, carries)
    if names:
        raise MachineUnfit([unfit(names)])


def unfit(names: list[str]) -> str:
    """One line for instructions that are missing."""
    return (
        f"this build of mullama uses instructions that the processor or its system does not carry: {', '.join(names)}; "
        "build it on this machine, or without them (docs/building.md, Portable wheels)"
    )
