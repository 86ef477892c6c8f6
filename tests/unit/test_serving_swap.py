"""Hot-swap with fake engines: in place, side by side, failures, one at a time, the history."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from serving_support import TIMEOUT, Engine, Weights, World, play, settle, until

from mullama.engine.client import EngineClient
from mullama.errors import (
    EngineDead,
    InvalidRequest,
    ModelBusy,
    ModelNotFound,
    ModelNotLoaded,
    NeedsAnotherEngine,
    ReferenceNotFound,
)
from mullama.serving.hot_swap import SwapRecord, Swaps
from mullama.serving.states import ModelState
from mullama.serving.targets import Target
from mullama.types import MemoryLeft


class Report:
    def to_dict(self) -> dict[str, Any]:
        return {"kv": "carry", "pause_ms": 1.0, "sequences_moved": 2}


class SwappableWeights(Weights):
    def swap(
        self,
        path: Path,
        *,
        label: str = "",
        kv: str = "auto",
        gap: str = "auto",
        memory_left: Any = None,
        kl: bool = False,
        on_phase: Any = None,
    ) -> Report:
        on_phase("loading")
        self.engine.asked = {"kv": kv, "gap": gap, "memory_left": memory_left} | ({"kl": True} if kl else {})
        if self.engine.error:
            raise self.engine.error
        if self.engine.needs_another:
            raise NeedsAnotherEngine("another architecture")
        self.engine.info = replace(self.engine.info, weights=label, size_bytes=77)
        return Report()

    def texts_for(self, other: Any) -> list[list[int]]:
        if self.engine.is_foreign:
            raise InvalidRequest("kl: another vocabulary", param="kl")
        return [[1, 2, 3]]

    def compare(self, other: Any, texts: list[list[int]]) -> dict[str, Any]:
        assert texts == [[1, 2, 3]] and self.engine.n_closed == 0 and other.engine.n_closed == 0
        return {"kl": 0.25, "kl_detail": {"tokens": 2}}


class Swappable(Engine):
    """``needs_another``: its weights cannot be changed in place."""

    weights_class = SwappableWeights
    needs_another = False
    error: Exception | None = None
    asked: dict[str, Any] | None = None
    n_handed = 3
    is_foreign = False

    def hand_over(self, other: Any) -> int:
        assert other is not self
        return self.n_handed


class SwapWorld(World):
    """One loaded model ``m``; ``find`` waits for ``may_find``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("", **options)
        self.engine = Swappable("m")
        self.models.add_loaded("m", cast(EngineClient, self.engine), "ref:m")
        self.may_find = threading.Event()
        self.may_find.set()
        self.asked: list[tuple[str, str, bool]] = []
        self.error: Exception | None = None
        self.making = ""  # what is made of what, said before it is
        self.made: list[Swappable] = []
        self.swaps = Swaps(self.models, self.find, self.make_new)

    def find(self, to: str, reference: str, progress: Any, may_read_files: bool) -> Target:
        self.asked.append((to, reference, may_read_files))
        if self.making:
            progress(self.making, 0, None)
        progress("fetching", 1, 2)
        assert self.may_find.wait(TIMEOUT)
        if self.error:
            raise self.error
        return Target(Path("/x.gguf"), f"label:{to}", f"ref:{to}")

    def make_new(self, name: str, target: Target) -> EngineClient:
        engine = Swappable(name, weights=target.label)
        self.made.append(engine)
        return cast(EngineClient, engine)

    async def swap(self, to: str = "Q4_0", kv: str = "auto", **options: Any) -> SwapRecord:
        record = self.swaps.begin("m", to, kv, **options)
        await record.ended.wait()
        return record


def test_in_place() -> None:
    async def test() -> None:
        world = SwapWorld()
        record = await world.swap(may_read_files=True)
        assert (record.state, record.error, world.asked) == ("done", None, [("Q4_0", "ref:m", True)])
        found = record.to_dict()
        assert found.items() >= {"way": "in_place", "kv": "carry", "sequences_moved": 2, "model": "m"}.items()
        assert found["total_ms"] >= found["resolve_ms"] >= 0
        served = world.models.get("m")
        assert (served.reference, served.n_bytes, served.n_requests, served.in_use) == ("ref:Q4_0", 77, 0, 0)
        assert world.engine.n_closed == 0 and world.made == []

    play(test())


def test_what_is_made_for_a_swap_stays_in_its_record() -> None:
    """Said before it is made, and still there when the next step has replaced the phase."""

    async def test() -> None:
        world = SwapWorld()
        world.making = "making Q8_0 out of Q4_1, which loses more than out of F16"
        world.may_find.clear()
        record = world.swaps.begin("m", "Q8_0")
        await until(lambda: record.phase == "fetching")
        assert record.to_dict()["note"] == world.making
        world.may_find.set()
        await record.ended.wait()
        assert (record.state, record.to_dict()["note"]) == ("done", world.making)
        world.making = ""
        assert "note" not in (await world.swap()).to_dict()

    play(test())


@pytest.mark.parametrize("kv", ["recompute", "drain"])
def test_side_by_side(kv: str) -> None:
    async def test() -> None:
        world = SwapWorld()
        world.engine.needs_another = True
        lease = await world.models.lease("m")
        record = await world.swap("other", kv)
        assert record.report is not None
        assert record.report.items() >= {"way": "side_by_side", "kv": kv, "weights_to": "label:other"}.items()
        assert record.report["sequences_recomputed"] == (0 if kv == "drain" else 3)
        new = await world.models.lease("m")
        assert new.engine is cast(EngineClient, world.made[0])
        assert world.engine.n_closed == 0  # somebody is still on it
        lease.release()
        await until(lambda: world.engine.n_closed == 1)
        new.release()
        assert world.models.get("m").reference == "ref:other"

    play(test())


