"""What the parts of one engine share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mullama import abi
from mullama.config import ServeConfig
from mullama.types import ModelInfo

if TYPE_CHECKING:
    from mullama._core import Core, Model
    from mullama.engine.commands import Commands
    from mullama.engine.planning.policy_host import PolicyHost
    from mullama.engine.requests.reader import Reader
    from mullama.engine.requests.sequences import Sequences
    from mullama.engine.weights.in_charge import Weights
    from mullama.engine.weights.loras import Loras
    from mullama.kv.cache import KvCache


@dataclass(slots=True, eq=False)
class EngineParts:
    """``core``, ``kv``, ``seqs`` and ``policy`` belong to the engine thread: ``commands.call`` gets there.

    It knows nothing of the Engine that made it, so that nobody who holds on to a part keeps an engine alive.
    """

    core: Core
    kv: KvCache
    seqs: Sequences
    reader: Reader
    policy: PolicyHost
    weights: Weights
    loras: Loras
    commands: Commands
    page: abi.Reader
    config: ServeConfig
    model: Model  # tokenises and renders: the one in charge, or who stands in for it while it is away
    info: ModelInfo
    kv_tokens: int  # what all requests together may have in the KV cache
    token_bytes: int  # KV of one token
    tables_bytes: int = 0  # what loading took beside the buffers
    n_posted: int = 0  # submitted, not taken by the engine thread yet; under the lock
    takes_none: bool = False  # it sleeps, or falls asleep; under the lock

    @property
    def n_waiting(self) -> int:
        """Requests that have not started."""
        return self.n_posted + self.seqs.n_queued
