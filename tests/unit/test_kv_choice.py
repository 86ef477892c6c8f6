"""Where a prompt's KV is taken from: against all ways there are, and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama import abi
from mullama.kv.choice import Choice, KvCosts, KvSource, SlotOffer, choose

PLAIN = KvCosts(prefill_token=1000.0, save_byte=1.0, restore_byte=1.0, copy_byte=1.0, disk_byte=1.0)


def offer(slot: int, n: int, **more: Any) -> SlotOffer:
    facts = {"running": False, "can_cut": True, "tail_unsaved": 0, "can_copy": True, **more}
    return SlotOffer(slot, n, **facts)


def chosen(
    n_prompt: int, offers: Sequence[SlotOffer] = (), n_stored: int = 0, n_host: int | None = None, **more: Any
) -> Choice:
    options: dict[str, Any] = {
        "costs": PLAIN, "token_bytes": 10, "can_extend": True, "tail_weight": 0.25, **more,
    }  # fmt: skip
    return choose(n_prompt, offers, n_stored, n_stored if n_host is None else n_host, **options)


def test_the_sources_are_those_of_the_page() -> None:
    assert {source.number: str(source) for source in KvSource} == dict(abi.KV_SOURCES)


def test_nothing_is_known() -> None:
    assert chosen(100) == Choice(KvSource.NONE, cost_ns=100_000.0)
    assert chosen(0).cost_ns == 0


def test_what_costs_nothing_is_taken_in_place() -> None:
    found = chosen(100, [offer(3, 80)], n_stored=80)
    assert (found.source, found.slot, found.n_slot, found.n_tokens) == (KvSource.IN_PLACE, 3, 80, 80)
    assert found.cost_ns == 20 * 1000


def test_a_long_tail_is_worth_a_copy() -> None:
    assert chosen(100, [offer(0, 10, tail_unsaved=1)]).source is KvSource.COPY, "100 ns against 250"
    assert chosen(100, [offer(0, 90, tail_unsaved=1)]).source is KvSource.IN_PLACE, "900 ns against 250"


def test_a_running_slot_is_only_copied() -> None:
    assert chosen(100, [offer(0, 90, running=True)]).source is KvSource.COPY
    assert chosen(100, [offer(0, 90, running=True, can_copy=False)]).source is KvSource.NONE
    assert chosen(100, [offer(0, 90, can_cut=False, can_copy=False)]).source is KvSource.NONE


def test_host_memory_and_disk() -> None:
    assert chosen(100, n_stored=80).source is KvSource.HOST
    assert chosen(100, n_stored=80, n_host=79).source is KvSource.DISK
    assert chosen(100, n_stored=80, n_host=79).cost_ns == 10 * (80 + 1) + 20 * 1000
    slow = KvCosts(prefill_token=100.0, restore_byte=1.0, disk_byte=20.0)
    assert chosen(100, n_stored=80, n_host=0, costs=slow).source is KvSource.NONE, "the disk is slower than computing"


def test_a_slot_goes_on_with_what_the_tiers_hold() -> None:
    found = chosen(100, [offer(1, 50)], n_stored=90)
    assert (found.source, found.n_slot, found.n_tokens) == (KvSource.IN_PLACE, 50, 90)
    assert found.cost_ns == 40 * 10 + 10 * 1000
    apart = chosen(100, [offer(1, 50)], n_stored=90, can_extend=False)
    assert (apart.source, apart.n_tokens, apart.n_slot) == (KvSource.HOST, 90, 0)
    apart = chosen(100, [offer(1, 89)], n_stored=90, can_extend=False, costs=KvCosts(prefill_token=5, restore_byte=1.0))
    assert (apart.source, apart.n_tokens, apart.n_slot) == (KvSource.IN_PLACE, 89, 89)


def test_shared_cells_are_copied_for_nothing() -> None:
    free = KvCosts(prefill_token=1000.0, copy_byte=0.0)
    assert chosen(100, [offer(0, 90, tail_unsaved=1)], costs=free).source is KvSource.COPY
    assert chosen(100, [offer(0, 90)], costs=free).source is KvSource.IN_PLACE, "as cheap, and takes no slot"


offers_st = st.lists(
    st.builds(
        SlotOffer,
        st.integers(0, 7),
        st.integers(1, 100),
        st.booleans(),
        st.booleans(),
        st.integers(0, 100),
        st.booleans(),
    ),
    max_size=5,
    unique_by=lambda one: one.slot,
)
price = st.floats(0.0, 50.0)
costs_st = st.builds(KvCosts, st.floats(0.1, 1e4), price, price, price, price)


def ways(
    n_prompt: int,
    offers: list[SlotOffer],
    n_stored: int,
    n_host: int,
    costs: KvCosts,
    token_bytes: int,
    can_extend: bool,
    tail_weight: float,
) -> list[tuple[float, KvSource, int, int, int]]:
    """All there are: (cost, source, tokens, slot, of them from the slot), said token by token."""

    def fetched(token: int) -> float:
        return token_bytes * (costs.restore_byte + (costs.disk_byte if token >= n_host else 0))

    def rest(start: int, end: int) -> float:
        return sum(map(fetched, range(start, end))) + (n_prompt - end) * costs.prefill_token

    found = [(n_prompt * costs.prefill_token, KvSource.NONE, 0, -1, 0)]
    if n_stored:
        found.append((rest(0, n_stored), KvSource.DISK if n_stored > n_host else KvSource.HOST, n_stored, -1, 0))
    for one in offers:
        end = max(one.n_tokens, n_stored) if can_extend else one.n_tokens
        if one.can_cut and not one.running:
            lost = one.tail_unsaved * tail_weight * costs.prefill_token
            found.append((lost + rest(one.n_tokens, end), KvSource.IN_PLACE, end, one.slot, one.n_tokens))
        if one.can_copy:
            cost = one.n_tokens * token_bytes * costs.copy_byte
            found.append((cost + rest(one.n_tokens, end), KvSource.COPY, end, one.slot, one.n_tokens))
    return found


@given(
    st.integers(100, 200), offers_st, st.integers(0, 100), st.integers(0, 100), costs_st, st.integers(0, 40),
    st.booleans(), st.floats(0, 0.25),
)  # fmt: skip
def test_the_cheapest_way_is_taken(
    n_prompt: int,
    offers: list[SlotOffer],
    n_stored: int,
    n_host: int,
    costs: KvCosts,
    token_bytes: int,
    can_extend: bool,
    tail_weight: float,
) -> None:
    n_host = min(n_host, n_stored)
    found = choose(
        n_prompt, offers, n_stored, n_host,
        costs=costs, token_bytes=token_bytes, can_extend=can_extend, tail_weight=tail_weight,
    )  # fmt: skip
    everything = ways(n_prompt, offers, n_stored, n_host, costs, token_bytes, can_extend, tail_weight)
    assert found.cost_ns == pytest.approx(min(everything)[0])
    its_own = [way[0] for way in everything if way[1:] == (found.source, found.n_tokens, found.slot, found.n_slot)]
    assert its_own == [pytest.approx(found.cost_ns)], "it is one of the ways, at its price"