def test_an_engine_that_is_used_too_long_is_cut() -> None:
    async def test() -> None:
        world = SwapWorld()
        world.swaps = Swaps(world.models, world.find, world.make_new, drain_s=0)
        lease = await world.models.lease("m")
        world.engine.on_drain = lease.release
        await world.swap("other", "drain")
        await until(lambda: world.engine.n_closed == 1)
        assert world.engine.drained == [0]

    play(test())


@pytest.mark.parametrize("error", [ReferenceNotFound("no such model"), ZeroDivisionError("x")])
def test_a_failure_leaves_the_old_one(error: Exception) -> None:
    async def test() -> None:
        world = SwapWorld()
        world.error = error
        record = await world.swap()
        found = record.to_dict()
        assert (found["state"], world.models.get("m").reference) == ("failed", "ref:m")
        assert str(error) in found["error"]["message"]
        assert world.models.resolve("m")[1] is cast(EngineClient, world.engine)
        world.error = None
        assert (await world.swap()).state == "done"
        assert [one.state for one in world.swaps.history] == ["failed", "done"]
        assert world.swaps.find_record(record.id) is record
        assert world.swaps.find_record("nosuch") is None

    play(test())


def test_one_at_a_time_and_the_model_stays_meanwhile() -> None:
    async def test() -> None:
        world = SwapWorld()
        world.may_find.clear()
        record = world.swaps.begin("m", "Q4_0")
        await until(lambda: record.phase == "fetching")
        assert record.to_dict().items() >= {"state": "running", "done": 1, "total": 2}.items()
        with pytest.raises(InvalidRequest, match="already"):
            world.swaps.begin("m", "Q8_0")
        with pytest.raises(ModelBusy):
            await world.models.unload("m")
        world.models.set_keep_alive("m", 0)
        await settle()
        assert world.engine.n_closed == 0
        world.models.set_keep_alive("m", -1)
        world.may_find.set()
        await record.ended.wait()
        assert record.state == "done"

    play(test())


def test_what_cannot_begin() -> None:
    async def test() -> None:
        world = SwapWorld()
        world.models.add("later", "ref")
        for arguments, error in (
            (("m", "Q4_0", "keep"), InvalidRequest),
            (("m", ""), InvalidRequest),
            (("nosuch", "Q4_0"), ModelNotFound),
            (("later", "Q4_0"), ModelNotLoaded),
        ):
            with pytest.raises(error):
                world.swaps.begin(*arguments)
        assert not world.swaps.history

    play(test())


def test_how_far_the_new_weights_are() -> None:
    async def test() -> None:
        world = SwapWorld()
        await world.swap(kl=True)
        assert world.engine.asked == {"kv": "auto", "gap": "auto", "memory_left": None, "kl": True}
        for kv in ("drain", "recompute"):
            world.engine.needs_another = True
            record = await world.swap("other", kv, kl=True)
            assert record.report is not None
            assert record.report.items() >= {"kl": 0.25, "kl_detail": {"tokens": 2}, "way": "side_by_side"}.items()
            world.engine = world.made[-1]
        record = await world.swap("other", "drain")
        assert record.report is not None and record.report["kl"] is None
        world.engine = world.made[-1]
        world.engine.is_foreign = True
        record = await world.swap("third", "drain", kl=True)
        assert (record.state, str(record.error)) == ("failed", "kl: another vocabulary")
        assert world.made[-1].n_closed == 1  # and the old one goes on
        lease = await world.models.lease("m")
        assert lease.engine is cast(EngineClient, world.engine)
        lease.release()

    play(test())


def test_a_budget_says_what_room_there_is() -> None:
    async def test() -> None:
        world = SwapWorld(memory_budget=200, sizes={"ref:m": 60, "b": 15})
        await world.swap(gap="never")
        assert world.engine.asked == {"kv": "auto", "gap": "never", "memory_left": MemoryLeft(beside=140, alone=200)}
        world.models.add("b", "b")
        await world.models.load("b")
        served = world.models.get("m")
        await world.swap()
        left = MemoryLeft(200 - 15 - served.n_bytes, 185)
        assert world.engine.asked == {"kv": "auto", "gap": "auto", "memory_left": left}
        world.models.budget.n_bytes = 0
        await world.swap()
        assert world.engine.asked == {"kv": "auto", "gap": "auto", "memory_left": None}
        with pytest.raises(InvalidRequest, match="gap: it must be one of auto, never"):
            world.swaps.begin("m", "Q4_0", gap="maybe")

    play(test())


def test_an_engine_that_lost_its_weights_is_given_up() -> None:
    """Who still holds it ends first; the next request loads the model anew."""

    async def test() -> None:
        world = SwapWorld()
        world.engine.error = EngineDead("neither could be loaded")
        lease = await world.models.lease("m")
        record = await world.swap()
        served = world.models.get("m")
        assert (record.state, served.state, served.error) == ("failed", ModelState.FAILED, "neither could be loaded")
        assert not world.models.ready
        assert world.engine.n_closed == 0
        lease.release()
        await until(lambda: world.engine.n_closed == 1)
        (await world.models.lease("m")).release()
        assert (served.state, world.loads) == (ModelState.READY, ["m"])

    play(test())
