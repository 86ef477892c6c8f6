"""Shortest remaining first, by predicted length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from mullama.errors import PluginError
from mullama.plugins.parameters import Param
from mullama.scheduling.base import EngineState, Plan, SeqView
from mullama.scheduling.batching import COMMON, METHOD, PREEMPTED, PREFILL, Batching
from mullama.scheduling.predictors import create_predictor

#: A prompt token against a generated one, until the engine has measured both.
PREFILL_SHARE = 0.1
PREDICTOR = Param("predictor", "mean", "answer lengths: max_tokens, mean (per user), FILE.py:CLASS or module:CLASS")


class Srpt(Batching):
    """The request with the least work left first, by a predictor of answer lengths.

    Work left is what remains of the prompt and of the predicted answer, weighed by the engine's measured costs. One
    that has outlived its prediction is expected to go on for as long again. Short answers come fast, long ones may
    wait for as long as shorter ones keep coming.
    """

    name: ClassVar[str] = "srpt"
    SOURCE: ClassVar[str] = (
        "Schrage, A proof of the optimality of the shortest remaining processing time discipline, Operations "
        "Research, 1968; predicted lengths: Mitzenmacher, Scheduling with predictions and the price of "
        "misprediction, ITCS 2020"
    )
    PARAMS: ClassVar[tuple[Param, ...]] = (
        *COMMON,
        PREDICTOR,
        Param("preempt", False, "whether a running sequence may lose its slot to a queued one with less work left"),
        Param("preempt_ratio", 2.0, "how many times as much it must have left to lose it", minimum=1, maximum=1e6),
        METHOD,
    )

    predictor: str
    preempt: bool
    preempt_ratio: float

    def __init__(self, **params: Any) -> None:
        self._lengths: dict[int, float] = {}  # predicted tokens of each answer
        self._left: dict[int, float] = {}  # work, while a plan is made
        self._least = 0.0  # of it among the queued ones
        self._costs = (PREFILL_SHARE, 1.0, 0.0)  # of a prompt token, a generated one, one brought back from the host
        super().__init__(**{PREDICTOR.name: PREDICTOR.default, **params})

    def configure(self, **changes: Any) -> None:
        """As for any policy; another predictor is asked from the next request on."""
        spec = changes.get("predictor")
        made = create_predictor(spec) if isinstance(spec, str) else None
        super().configure(**changes)
        if made is not None:
            self._predictor = made

    def _configured(self) -> None:
        super()._configured()
        self.preempts = self.preempt

    def add(self, seq: SeqView) -> None:
        length = self._predictor.predict(seq)
        if not isinstance(length, (int, float)) or not 0 <= length < float("inf"):
            raise PluginError(f"the predictor '{self.predictor}' says {length!r}, a number of tokens is needed")
        self._lengths[seq.id] = length
        super().add(seq)

    def remove(self, seq_id: int) -> None:
        seq = self._seqs.get(seq_id)
        super().remove(seq_id)
        self._lengths.pop(seq_id, None)
        observe = getattr(self._predictor, "observe", None)
        if seq is not None and observe is not None:
            observe(seq)

    def plan(self, state: EngineState) -> Plan:
        costs = state.costs
        if costs.prefill_token_ns and costs.decode_step_ns:
            self._costs = (costs.prefill_token_ns, costs.decode_step_ns, costs.swap_token_ns)
        return super().plan(state)

    def order(self, todo: list[SeqView], running: list[SeqView], state: EngineState) -> Iterable[SeqView]:
        self._left = {}
        ranked = self._ranked(todo)
        ranked.sort()
        self._least = next((entry[0] for entry in ranked if entry[-1].state is not PREFILL), 0.0)
        return [entry[-1] for entry in ranked]

    def _ranked(self, seqs: list[SeqView]) -> list[tuple[float, int, int, SeqView]]:
        """Each with its work left, which is kept in ``_left``, in ns (in decode steps until costs are known)."""
        prefill, decode, swap = self._costs
        lengths, found = self._lengths, self._left
        ranked = []
        for seq in seqs:
            done, limit = seq.generated, seq.max_tokens - seq.generated
            left = lengths[seq.id] - done
            if left <= 0:
                left = done or 1
            work = (left if left < limit else limit) * decode + seq.prefill_left * prefill
            if seq.state is PREEMPTED:
                work += seq.cells * swap
            found[seq.id] = work
            ranked.append((work, seq.arrival_ns, seq.id, seq))
        return ranked

    def victims(self, running: list[SeqView], state: EngineState) -> list[SeqView]:
        limit = self._least * self.preempt_ratio  # PERF: nobody below it yields to anybody
        return [entry[-1] for entry in sorted([entry for entry in self._ranked(running) if entry[0] > limit])]

    def yields(self, victim: SeqView, seq: SeqView) -> bool:
        return self._left[seq.id] * self.preempt_ratio < self._left[victim.id]
