"""What is read of a processor, of several makers."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from mullama.cli.server.doctor import sections
from mullama.installation import instructions
from mullama.machine import processor as module
from mullama.machine.processor import Tiles, amx_tiles, parse_cpuinfo, processor
from mullama.machine.report import machine_report, provenance

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
stepping\t: 8
flags\t\t: fpu sse4_2 avx avx2 fma avx512f avx512_vnni amx_tile amx_int8 avx512_fp16 md_clear

processor\t: 1
model name\t: another
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimddp i8mm sve bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd4f
"""


def test_an_intel_processor() -> None:
    found = parse_cpuinfo(XEON, "x86_64")
    assert found.name == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert (found.vendor, found.family, found.model, found.stepping) == ("GenuineIntel", 6, 143, 8)
    assert "md_clear" in found.flags
    assert found.instruction_sets == (
        *("sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_int8"),
    )


def test_an_arm_processor() -> None:
    found = parse_cpuinfo(GRAVITON, "aarch64")
    assert (found.vendor, found.family, found.model) == ("0x41", None, None)
    assert found.instruction_sets == ("asimd", "asimddp", "i8mm", "bf16", "sve")


@pytest.mark.parametrize("text", ["", "nonsense", "flags :", "cpu family : many\n\n"])
def test_a_system_that_says_little(text: str) -> None:
    found = parse_cpuinfo(text, "riscv64")
    assert (found.family, found.flags, found.instruction_sets) == (None, frozenset(), ())


@pytest.fixture
def fresh() -> Any:
    processor.cache_clear()
    yield
    processor.cache_clear()


def test_the_processor_itself_is_believed_more_than_the_system(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Under an emulator /proc/cpuinfo is that of the machine below."""
    monkeypatch.setattr(module, "_cpuinfo", lambda: XEON)
    monkeypatch.setattr(instructions, "carried", lambda: frozenset({"sse4_2", "avx"}))
    assert processor().instruction_sets == ("sse4_2", "avx")
    assert {"fpu", "md_clear"} <= processor().flags  # what it is not asked about
    processor.cache_clear()
    monkeypatch.setattr(instructions, "carried", lambda: None)
    assert "amx_tile" in processor().flags


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({0x1021: 1 << 18, 0x1022: 1 << 18}, Tiles(True, True)),
        ({0x1021: 1 << 18, 0x1022: 0xE7}, Tiles(True, False)),
        ({}, Tiles(False, False)),  # an old kernel refuses the question
    ],
)
def test_amx_is_asked_about_and_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, answers: dict[int, int], expected: Tiles
) -> None:
    asked = []

    class Libc:
        def syscall(self, number: Any, question: Any, out: Any) -> int:
            asked.append((number.value, question.value))
            if question.value not in answers:
                return -1
            out._obj.value = answers[question.value]
            return 0

    monkeypatch.setattr(module, "processor", lambda: parse_cpuinfo(XEON, "x86_64"))
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: Libc())
    assert amx_tiles() == expected
    assert asked == [(158, 0x1021), (158, 0x1022)]  # never 0x1023, ARCH_REQ_XCOMP_PERM


def test_no_tiles_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processor", lambda: parse_cpuinfo(GRAVITON, "aarch64"))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert amx_tiles() is None


def test_what_records_note() -> None:
    found = provenance()
    assert found["cores"] >= 1
    assert found["python"].startswith("3.")
    assert {"cpu", "instruction_sets", "quota", "memory_mib", "system"} < found.keys()


def test_doctor_s_table_of_ways_and_limits() -> None:
    report = machine_report(0, {})
    report["threads"] = {"online": 64, "affinity": [0, 1, 2, 3, 8], "quota": 2.5, "asked": 0, "used": 2}
    report["ways"] = [
        {
            "type": "Q4_1",
            "chosen": {"1": "plain", "8": "tiles"},
            "ways": [
                {"way": "plain", "verdict": "right", "exact": True, "times_us": {"1": 12.5}},
                {"way": "amx", "verdict": "ended by SIGILL", "exact": False, "times_us": {}},
            ],
        }
    ]
    told = dict(sections(report))
    assert told["threads"] == ["2 to compute with; 5 of 64 cores may be used (0-3,8), a quota of 2.5 cores"]
    assert told["ways"] == [
        "Q4_1: plain, from 8 columns on tiles",
        "  plain: right, exact; 12.5 µs x 1",
        "  amx: ended by SIGILL",
    ]
