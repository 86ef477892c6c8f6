"""``engine.weights``: changes them, frees them for a while, lays LoRA adapters on them, and compares them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mullama.engine.background import in_background
from mullama.engine.client import WeightsClient
from mullama.engine.parts import EngineParts
from mullama.engine.weights import comparing
from mullama.engine.weights.change import SwapReport
from mullama.engine.weights.change_beside import ChangeBeside
from mullama.engine.weights.change_with_gap import ChangeWithGap, gap_for
from mullama.engine.weights.sleeping import Sleep, SleepReport
from mullama.engine.weights.soundness import check_shape
from mullama.errors import InvalidRequest, ModelLoadError, NeedsAnotherEngine, ShuttingDown
from mullama.types import GapMode, KvMode, MemoryLeft, SleepLevel

Choice = TypeVar("Choice", KvMode, GapMode, SleepLevel)


class WeightControl(WeightsClient):
    """What blocks is not for an event loop's thread. WeightsClient says more of what is not explained here."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._sleep = Sleep(parts)

    def swap(
        self,
        path: str | Path,
        *,
        label: str = "",
        kv: KvMode | str = KvMode.AUTO,
        gap: GapMode | str = GapMode.AUTO,
        memory_left: MemoryLeft | None = None,
        kl: bool = False,
        progress: Callable[[float], bool | None] | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> SwapReport:
        """Go on with the weights of another file; no request is dropped. Blocks until the old ones are freed.

        ``label`` names the new weights in profiles (default: the file's stem). ``kv``: ``carry`` the KV cache over (two
        quantisations of one model), ``recompute`` it, or ``auto``. Where memory, or what a budget has left
        (``memory_left``), does not hold both, the old ones are freed first and everything pauses (``gap``: ``auto``),
        or it is refused (``never``).
        ``kl``: the report says how far the new weights are from the old ones, which takes some seconds more.
        Not for an event loop's thread. Raises InvalidRequest, ModelLoadError (MemoryTooSmall), ModelBusy where a LoRA
        adapter does not fit, or NeedsAnotherEngine for a model of another shape or vocabulary: then the old weights
        stay in charge. EngineDead: after a gap neither could be loaded.
        """
        mode = _choice(KvMode, kv, "kv")
        gap_mode = _choice(GapMode, gap, "gap")
        if mode is KvMode.DRAIN:
            raise NeedsAnotherEngine("to drain, a second engine has to take over", param="kv")
        parts = self._parts
        parts.commands.check_alive()
        label = label or Path(path).stem
        try:
            with parts.weights.held():
                check_shape(parts.core.model, path, mode, kl)
                with_gap = gap_for(parts, path, mode, gap_mode, memory_left)
                if with_gap is None:
                    change = ChangeBeside(parts, path, label, mode, progress, on_phase, kl=kl)
                    return in_background(change.run)
                if kl:
                    raise InvalidRequest(
                        "kl: memory does not hold both weights, so they cannot be compared", param="kl"
                    )
                return ChangeWithGap(parts, path, label, with_gap, progress, on_phase).run()
        except ModelLoadError:
            if parts.commands.closed:  # the old model was closed under the comparison
                raise ShuttingDown(f"'{parts.info.name}' was closed meanwhile") from None
            raise

    def sleep(self, level: SleepLevel | str = SleepLevel.HOST) -> SleepReport:
        """Free weights and context until ``wake``; cached KV waits in host memory or on disk. Blocks.

        Not for an event loop's thread. Requests must not come before ``wake``, and what looks at cells raises.
        Raises ModelBusy while anything runs or the weights are changed, InvalidRequest without a disk tier.
        """
        self._parts.commands.check_alive()
        return self._sleep.fall(_choice(SleepLevel, level, "level"))

    def wake(self) -> float:
        """Load the weights again; ms it took. Blocks. Raises ModelLoadError: then it is still asleep."""
        self._parts.commands.check_alive()
        return self._sleep.wake()

    # -- LoRA adapters --------------------------------------------------------------------------------------------

    def loras(self) -> list[dict[str, Any]]:
        return [one.to_dict() for one in self._parts.loras.all()]

    def load_lora(self, path: str | Path, id: str | None = None, scale: float = 1.0) -> dict[str, Any]:  # noqa: A002
        self._parts.commands.check_alive()
        return self._parts.loras.load(path, id, scale).to_dict()

    def unload_lora(self, id: str) -> None:  # noqa: A002
        self._parts.loras.unload(id, self._parts.commands.call)

    # -- beside another engine -------------------------------------------------------------------------------------

    def is_same_vocab(self, other: WeightControl) -> bool:
        """Whether tokens mean the same to the other engine's model."""
        ours, others = self._parts, other._parts
        return ours.info.n_vocab == others.info.n_vocab and ours.model.vocab_digest() == others.model.vocab_digest()

    def texts_for(self, other: WeightControl) -> comparing.Texts:
        """Tokens of what runs or is cached here, to ``compare`` another engine's weights on. Blocks.

        Raises InvalidRequest where they would mean something else to its model.
        """
        if not self.is_same_vocab(other):
            raise comparing.not_comparable(other._parts.info.weights)
        return self._parts.commands.call(lambda: comparing.texts_of(self._parts.core)).result()

    def compare(self, other: WeightControl, texts: comparing.Texts) -> dict[str, Any]:
        """How far the other engine's model is from this one's: ``kl`` and ``kl_detail`` of a swap's report. Blocks."""
        both = self._parts, other._parts
        found = comparing.try_to_compare(
            self._parts.model,
            other._parts.model,
            texts,
            self._parts.config,
            carry=False,
            goes_on=lambda: not any(parts.commands.stopping for parts in both),
            locks=[parts.weights.comparing for parts in both],
        )
        return comparing.in_report(found)


def _choice(kind: type[Choice], value: str, param: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise InvalidRequest(f"{param} must be one of {', '.join(kind)}, not '{value}'", param=param) from None
