"""The same policy sees the same numbers and decides the same in the engine and in the simulator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from kv_engine_support import ask, request

from mullama.engine.engine import Engine
from mullama.kv.choice import KvCosts
from mullama.scheduling import EngineState, Plan, SeqView
from mullama.scheduling.batching import Batching
from mullama.simulation import CostModel, Grid, SimConfig, simulate
from mullama.types import Preempt, SeqState
from mullama.workload.base import TraceRequest, Workload
from mullama.workload.prompts import Prompts

Seen = tuple[list[tuple[Any, ...]], dict[int, int], dict[int, Preempt]]
BLOCK = 48


class LongestPrefix(Batching):
    """Whoever finds most of its prompt in the KV cache goes first: what is decided depends on ``cached_tokens``.

    It keeps what it saw and said.
    """

    name = "longest_prefix"

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.seen: list[Seen] = []

    def order(self, todo: list[SeqView], running: list[SeqView], state: EngineState) -> list[SeqView]:
        return sorted(todo, key=lambda seq: (-seq.cached_tokens, seq.id))

    def plan(self, state: EngineState) -> Plan:
        plan = super().plan(state)
        views = [
            (seq.id, seq.state, seq.prompt_tokens, seq.prefill_left, seq.cached_tokens, seq.generated, seq.cells,
             seq.max_tokens, seq.preemptions)
            for seq in sorted(self._seqs.values(), key=lambda seq: seq.id)
        ]  # fmt: skip
        self.seen.append((views, dict(plan.tokens), dict(plan.preempt)))
        return plan


class Turns(LongestPrefix):
    """The same, and once a sequence has six tokens it loses its slot to whoever waits."""

    name = "turns"
    preempts = True

    def victims(self, running: list[SeqView], state: EngineState) -> list[SeqView]:
        return [seq for seq in running if seq.generated >= 6 and seq.preemptions == 0]

    def yields(self, victim: SeqView, seq: SeqView) -> bool:
        return True


def waves() -> list[list[TraceRequest]]:
    """Prompts that share a beginning with some others of their wave, and with those before."""
    first = [TraceRequest(0, 3 * BLOCK + 5 * i, 4 + i, blocks=(i % 3, 10 + i), block_tokens=BLOCK) for i in range(9)]
    second = [
        TraceRequest(100, 2 * BLOCK + 7 * i, 3 + i % 4, blocks=(i % 4,) + (10 + i % 3,) * (i % 2), block_tokens=BLOCK)
        for i in range(12)
    ]
    third = [TraceRequest(200, BLOCK + 40 + i, 9, blocks=(3 - i % 4, 10), block_tokens=BLOCK) for i in range(8)]
    return [first, second, third]


def on_the_engine(engine: Engine, policy: LongestPrefix, played: Sequence[Sequence[TraceRequest]]) -> None:
    """Costs of the KV cache are given, as this machine has none that are always the same."""
    engine._kv.finder.costs = lambda: KvCosts(prefill_token=1e6, save_byte=1e-3, restore_byte=1e-3, copy_byte=2e-3)  # type: ignore[method-assign]
    engine.call(lambda: engine._policy.change(policy, policy.name, own_thread=False)).result()
    prompts, numbers = Prompts(range(256), 0), itertools.count()
    for wave in played:
        requests = []
        for one in wave:
            index = next(numbers)
            requests.append(request(f"r{index}", prompts.make(index, one), one.output_tokens))
        answers = ask(engine, *requests)
        assert len(answers) == len(wave)
    assert engine.planning.snapshot()["fallback"] is None


def in_the_simulator(policy: LongestPrefix, played: Sequence[Sequence[TraceRequest]], **config: Any) -> None:
    # Nothing takes time but prompts and KV, in the proportions above.
    costs = CostModel(
        decode=Grid([1], [0], [[1e4]]),
        prefill=Grid([1, 64], [0], [[1e6], [64e6]]),
        save_token_ns=256,
        restore_token_ns=256,
    )
    simulate(Workload(tuple(one for wave in played for one in wave)), policy, costs, SimConfig(**config))


@pytest.mark.parametrize("make", [LongestPrefix, Turns])
@pytest.mark.parametrize(
    "sizes", [{"parallel": 3}, {"parallel": 2, "kv_host_bytes": 0}, {"parallel": 4, "kv_tokens": 450}]
)
def test_the_same_numbers_and_decisions(
    make_engine: Callable[..., Engine], make: type[LongestPrefix], sizes: dict[str, Any]
) -> None:
    played = waves()
    engine = make_engine(ctx_size=512, batch_size=64, max_queue=64, **sizes)
    real, twin = make(prefill_budget=64), make(prefill_budget=64)
    on_the_engine(engine, real, played)
    in_the_simulator(
        twin, played, n_slots=sizes["parallel"], n_ctx=512, n_batch=64, kv_tokens=sizes.get("kv_tokens", 0),
        host_tokens=1 << 20 if sizes.get("kv_host_bytes", 1) else 0,
    )  # fmt: skip
    assert real.seen == twin.seen
    waiting = [view for views, _, _ in real.seen for view in views if view[1] is SeqState.WAITING]
    assert any(view[4] for view in waiting), "prefixes are seen before they are used"
    if make is Turns:
        assert any(view[-1] for views, _, _ in real.seen for view in views), "somebody lost its slot"
