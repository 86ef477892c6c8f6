"""The KV cache of an engine, on a core without llama.cpp: which way it takes, what it keeps, what it says of it."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kv_core_support import ROW, FakeEngine
from test_kv_disk import IDENTITY

from mullama import abi
from mullama.kv import audit, control, report
from mullama.kv.choice import MIN_GAIN, KvSource
from mullama.kv.events import KvEventKind, KvTier
from mullama.kv.index.payload import Rows
from mullama.kv.index.tree import pack
from mullama.kv.tiers.disk_store import DiskStore
from mullama.kv.tiers.disk_tier import DiskTier
from mullama.kv.tiers.host_tier import GRAIN, MIN_STORED

KINDS = ("full", "window", "recurrent")


def text(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=n)


# -- which way -------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_in_its_slot() -> None:
    engine = FakeEngine()
    engine.ask(text(1, 100), 8)
    (held,) = (slot for slot in engine.core.slots if slot.state == abi.RETAINED)
    place = engine.ask([*held.tokens, *text(2, 30)])
    assert (place.source, place.reuse, place.slot, place.lost) == (KvSource.IN_PLACE, 108, 0, 0)
    engine.check()


def test_the_prefix_of_a_running_request_is_copied() -> None:
    engine = FakeEngine()
    first = engine.admit(text(1, 200))
    engine.compute(first.slot, 150)
    place = engine.admit([*text(1, 200)[:120], 7, 7])
    assert (place.source, place.reuse, place.slot) == (KvSource.COPY, 120, 1)
    engine.check()


@pytest.mark.parametrize("unified", [False, True])
def test_what_a_slot_gave_up_comes_back_from_host_memory(unified: bool) -> None:
    engine = FakeEngine(n_slots=1, unified=unified)
    engine.ask(text(1, 100))
    engine.ask(text(2, 100))
    place = engine.ask(text(1, 100))
    assert (place.source, place.reuse, place.lost) == (KvSource.HOST, 99, 0)
    assert engine.cells.n_restored == 99
    engine.check()


def test_rows_are_put_behind_what_the_slot_still_holds() -> None:
    """Two prompts share a beginning; the second cut the slot, and the rest of the first is in host memory."""
    engine = FakeEngine(n_slots=1)
    first = text(1, 300)
    engine.ask(first)
    engine.ask([*first[:200], *text(2, 50)])
    place = engine.ask(first)
    assert (place.source, place.reuse) == (KvSource.IN_PLACE, 299)
    assert engine.cells.n_restored == 99
    engine.check()


def test_a_copy_goes_on_from_host_memory_in_the_middle_of_a_stretch() -> None:
    """A request computes what host memory has as well, because that was dear to read; then it is not any more."""
    engine = FakeEngine(n_slots=2)
    engine.ask(text(1, 300), 0)
    engine.kv.evict_retained(300, engine.running)
    engine.core.costs["restore"] = 1e9
    running = engine.admit(text(1, 300))
    assert running.reuse == 0
    engine.compute(running.slot, 150)
    engine.core.costs["restore"] = 0.0
    place = engine.admit(text(1, 300))
    assert (place.source, place.reuse, engine.cells.n_restored) == (KvSource.COPY, 299, 149)
    engine.check()


def test_what_is_copied_stays_where_it_is_meanwhile() -> None:
    engine = FakeEngine(n_slots=3, host_bytes=0)
    for seed in (1, 2, 3):
        engine.ask(text(seed, 100), 0)
    first = next(slot for slot in range(3) if engine.core.slots[slot].tokens == text(1, 100))
    node = engine.kv.tree.end_of(first)
    assert node is not None
    node.pinned_until_ns = 1 << 62  # so it cannot be cut, and the copy needs another slot
    place = engine.admit([*text(1, 100)[:60], 7, 7])
    assert (place.source, place.reuse) == (KvSource.COPY, 60)
    assert text(1, 100) in [slot.tokens for slot in engine.core.slots]
    engine.check()


def test_a_short_window_is_cut_and_kept_where_it_was_cut() -> None:
    engine = FakeEngine("window", n_slots=1)
    trunk = text(1, 44)[:30]
    engine.ask(text(1, 44), 0)
    assert engine.ask([*trunk, *text(2, 10)], 0).reuse == 30
    engine.ask(text(9, 60), 0)
    place = engine.ask([*trunk, *text(3, 15)], 0)
    assert (place.source, place.reuse) == (KvSource.HOST, 30)
    engine.check()


def test_another_namespace_shares_nothing() -> None:
    engine = FakeEngine()
    engine.ask(text(1, 100))
    place = engine.ask(text(1, 100), namespace=b"other")
    assert (place.source, place.reuse) == (KvSource.NONE, 0)
    assert place.match.n_tokens == 0
    engine.check()


@pytest.mark.parametrize("kind", KINDS)
def test_kv_that_nobody_takes_is_computed(kind: str) -> None:
    engine = FakeEngine(kind, n_slots=2)
    engine.ask(text(1, 120))
    engine.cells.refuses = True
    running = engine.admit(text(1, 120))
    engine.compute(running.slot, 200)
    place = engine.admit(text(1, 120))
    assert (place.source, place.reuse) == (KvSource.NONE, 0)
    engine.check()


@pytest.mark.parametrize("kind", ["window", "recurrent"])
def test_a_state_that_cannot_be_cut_is_kept_where_prompts_part(kind: str) -> None:
    engine = FakeEngine(kind, n_slots=1)
    trunk = text(1, 200)
    engine.ask([*trunk, *text(2, 60)])
    second = engine.ask([*trunk, *text(3, 60)])
    assert second.reuse == 0  # nobody knew that they would part there
    third = engine.ask([*trunk, *text(4, 60)])
    assert (third.source, third.reuse) == (KvSource.HOST, 200)
    again = engine.ask([*trunk, *text(3, 60)])
    assert (again.source, again.reuse) == (KvSource.HOST, 259)  # and before its last token, for the same prompt again
    engine.check()


def test_borders_are_where_a_checkpoint_is_worth_its_bytes() -> None:
    engine = FakeEngine("window")
    match = engine.admit([*text(1, 100), 5]).match
    match.n_tokens = 70
    assert engine.kv.borders(match, 0, 101) == [70, 100]
    assert engine.kv.borders(match, 70 - MIN_GAIN + 1, 101) == [100]
    assert FakeEngine("full").kv.borders(match, 0, 101) == []
    assert FakeEngine("window", host_bytes=0).kv.borders(match, 0, 101) == []  # nowhere to put one


def test_the_running_prompt_is_waited_for() -> None:
    engine = FakeEngine()
    first = engine.admit(text(1, 400))
    engine.compute(first.slot, 100)
    key = pack([*text(1, 400)[:300], 7])
    assert engine.kv.finder.expected(b"", key, 300) == (100, 300, first.slot)
    engine.compute(first.slot, 300 - MIN_GAIN - 99)
    now, later, slot = engine.kv.finder.expected(b"", key, 300)
    assert (now, later, slot) == (300 - MIN_GAIN + 1, 0, -1)


def test_expecting_changes_nothing() -> None:
    engine = FakeEngine(n_slots=1)
    engine.ask(text(1, 100))
    engine.ask(text(2, 100))
    version, n_nodes = engine.kv.version, engine.kv.tree.n_nodes
    engine.kv.finder.expected(b"", pack(text(1, 100)), 99)
    engine.kv.finder.find(b"", pack(text(1, 100)), 99)
    assert (engine.kv.version, engine.kv.tree.n_nodes, engine.cells.n_restored) == (version, n_nodes, 0)


def test_measured_costs_replace_the_guesses() -> None:
    engine = FakeEngine()
    assert engine.kv.finder.costs().save_byte == 0.3
    engine.core.costs = {"save": 2.0, "restore": 1e9, "copy": 5.0}
    costs = engine.kv.finder.costs()
    assert (costs.save_byte, costs.restore_byte, costs.copy_byte, costs.prefill_token) == (2.0, 1e9, 5.0, 1e6)
    assert FakeEngine(unified=True).kv.finder.costs().copy_byte == 0
    for seed in range(4):
        engine.ask(text(seed, 100))
    place = engine.ask(text(0, 100))
    assert (place.source, place.reuse) == (KvSource.NONE, 0)  # computing is cheaper than such a memory


# -- what is kept, and what is lost -----------------------------------------------------------------------------------


def test_what_is_evicted_for_a_request_is_counted_and_named() -> None:
    engine = FakeEngine(n_slots=1, host_bytes=0)
    engine.ask(text(1, 100), name="first")
    place = engine.ask(text(2, 50), name="second")
    assert place.lost == engine.core.n_evicted == 108
    match = engine.admit(text(1, 100), name="third").match
    why = engine.kv.history.explain(b"", pack(text(1, 100)), 0, match, str)
    assert why is not None and "evicted" in why and "request second" in why
    engine.check()


def test_nothing_is_lost_that_another_slot_or_the_host_holds() -> None:
    engine = FakeEngine(n_slots=2)
    engine.ask(text(1, 100))
    engine.ask([*text(1, 100), 5], 0)
    for seed in (2, 3, 4):
        assert engine.ask(text(seed, 60)).lost == 0
    assert engine.core.n_evicted == 0


def test_a_slot_is_copied_to_host_memory_as_far_as_it_fits() -> None:
    engine = FakeEngine(n_slots=1, host_bytes=100 * ROW)
    engine.ask(text(1, 300), 0)
    place = engine.ask(text(2, 10), 0)
    kept = 100 // GRAIN * GRAIN
    assert (engine.kv.host.used, place.lost) == (kept * ROW, 300 - kept)
    assert engine.ask(text(1, 300)).reuse == kept
    engine.check()


def test_a_short_prefix_is_not_worth_a_place() -> None:
    engine = FakeEngine(n_slots=1)
    engine.ask(text(1, MIN_STORED - 1), 0)
    engine.ask(text(2, MIN_STORED), 0)
    engine.ask(text(3, 50), 0)
    assert engine.kv.host.used == MIN_STORED * ROW


@pytest.mark.parametrize(("kind", "kept"), [("full", 150), ("window", 0), ("recurrent", 0)])
def test_a_reply_that_is_stopped_leaves_its_prompt(kind: str, kept: int) -> None:
    engine = FakeEngine(kind)
    place = engine.admit(text(1, 200))
    engine.compute(place.slot, 150)
    engine.cancel(place.slot)
    assert engine.core.states()[place.slot] == abi.FREE
    assert engine.ask(text(1, 200)).reuse == kept
    engine.check()


def test_a_preempted_request_goes_on_with_what_is_left() -> None:
    engine = FakeEngine()
    place = engine.admit(text(1, 100))
    engine.compute(place.slot, 100)
    for token in range(20):
        engine.core.generate(place.slot, token)
    engine.finish(place.slot)  # preempted: the slot retains all that is computed
    again = engine.resume([*text(1, 100), *range(20), 99])
    assert (again.source, again.reuse) == (KvSource.IN_PLACE, 120)
    engine.check()


def test_an_empty_slot_for_kv_of_its_own() -> None:
    engine = FakeEngine(n_slots=1)
    engine.ask(text(1, 100), 0)
    place = engine.kv.allocate_empty(b"", engine.running, "a")
    assert (place.slot, place.reuse, place.lost) == (0, 0, 0)
    assert engine.core.slots[0].state == abi.FREE and engine.kv.host.used == 100 * ROW
    engine.check()


def test_the_policy_says_which_retained_slot_goes() -> None:
    engine = FakeEngine(n_slots=3, host_bytes=0)
    for seed in (1, 2, 3):
        engine.ask(text(seed, 50), 0)
    engine.ask([*text(1, 50), 7], 0)  # used again
    held = [slot.tokens[:50] for slot in engine.core.slots]
    freed = engine.kv.evict_retained(60, engine.running)
    left = [slot.tokens[:50] for slot in engine.core.slots if slot.tokens]
    assert freed == 100 and left == [text(1, 50)] and len(held) == 3
    engine.check()


def test_a_pinned_prefix_is_the_last_to_go() -> None:
    engine = FakeEngine(n_slots=2, host_bytes=0)
    engine.ask(text(1, 50), 0)
    node = engine.kv.tree.end_of(0)
    assert node is not None
    node.pinned_until_ns = 1 << 62
    for seed in (2, 3, 4):
        engine.ask(text(seed, 50), 0)
    assert engine.ask(text(1, 50)).reuse == 49


def test_freeing_without_copying() -> None:
    engine = FakeEngine(n_slots=3)
    engine.ask(text(1, 50), 0)
    engine.ask(text(2, 50), 0)
    engine.kv.store(0)
    engine.kv.free_retained(engine.running, only_stored=True)
    assert [slot.n_past for slot in engine.core.slots].count(50) == 1 and engine.core.n_evicted == 0
    engine.kv.free_retained(engine.running, only_stored=False)
    assert engine.core.n_evicted == 50
    engine.check()


def test_what_goes_next_is_copied_ahead_where_that_pushes_nothing_out() -> None:
    engine = FakeEngine(n_slots=2, host_bytes=150 * ROW)
    engine.ask(text(1, 100), 0)
    assert engine.kv.store_ahead(engine.running, 1 << 20) == 0  # a slot is empty
    engine.ask(text(2, 80), 0)
    assert engine.kv.store_ahead(engine.running, 99 * ROW) == 0  # too much at once
    assert engine.kv.store_ahead(engine.running, 100 * ROW) == 100
    assert engine.kv.store_ahead(engine.running, 100 * ROW) == 0  # it is there
    engine.check()
    assert engine.ask(text(3, 50), 0).lost == 0
    assert engine.kv.store_ahead(engine.running, 1 << 20) == 0  # 80 more do not fit beside it
    assert engine.kv.host.used == 100 * ROW


def test_drop_leaves_what_runs() -> None:
    engine = FakeEngine()
    running = engine.admit(text(1, 60))
    engine.compute(running.slot, 60)
    engine.ask(text(2, 60), 0)
    engine.kv.store(running.slot)
    assert engine.kv.drop(engine.running) == 60
    assert engine.kv.host.used == 0 and engine.core.slots[running.slot].n_past == 60
    engine.check()


# -- what it says ------------------------------------------------------------------------------------------------


def happened(engine: FakeEngine) -> list[tuple[KvEventKind, KvTier, int, int, str | None, bool]]:
    found, lost = engine.kv.history.events.since(0)
    assert lost == 0
    return [(one.kind, one.tier, one.start, one.end, one.request, one.gone) for one in found]


def test_events_tell_the_life_of_a_prefix() -> None:
    engine = FakeEngine(n_slots=1)
    engine.ask(text(1, 40), 0)
    engine.ask(text(2, 40), 0, name="b")
    engine.ask(text(1, 40), 0, name="c")
    engine.kv.drop(engine.running)
    stored, reused, dropped = KvEventKind.STORED, KvEventKind.REUSED, KvEventKind.DROPPED
    device, host = KvTier.DEVICE, KvTier.HOST
    assert happened(engine) == [
        (stored, device, 0, 40, "a", False),
        (stored, host, 0, 40, "b", False),
        (stored, device, 0, 40, "a", False),
        (stored, host, 0, 40, "c", False),
        (reused, device, 0, 39, "c", False),
        (stored, device, 0, 40, "a", False),
        *[(dropped, host, 0, 40, None, True)] * 2,
    ]  # fmt: skip


def test_hits_by_source() -> None:
    engine = FakeEngine(n_slots=1)
    engine.ask(text(1, 40), 0)
    engine.ask([*text(1, 40), 5], 0)
    engine.ask(text(2, 40), 0)
    engine.ask(text(1, 40), 0)
    assert engine.kv.hits[KvSource.IN_PLACE] == 40 and engine.kv.hits[KvSource.HOST] == 39


def test_the_report_of_a_cache() -> None:
    engine = FakeEngine(n_slots=2)
    place = engine.admit(text(1, 40), name="r1")
    engine.compute(place.slot, 40)
    engine.ask(text(2, 40), 0)
    engine.kv.store(1)
    owners = [report.Owner(7, "r1", "t"), None]
    found = report.snapshot("m", engine.kv, owners, 3)
    assert (found["model"], found["layout"], found["cells_used"], found["parked_sequences"]) == ("m", "streams", 80, 3)
    assert [(row["state"], row["handle"], row["request"]) for row in found["slots"]] == [
        ("decode", 7, "r1"), ("retained", None, None),
    ]  # fmt: skip
    assert found["tiers"] == {
        "host": {"bytes_used": 40 * ROW, "bytes_budget": 1 << 20, "tokens": 40}, "disk": None,
    }  # fmt: skip
    assert found["audit"] == []
    nodes = report.tree(engine.kv, owners, 10)["nodes"]
    assert sorted((node["end"], tuple(node["owners"]), tuple(node["tiers"])) for node in nodes) == [
        (40, (), ("device", "host")), (40, ("r1",), ("device",)),
    ]  # fmt: skip


# -- what an operator does --------------------------------------------------------------------------------------------


def test_a_pin_takes_what_was_named_and_no_more() -> None:
    engine = FakeEngine(n_slots=1)
    engine.ask(text(1, 100), 0)
    assert control.pin(engine.kv, b"", text(1, 100)[:40], 99) == 40
    assert [(node.end, node.pinned_until_ns) for node in engine.kv.tree.nodes()] == [(40, 99), (100, 0)]
    assert control.pin(engine.kv, b"", [5, 6], 99) == 0
    engine.check()


def test_a_drop_takes_what_begins_so_in_the_tiers_that_were_named() -> None:
    engine = FakeEngine(n_slots=3)
    for tail in (1, 2):
        engine.ask([*text(1, 50), *text(10 + tail, 50)], 0)
    engine.ask(text(2, 50), 0)
    engine.kv.store_retained(engine.running)
    everything = {KvTier.DEVICE, KvTier.HOST}
    found = control.drop(engine.kv, engine.running, b"", [*text(1, 50), text(11, 50)[0]], {KvTier.HOST})
    assert found == {"cells_freed": 0, "host_bytes_freed": 50 * ROW, "disk_bytes_freed": 0}
    found = control.drop(engine.kv, engine.running, b"", text(1, 50)[:20], everything)
    assert found["cells_freed"] == 100 and found["host_bytes_freed"] == 100 * ROW
    assert control.drop(engine.kv, engine.running, b"", [*text(2, 50), 5], everything)["cells_freed"] == 0
    engine.check()
    assert control.drop(engine.kv, engine.running, None, None, everything)["cells_freed"] == 50
    assert engine.kv.tree.n_nodes == 0


# -- the audit sees what is wrong ------------------------------------------------------------------------------


def test_the_audit_finds_what_does_not_agree() -> None:
    engine = FakeEngine(n_slots=2)
    engine.ask(text(1, 40), 0)
    engine.kv.store(0)
    assert audit.differences(engine.kv) == []
    engine.kv.host.used += 1
    assert audit.differences(engine.kv) == [f"host memory: {40 * ROW} bytes in the tree, {40 * ROW + 1} accounted for"]
    engine.kv.host.used -= 1
    (node,) = engine.kv.tree.nodes()
    assert isinstance(node.host, Rows)
    chunk = node.host.chunks.pop()
    assert audit.differences(engine.kv) == [f"{node}: its rows have a wrong size"]
    node.host.chunks.append(chunk)
    engine.core.slots[0].tokens[3] += 1
    assert audit.differences(engine.kv)[-1] == "slot 0: its tokens are not those of its path in the tree"
    engine.kv.tree.release(0)
    assert "slot 0 holds 40 tokens that the tree does not know" in audit.differences(engine.kv)
    engine.core.is_vacant = True
    assert audit.differences(engine.kv) == []


# -- any order -----------------------------------------------------------------------------------------------------

#: Prompts of which many begin alike, with short and long stretches.
prompts = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 70)), min_size=1, max_size=4)


def words(parts: Sequence[tuple[int, int]]) -> list[int]:
    return [1, *(1000 * kind + i for kind, n in parts for i in range(n))]


class CacheMachine(RuleBasedStateMachine):
    """Requests in any order; after each step all agrees, and all KV is that of the tokens it is kept under."""

    kind = "full"
    unified = False

    def __init__(self) -> None:
        super().__init__()
        self.engine = FakeEngine(self.kind, host_bytes=3000, unified=self.unified)
        self.parked: list[tuple[list[int], bytes]] = []

    def slots(self, runs: bool) -> list[int]:
        return [slot for slot, one in enumerate(self.engine.running) if one is runs]

    @precondition(lambda self: not all(self.engine.running))
    @rule(parts=prompts, namespace=st.sampled_from([b"", b"", b"salt"]))
    def admit(self, parts: list[tuple[int, int]], namespace: bytes) -> None:
        engine = self.engine
        prompt = words(parts)
        evicted = engine.core.n_evicted
        place = engine.admit(prompt, namespace=namespace)
        assert 0 <= place.reuse < len(prompt)
        assert (place.reuse > 0) == (place.source is not KvSource.NONE)
        assert place.lost == engine.core.n_evicted - evicted

    @precondition(lambda self: any(self.engine.running))
    @rule(data=st.data(), n=st.integers(1, 200), answer=st.integers(0, 40))
    def compute(self, data: st.DataObject, n: int, answer: int) -> None:
        slot = data.draw(st.sampled_from(self.slots(True)))
        self.engine.compute(slot, n)
        if self.engine.core.slots[slot].state == abi.DECODE:
            for token in range(answer):
                self.engine.core.generate(slot, 5000 + token)

    @precondition(lambda self: any(self.engine.running))
    @rule(data=st.data(), how=st.sampled_from(["finish", "cancel", "preempt"]))
    def end(self, data: st.DataObject, how: str) -> None:
        slot = data.draw(st.sampled_from(self.slots(True)))
        if how == "cancel":
            self.engine.cancel(slot)
            return
        tokens, namespace = list(self.engine.core.slots[slot].tokens), self.engine.namespaces[slot]
        self.engine.finish(slot)
        if how == "preempt":
            self.parked.append((tokens, namespace))

    @precondition(lambda self: self.parked and not all(self.engine.running))
    @rule()
    def resume(self) -> None:
        tokens, namespace = self.parked.pop(0)
        self.engine.resume(tokens, namespace)

    @rule(data=st.data(), what=st.sampled_from(["evict", "store", "free", "drop", "host", "exchange", "refuse", "pin"]))
    def look_after(self, data: st.DataObject, what: str) -> None:
        engine, kv = self.engine, self.engine.kv
        if what == "evict":
            kv.evict_retained(data.draw(st.integers(1, 200)), engine.running)
        elif what == "store":
            kv.store_retained(engine.running)
        elif what == "free":
            kv.free_retained(engine.running, only_stored=data.draw(st.booleans()))
        elif what == "drop":
            kv.drop(engine.running)
        elif what == "host":
            before = kv.host.used
            assert kv.drop_host() == before and kv.host.used == 0
        elif what == "exchange":
            engine.exchange(0, data.draw(st.integers(1, len(engine.running) - 1)))
        elif what == "refuse":
            engine.cells.refuses = not engine.cells.refuses
        else:
            for node in list(kv.tree.nodes())[:2]:
                node.pinned_until_ns = data.draw(st.sampled_from([0, 1 << 62]))

    @invariant()
    def agrees(self) -> None:
        self.engine.check()


class WindowMachine(CacheMachine):
    kind = "window"


class RecurrentMachine(CacheMachine):
    kind = "recurrent"


class UnifiedMachine(CacheMachine):
    unified = True


FEW = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase
TestWindow = WindowMachine.TestCase
TestRecurrent = RecurrentMachine.TestCase
TestUnified = UnifiedMachine.TestCase
TestCache.settings = TestWindow.settings = TestRecurrent.settings = TestUnified.settings = FEW


# -- with a disk ---------------------------------------------------------------------------------------------------


def with_disk(folder: Path, n_bytes: int = 1 << 20) -> tuple[FakeEngine, Callable[[], None]]:
    """An engine with a disk tier, and what waits until all that was handed over is there."""
    engine = FakeEngine(n_slots=1, host_bytes=0)
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    kv = engine.kv
    identity = type(IDENTITY)(**{name: getattr(IDENTITY, name) for name in IDENTITY.__slots__} | {"token_bytes": ROW})
    store = DiskStore(folder, n_bytes, identity)
    disk = DiskTier(store, kv.tree, lambda: kv.host.policy, ROW, posted.put, kv.leaves_disk)
    kv.attach_disk(disk)

    def settle() -> None:
        disk.written().result()
        while not posted.empty():
            posted.get()()

    return engine, settle


def test_the_disk_gives_back_what_a_process_before_wrote(tmp_path: Path) -> None:
    engine, _ = with_disk(tmp_path)
    engine.ask(text(1, 100), 0)
    engine.kv.close()
    assert engine.kv.disk is None
    engine, _ = with_disk(tmp_path)
    place = engine.ask(text(1, 100), 0)
    assert (place.source, place.reuse) == (KvSource.DISK, 99)
    engine.check()
    engine.kv.close()


def test_a_disk_that_breaks_its_promise(tmp_path: Path) -> None:
    engine, settle = with_disk(tmp_path)
    engine.ask(text(1, 100), 0)
    engine.ask(text(2, 100), 0)
    settle()
    for file in tmp_path.rglob("*.kv"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    place = engine.ask(text(1, 100), 0)
    assert (place.source, place.reuse) == (KvSource.NONE, 0)
    engine.check()
    engine.kv.close()


def test_a_prefix_is_saved_and_loaded_by_hand(tmp_path: Path) -> None:
    engine, settle = with_disk(tmp_path)
    engine.kv.host.budget = 1 << 20
    running = engine.admit(text(1, 100))
    engine.compute(running.slot, 100)
    disk = engine.kv.disk
    assert disk is not None
    n_failed = disk.n_failed
    assert disk.hand_over(lambda: control.save(engine.kv, disk, b"", text(1, 100)[:60]))
    settle()
    saved = control.saved(engine.kv, disk, b"", text(1, 100)[:60], n_failed)
    assert saved == {"tokens": 60, "bytes": 60 * ROW}
    engine.kv.drop_host()
    assert control.load(engine.kv, b"", text(1, 100)[:50]) == {"tokens": 50, "bytes": 60 * ROW}
    assert engine.kv.host.used == 60 * ROW
    engine.check()
    engine.kv.close(keep=False)


def test_a_cache_goes_on_without_its_disk(tmp_path: Path) -> None:
    engine, settle = with_disk(tmp_path)
    engine.ask(text(1, 100), 0)
    engine.ask(text(2, 100), 0)
    settle()
    disk = engine.kv.detach_disk()
    assert disk is not None and engine.kv.detach_disk() is None
    assert all(node.disk is None for node in engine.kv.tree.nodes())
    assert engine.ask(text(1, 100), 0).reuse == 0
    engine.check()
    disk.close()


@settings(max_examples=15, deadline=None)
@given(st.lists(prompts, min_size=1, max_size=8), st.integers(1, 6000))
def test_any_prompts_with_a_small_disk(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[tuple[int, int]]], n_bytes: int
) -> None:
    engine, settle = with_disk(tmp_path_factory.mktemp("kv"), n_bytes)
    for parts in texts:
        engine.ask(words(parts), 3)
        settle()
        engine.check()
        assert engine.kv.disk is not None and engine.kv.disk.used <= max(engine.kv.disk.budget, 0)
    engine.kv.close()
