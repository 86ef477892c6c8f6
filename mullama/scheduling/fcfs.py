"""First come, first served."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from mullama.scheduling.base import EngineState, SeqView
from mullama.scheduling.batching import PREEMPTED, WAITING, Batching


class Fcfs(Batching):
    """First come, first served, with continuous batching and chunked prefill.

    Preempted sequences come before waiting ones: they were served before.
    """

    name: ClassVar[str] = "fcfs"
    SOURCE: ClassVar[str] = (
        "continuous batching: Yu et al., Orca, OSDI 2022; chunked prefill beside decodes: Agrawal et al., "
        "Sarathi-Serve, OSDI 2024"
    )

    def order(self, todo: list[SeqView], running: list[SeqView], state: EngineState) -> Iterable[SeqView]:
        for seq in todo:
            if seq.state is PREEMPTED:
                break
        else:
            return todo
        return [s for s in todo if s.state is not WAITING] + [s for s in todo if s.state is WAITING]
