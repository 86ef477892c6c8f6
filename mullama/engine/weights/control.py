"""The part of an engine that changes its weights, frees them for a while, lays adapters on them, and hands over."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mullama.engine.requests import handover
from mullama.engine.weights import comparing
from mullama.engine.weights import load as loading
from mullama.engine.weights.change import Host, SwapReport
from mullama.errors import EngineDead, InvalidRequest, ModelBusy, ModelLoadError, NeedsAnotherEngine, ShuttingDown
from mullama.machine.ways import words_of
from mullama.types import Finish, FinishReason, GapMode, KvMode, ModelInfo, Profile, Room, SleepLevel

if TYPE_CHECKING:
    from mullama._core import Core, Model
    from mullama.config import ServeConfig
    from mullama.engine.engine import Engine
    from mullama.engine.planning.policy_host import PolicyHost
    from mullama.engine.requests.reader import Reader
    from mullama.engine.requests.sequences import Sequences
    from mullama.engine.weights.change import Weights
    from mullama.engine.weights.loras import Adapters
    from mullama.engine.weights.sleeping import Sleep, SleepReport

T = TypeVar("T")
Choice = TypeVar("Choice", KvMode, GapMode, SleepLevel)


class WeightMethods:
    """Mixed into Engine. What blocks is not for an event loop's thread."""

    config: ServeConfig
    info: ModelInfo
    model: Model
    _adapters: Adapters
    _closed: bool
    _core: Core
    _handles: itertools.count[int]
    _napping: Sleep
    _policy: PolicyHost
    _reader: Reader
    _seqs: Sequences
    _stopping: bool
    _takes_none: bool
    _wait: threading.Condition
    _weights: Weights

    def call(self, function: Callable[[], T]) -> Future[T]:
        raise NotImplementedError

    def _check_alive(self) -> None:
        raise NotImplementedError

    def _request_cancel(self, handle: int) -> None:
        raise NotImplementedError

    def _n_waiting(self) -> int:
        raise NotImplementedError

    def swap_weights(
        self,
        path: str | Path,
        *,
        label: str = "",
        kv: KvMode | str = KvMode.AUTO,
        gap: GapMode | str = GapMode.AUTO,
        room: Room | None = None,
        kl: bool = False,
        progress: Callable[[float], bool | None] | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> SwapReport:
        """Go on with the weights of another file; no request is dropped. Blocks until the old ones are freed.

        ``label`` names the new weights in profiles (default: the file's stem). ``kv``: ``carry`` the KV cache over (two
        quantisations of one model), ``recompute`` it, or ``auto``. Where memory, or the ``room`` of a budget, does not
        hold both, the old ones are freed first and everything pauses (``gap``: ``auto``), or it is refused (``never``).
        ``kl``: the report says how far the new weights are from the old ones, which takes some seconds more.
        Not for an event loop's thread. Raises InvalidRequest, ModelLoadError (MemoryTooSmall), ModelBusy where a LoRA
        adapter does not fit, or NeedsAnotherEngine for a model of another shape or vocabulary: then the old weights
        stay in charge. EngineDead: after a gap neither could be loaded.
        """
        mode = _choice(KvMode, kv, "kv")
        gap_mode = _choice(GapMode, gap, "gap")
        if mode is KvMode.DRAIN:
            raise NeedsAnotherEngine("to drain, a second engine has to take over", param="kv")
        self._check_alive()
        label = label or Path(path).stem
        try:
            return self._weights.swap(
                path,
                label,
                mode,
                self._host(progress, on_phase),
                gap=gap_mode,
                room=room,
                kl=kl,
            )
        except ModelLoadError:
            if self._closed:  # the old model was closed under the comparison
                raise ShuttingDown(f"'{self.info.name}' was closed meanwhile") from None
            raise

    def sleep(self, level: SleepLevel | str = SleepLevel.HOST) -> SleepReport:
        """Free weights and context until ``wake``; cached KV waits in host memory or on disk. Blocks.

        Not for an event loop's thread. Requests must not come before ``wake``, and what looks at cells raises.
        Raises ModelBusy while anything runs or the weights are changed, InvalidRequest without a disk tier.
        """
        self._check_alive()
        level = _choice(SleepLevel, level, "level")
        self.call(self._take_none).result()
        try:
            return self._napping.fall(level, self._host())
        finally:
            self._take_again()

    def _take_none(self) -> None:
        """No request is taken from here on: it would meet an engine without a context. Engine thread."""
        with self._wait:
            if self._n_waiting() or self._seqs:
                raise ModelBusy("the model computes now; only an idle one can sleep")
            self._takes_none = True

    def wake(self) -> float:
        """Load the weights again; ms it took. Blocks. Raises ModelLoadError: then it is still asleep."""
        self._check_alive()
        if not self._napping.is_asleep:
            return 0.0  # also while it falls asleep: who asked for that has not been answered yet
        try:
            return self._napping.wake(self._host())
        finally:
            self._take_again()

    def _take_again(self) -> None:
        """Requests are taken again, unless it sleeps."""
        with self._wait:
            self._takes_none = self._napping.is_asleep

    def _host(
        self,
        progress: Callable[[float], bool | None] | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> Host:
        return Host(
            self.call, self._weights_changed, self._speak, lambda: self._stopping, progress=progress, on_phase=on_phase
        )

    def _speak(self, model: Model) -> None:
        """Tokenise and render by this model from now on."""
        self.model = model

    def _weights_changed(self, model: Model, label: str, with_kv: bool) -> None:
        """The new weights are in charge. Engine thread."""
        self.model = model
        self._seqs.set_weights(label, with_kv=with_kv)
        new = loading.info_of(model, self._core, self.info.name, label)
        self.info = dataclasses.replace(
            new, n_ctx=self.info.n_ctx, n_parallel=self.info.n_parallel, can_shift=self.info.can_shift
        )
        self._reader.kernels = words_of(new.kernels)

    def adapters(self) -> list[dict[str, Any]]:
        """The LoRA adapters that requests may name (see EngineClient)."""
        return [one.to_dict() for one in self._adapters.all()]

    def load_adapter(self, path: str | Path, id: str | None = None, scale: float = 1.0) -> dict[str, Any]:  # noqa: A002
        """Load a LoRA adapter beside the weights (see EngineClient)."""
        self._check_alive()
        return self._adapters.load(path, id, scale).to_dict()

    def unload_adapter(self, id: str) -> None:  # noqa: A002
        """Free a LoRA adapter that no request uses (see EngineClient)."""
        self._adapters.unload(id, self.call)

    def texts_for(self, other: Engine) -> comparing.Texts:
        """Tokens of what runs or is cached here, to ``compare`` another engine on. Blocks.

        Raises InvalidRequest where they would mean something else to its model.
        """
        if not self._same_vocab(other):
            raise comparing.not_comparable(other.info.weights)
        return self.call(lambda: comparing.texts_of(self._core)).result()

    def compare(self, other: Engine, texts: comparing.Texts) -> dict[str, Any]:
        """How far the other engine's model is from this one's: ``kl`` and ``kl_detail`` of a swap's report. Blocks."""
        found = comparing.try_to_compare(
            self.model,
            other.model,
            texts,
            self.config,
            carry=False,
            goes_on=lambda: not (self._stopping or other._stopping),
            locks=[self._weights.comparing, other._weights.comparing],
        )
        return comparing.in_report(found)

    def _same_vocab(self, other: Engine) -> bool:
        return self.info.n_vocab == other.info.n_vocab and self.model.vocab_digest() == other.model.vocab_digest()

    def hand_over(self, other: Engine) -> int:
        """Let another engine go on with what waits and runs here, from its tokens or its text; nothing is dropped.

        Returns how many requests went over; one that does not fit the other's context ends here. Blocks; not on the
        engine threads or an event loop. The caller sees that no new requests come here.
        """
        same = self._same_vocab(other)
        travellers = self.call(
            lambda: handover.leave(
                self._core, self._seqs, self._reader, other, other.info.n_ctx - 1, same_vocab=same
            )
        ).result()  # fmt: skip
        try:
            other.call(lambda: other._take_in(travellers)).result()
        except BaseException as error:
            for one in travellers:
                one.leaving.generation.end(Finish(FinishReason.ERROR, Profile(), error=EngineDead(str(error))))
            raise
        return len(travellers)

    def _take_in(self, travellers: list[handover.Traveller]) -> None:
        handover.arrive(
            travellers,
            self._core,
            self._seqs,
            self._reader,
            lambda: next(self._handles),
            self._request_cancel,
            self.info.weights,
            lambda seq: self._policy.arrived(seq.view),
        )


def _choice(kind: type[Choice], value: str, param: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise InvalidRequest(f"{param} must be one of {', '.join(kind)}, not '{value}'", param=param) from None
