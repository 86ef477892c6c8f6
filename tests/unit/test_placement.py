"""Where a request goes, and how holes are closed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mullama.kv.placement import Placement, SlotView, holes, n_ranges, neighbours, place

EMPTY = SlotView(False)
RUNS = SlotView(True)


def kept(tokens: int, last_used: int = 0) -> SlotView:
    return SlotView(False, tokens, last_used)


def test_all_slots_run() -> None:
    assert place([RUNS, RUNS], -1, 0) is None
    assert place([], -1, 0) is None


def test_the_lowest_free_slot() -> None:
    assert place([RUNS, EMPTY, EMPTY], -1, 0) == Placement(1, 0)


def test_a_match_is_continued_in_place() -> None:
    assert place([kept(9), EMPTY], 0, 5) == Placement(0, 5)


def test_a_match_above_changes_places_with_what_is_below() -> None:
    assert place([RUNS, kept(3), kept(9)], 2, 8) == Placement(1, 8, exchange=(2, 1))
    assert place([EMPTY, kept(9)], 1, 8) == Placement(0, 8, exchange=(1, 0))


def test_a_retained_prefix_moves_away_rather_than_being_dropped() -> None:
    assert place([kept(9), RUNS, EMPTY], -1, 0) == Placement(0, 0, exchange=(0, 2))


def test_the_least_recently_used_prefix_makes_room() -> None:
    assert place([kept(9, 5), kept(9, 3), kept(9, 4)], -1, 0) == Placement(0, 0, evict=1, exchange=(0, 1))
    assert place([kept(9, 1), kept(9, 3)], -1, 0) == Placement(0, 0, evict=0)


def test_ties_go_to_the_lowest() -> None:
    assert place([kept(9, 3), kept(9, 3)], -1, 0) == Placement(0, 0, evict=0)


slot_views = st.lists(
    st.one_of(
        st.just(RUNS),
        st.just(EMPTY),
        st.builds(kept, st.integers(1, 100), st.integers(0, 50)),
    ),
    min_size=1,
    max_size=10,
)


@given(slot_views, st.data())
def test_placement_loses_nothing_it_need_not(slots: list[SlotView], data: st.DataObject) -> None:
    retained = [i for i, slot in enumerate(slots) if not slot.running and slot.tokens]
    match = data.draw(st.sampled_from([-1, *retained]))
    reuse = data.draw(st.integers(1, slots[match].tokens)) if match >= 0 else 0
    where = place(slots, match, reuse)
    if all(slot.running for slot in slots):
        assert where is None
        return
    assert where is not None
    assert where.reuse == reuse
    # Carry it out.
    after = list(slots)
    if where.evict is not None:
        assert match == -1, "a match needs no eviction"
        assert not after[where.evict].running
        assert EMPTY not in slots, "there was an empty slot"
        assert after[where.evict].last_used == min(slots[i].last_used for i in retained)
        after[where.evict] = EMPTY
    if where.exchange is not None:
        a, b = where.exchange
        assert a != b
        assert not after[a].running and not after[b].running, "running sequences stay where they are"
        after[a], after[b] = after[b], after[a]
    # It goes to the lowest slot that does not run, on what it reuses or on nothing.
    assert where.slot == min(i for i, slot in enumerate(slots) if not slot.running)
    assert after[where.slot] == (slots[match] if match >= 0 else EMPTY)
    lost = sum(slot.tokens for slot in slots) - sum(slot.tokens for slot in after)
    assert lost == (slots[where.evict].tokens if where.evict is not None else 0)


@given(st.lists(st.booleans(), max_size=16))
def test_holes_are_closed_with_the_fewest_moves(running: list[bool]) -> None:
    state = list(running)
    moves = holes(running)
    for low, high in moves:
        assert low < high and not state[low] and state[high]
        state[low], state[high] = True, False
    n = sum(running)
    assert state == [True] * n + [False] * (len(running) - n)
    assert len(moves) == sum(running[n:]), "each sequence above the range moves once, nobody else moves"


def test_groups_come_together() -> None:
    assert neighbours("ABAB") == [(1, 2)]
    assert neighbours("AABB") == neighbours("ABCD") == neighbours("") == []
    assert neighbours("ABBA") == [(1, 3)]
    assert neighbours("AABBA") == [(2, 4)]


@given(st.lists(st.sampled_from("ABCD"), max_size=12))
def test_after_the_exchanges_each_group_is_one_range(groups: list[str]) -> None:
    state = list(groups)
    for low, high in neighbours(groups):
        assert low < high
        assert state[low] != state[high]
        state[low], state[high] = state[high], state[low]
    assert sorted(state) == sorted(groups)
    assert n_ranges(state) == len(set(groups))
    assert state[:1] == groups[:1]  # the first one stays
