"""From what trials found to the way that is taken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import Q4_K, Q8_0, SHAPE, right, wrong

from mullama.machine.trials import CLASSES, LAYOUTS, TIMED, WAYS, Found
from mullama.machine.way_choice import LAYOUT_GAIN, STEADY_GAIN, Choice, choose

IN_FILE = tuple(way for way in WAYS if way not in LAYOUTS)

times = st.dictionaries(st.sampled_from(TIMED), st.floats(1e-6, 1.0), max_size=len(TIMED))


@st.composite
def founds(draw: st.DrawFn) -> list[Found]:
    """Anything that trials may find of a type."""
    made = []
    for way in draw(st.lists(st.sampled_from(WAYS), min_size=1, unique=True)):
        by = draw(times)
        made.append(
            Found(
                Q8_0,
                way,
                draw(st.booleans()),
                draw(st.sampled_from(("", "", "crashed (SIGILL)"))),
                is_exact=draw(st.booleans()),
                is_steady=draw(st.booleans()),
                times={SHAPE: by} if by else {},
            )
        )
    return made


def usable(found: list[Found]) -> dict[str, Found]:
    return {each.way: each for each in found if each.may_be_used}


@given(founds(), st.sampled_from(("", SHAPE, "64x64")), st.sampled_from(("auto", *WAYS)))
def test_what_is_wrong_is_never_taken(found: list[Found], shape: str, named: str) -> None:
    chosen, good = choose(found, shape, named), usable(found)
    assert len(chosen.by_columns) == len(CLASSES) and set(chosen.by_columns) <= set(IN_FILE)
    if named == "auto":
        # Something must compute what fits no other way: the plain one, if no better is left.
        assert set(chosen.by_columns) <= set(good) | ({"plain"} if not set(good) & set(IN_FILE) else set())
    else:
        assert set(chosen.by_columns) <= set(good) | {"plain"}
    assert set(chosen.layouts) <= set(good) & set(LAYOUTS)
    assert chosen.layout == "" or chosen.layout in chosen.layouts


@given(founds(), st.sampled_from(WAYS))
def test_a_named_way_computes_all_or_the_plain_one_does(found: list[Found], named: str) -> None:
    chosen = choose(found, SHAPE, named)
    if named not in usable(found):
        assert chosen == Choice(Q8_0, "", ("plain",) * len(CLASSES))
    elif named in LAYOUTS:
        assert chosen == Choice(Q8_0, named, ("plain",) * len(CLASSES), (named,))
    else:
        assert chosen == Choice(Q8_0, "", (named,) * len(CLASSES))


@given(founds())
def test_among_weights_as_in_the_file_the_fastest_is_taken(found: list[Found]) -> None:
    timed = {way: each.times[SHAPE] for way, each in usable(found).items() if SHAPE in each.times}
    chosen = choose(found, SHAPE)
    for log2, m in enumerate(CLASSES):
        of_m = {way: by[m] for way, by in timed.items() if way in IN_FILE and m in by}
        if of_m:
            assert of_m[chosen.by_columns[log2]] <= min(of_m.values()) * STEADY_GAIN


@given(founds(), st.integers(-8, 8))
def test_the_unit_of_time_does_not_matter(found: list[Found], log2: int) -> None:
    # Powers of two lose no bits.
    slower = [
        Found.from_json({**each.to_json(), "times": {s: {m: t * 2.0**log2 for m, t in by.items()}}})
        for each in found
        for s, by in (each.times or {SHAPE: {}}).items()
    ]
    one, other = choose(found, SHAPE), choose(slower, SHAPE)
    assert (one.by_columns, one.layout) == (other.by_columns, other.layout)


@given(founds())
def test_a_choice_survives_json(found: list[Found]) -> None:
    chosen = choose(found, SHAPE)
    assert Choice.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen


@given(times.filter(bool), st.floats(0.5, 2.0))
def test_a_layout_must_be_worth_its_memory(by: dict[int, float], factor: float) -> None:
    """As fast as the file's layout with any number of columns, a copy of the weights is not made."""
    layout = {m: factor * seconds for m, seconds in by.items()}
    chosen = choose([right("plain", by), right("repack", layout)], SHAPE)
    if factor > 1.001 / LAYOUT_GAIN:
        assert chosen.layout == ""
    if factor < 0.999 / LAYOUT_GAIN:
        assert chosen.layout == "repack" and chosen.layouts == ("repack",)


