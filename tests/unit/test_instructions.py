"""What a build uses and what a processor carries: on processors that are not at hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mullama.errors import MachineUnfit
from mullama.installation import instructions
from mullama.installation.instructions import SETS, Ask, carried_by, missing

EVERYTHING = 0xFFFFFFFF
AVX, AVX512, AMX = 0x7, 0xE7, 0x600E7  # what a system saves: SSE's registers, and those
EVERY_FLAG = frozenset(one.flag for one in SETS)


def processor(leaves: dict[tuple[int, int], tuple[int, int, int, int]]) -> Ask:
    return lambda leaf, subleaf: leaves.get((leaf, subleaf))


def full(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    return EVERYTHING, EVERYTHING, EVERYTHING, EVERYTHING


def test_a_processor_with_everything() -> None:
    assert carried_by(full, EVERYTHING) == EVERY_FLAG
    assert missing([one.macro for one in SETS], EVERY_FLAG) == []


def test_what_the_system_does_not_save_is_not_carried() -> None:
    assert not {flag for flag in carried_by(full, 0) if flag.startswith(("avx", "amx", "fma", "f16c"))}
    assert {"sse4_2", "bmi2", "popcnt"} <= carried_by(full, 0)
    assert {"avx2", "fma", "avx_vnni"} <= carried_by(full, AVX)
    assert "avx512f" not in carried_by(full, AVX)
    assert {"avx512f", "avx512_bf16", "avx512_fp16"} <= carried_by(full, AVX512)
    assert "amx_int8" not in carried_by(full, AVX512)
    assert {"amx_tile", "amx_int8"} <= carried_by(full, AMX)


def test_where_the_bits_are() -> None:
    """Against a real one, a Nehalem, and AVX2 by hand."""
    nehalem = processor({(1, 0): (0x106A5, 0, 0x0098E3FD, 0xBFEBFBFF), (0x80000001, 0): (0, 0, 1, 0x28100800)})
    assert carried_by(nehalem, 0x3) == {"pni", "ssse3", "sse4_1", "sse4_2", "popcnt"}
    avx2 = processor({(7, 0): (0, 1 << 5, 0, 0)})
    assert carried_by(avx2, AVX) == {"avx2"}


def test_leaves_that_a_processor_does_not_have() -> None:
    """Some answer with another leaf's words where they should say nothing."""
    asked = []

    def ask(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        asked.append((leaf, subleaf))
        return 0, EVERYTHING, EVERYTHING, EVERYTHING  # eax of leaf 7: the last subleaf is 0

    assert "avx512_bf16" not in carried_by(ask, EVERYTHING)
    assert (7, 1) not in asked
    assert carried_by(processor({}), EVERYTHING) == frozenset()


def test_what_is_missing_is_named() -> None:
    carries = frozenset({"pni", "ssse3", "sse4_1", "sse4_2"})
    assert missing(["__AVX2__", "__SSE4_2__", "__SSE_MATH__", "__NO_SUCH_THING__"], carries) == ["AVX2"]
    assert missing(["__AVX__", "__AVX2__", "__FMA__"], carries) == ["AVX", "FMA", "AVX2"]


def test_ggml_goes_without_amx() -> None:
    assert missing(["__AMX_TILE__", "__AMX_INT8__", "__AVX2__"], frozenset({"avx2"})) == []


def test_names_are_told_apart() -> None:
    for column in ("macro", "name", "flag"):
        assert len({getattr(one, column) for one in SETS}) == len(SETS)
    assert len({(one.leaf, one.subleaf, one.register, one.bit) for one in SETS}) == len(SETS)


@pytest.fixture
def fresh() -> Iterator[None]:
    instructions.check.cache_clear()
    yield
    instructions.check.cache_clear()


def test_the_check_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(instructions, "build_record", lambda: {"instructions": ["__SSE3__", "__AVX512F__", "__AVX2__"]})
    monkeypatch.setattr(instructions, "carried", lambda: frozenset({"pni"}))
    with pytest.raises(MachineUnfit) as unfit:
        instructions.check()
    (line,) = unfit.value.faults
    assert "does not carry: AVX2, AVX512F; build it on this machine" in line
    assert "\n" not in line


@pytest.mark.parametrize("record", [{}, {"instructions": "all"}])
def test_without_a_record_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, fresh: None, record: dict[str, object]
) -> None:
    monkeypatch.setattr(instructions, "build_record", lambda: record)
    monkeypatch.setattr(instructions, "carried", frozenset)
    instructions.check()