def test_layouts_are_compared_over_what_both_were_timed_with() -> None:
    """One product with a column is quicker than one with 128: that alone does not make a layout faster."""
    full = {m: 1e-4 * m for m in TIMED}
    assert choose([right("plain", full), right("repack", {1: 1e-4, 2: 2e-4})], SHAPE).layout == ""
    assert choose([right("plain", full), right("repack", {128: 1e-3})], SHAPE).layout == "repack"


def test_the_weights_of_the_numbers_of_columns_decide() -> None:
    """Decoding alone and prompts count most: what is faster only at two columns is not the layout of all."""
    plain = dict.fromkeys(TIMED, 1e-3)
    assert choose([right("plain", plain), right("repack", plain | {2: 0.5e-3, 1: 1.5e-3})], SHAPE).layout == ""
    assert choose([right("plain", plain), right("repack", plain | {128: 0.5e-3, 2: 1.5e-3})], SHAPE).layout == "repack"


def test_two_layouts() -> None:
    found = [right("plain", 4e-3), right("repack", 2e-3), right("amx", 1e-3)]
    assert choose(found, SHAPE).layout == "amx"
    assert choose([*found[:2], wrong("amx")], SHAPE).layout == "repack"
    assert choose([found[0], wrong("repack"), wrong("amx")], SHAPE).layout == ""


def test_each_number_of_columns_has_its_own_way() -> None:
    plain = {m: 1e-3 * m for m in TIMED}
    tiled = dict.fromkeys(TIMED, 0.006)
    chosen = choose([right("plain", plain), right("tiled", tiled)], SHAPE)
    assert [chosen.way_for(m) for m in (1, 2, 3, 4, 7)] == ["plain"] * 5
    assert [chosen.way_for(m) for m in (8, 9, 16, 64, 127, 128, 512, 1 << 15, 1 << 20)] == ["tiled"] * 9


@pytest.mark.parametrize(("gain", "taken"), [(1.01, "tiles"), (1.05, "tiled")])
def test_what_depends_on_its_company_must_be_faster(gain: float, taken: str) -> None:
    found = [right("tiles", 1e-3), right("tiled", 1e-3 / gain, is_steady=False)]
    assert set(choose(found, SHAPE).by_columns) == {taken}


def test_steady_ways_are_compared_by_speed_alone() -> None:
    assert set(choose([right("tiles", 1e-3), right("tiled", 0.999e-3)], SHAPE).by_columns) == {"tiled"}


@pytest.mark.parametrize(
    ("ways", "few", "at_8", "many", "layouts"),
    [
        (("plain",), "plain", "plain", "plain", ()),
        (("sgemm", "plain"), "sgemm", "sgemm", "sgemm", ()),
        (("tiles", "sgemm", "plain"), "tiles", "tiles", "tiles", ()),
        (("tiled", "plain"), "plain", "tiled", "tiled", ()),
        (("tiled", "tiles", "plain"), "tiles", "tiles", "tiled", ()),
        (("repack", "tiled", "plain"), "plain", "tiled", "tiled", ("repack",)),
        (("amx", "repack", "plain"), "plain", "plain", "plain", ("amx", "repack")),
        (("tiled",), "tiled", "tiled", "tiled", ()),
    ],
)
def test_without_times_it_goes_as_llama_cpp_goes(
    ways: tuple[str, ...], few: str, at_8: str, many: str, layouts: tuple[str, ...]
) -> None:
    found = [right(way, kind=Q4_K) if way in ways else Found(Q4_K, way, is_there=False) for way in WAYS]
    for shape in ("", SHAPE):
        chosen = choose(found, shape)
        assert (chosen.by_columns[0], chosen.by_columns[3], chosen.by_columns[7]) == (few, at_8, many)
        assert chosen.layouts == layouts and chosen.layout == (layouts[0] if layouts else "")


def test_times_of_another_shape_do_not_decide() -> None:
    assert choose([right("plain", 1e-3), right("sgemm", 2e-3)], "64x64") == choose([right("plain"), right("sgemm")])


@pytest.mark.parametrize(
    "fields",
    [{}, {"type": 8}, {"type": 8, "layout": "", "by_columns": None, "layouts": ()}, {"type": 8, "layout": ""}],
)
def test_what_is_no_choice_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError)):
        Choice.from_json(fields)


def test_classes_of_columns() -> None:
    """Each stands for numbers that were timed: the largest that is no more than its own smallest one."""
    for log2, m in enumerate(CLASSES):
        assert m in TIMED and m == max(t for t in TIMED if t <= 2**log2)
