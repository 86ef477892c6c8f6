"""How far new weights are from the old ones, on what is being served: the ``kl`` of a swap's report.

Both models read the same tokens, and their distributions of the next one are compared at the last few: the mean
Kullback-Leibler divergence, in nats, of the new one from the old. It is worked out in contexts of its own, by a thread
of low priority, so that the streams go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mullama._core import Context, Core, Divergence, Model
from mullama.engine.background import in_background
from mullama.errors import InvalidRequest, MullamaError, ShuttingDown

if TYPE_CHECKING:
    from mullama.config import ServeConfig

log = logging.getLogger("mullama.engine")

SEQUENCES = 3  # texts that are compared, at most
WINDOW = 256  # tokens of each
TAIL = 24  # of them, at whose places the distributions are compared
BATCH = 64  # tokens of a decode, between two looks at whether to go on

RETAINED = 1  # of abi.SLOT_STATES

#: Where nothing is running or cached.
SAMPLE = (
    "A library in a small town had one reading room, and the person who looked after it knew every book by its place. "
    "When a visitor asked for a book on birds, she did not search the catalogue; she walked to the third shelf beside "
    "the window, took out two volumes, and told the visitor which one had the better drawings. One winter the town "
    "bought a computer, and for a week nobody could find anything."
)

Texts = list[list[int]]


@dataclass(slots=True, frozen=True)
class Compared:
    """Mean divergences in nats: ``carried`` on the KV of the old weights, ``recomputed`` on the new weights' own."""

    carried: float | None
    recomputed: float
    same_top: float  # share of the places where both would choose the same token, in the way that ``kl`` is of
    texts: int
    tokens: int  # places that were compared
    of: str  # requests (running or cached ones), or sample: nothing was
    ms: float

    @property
    def kl(self) -> float:
        return self.recomputed if self.carried is None else self.carried

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


def in_report(compared: Compared | None) -> dict[str, Any]:
    """What a swap's report says of it."""
    if compared is None:
        return {"kl": None, "kl_detail": None}
    return {"kl": round(compared.kl, 6), "kl_detail": compared.to_dict()}


def not_comparable(path: object) -> InvalidRequest:
    return InvalidRequest(
        f"kl: the vocabulary of {path} is another one, so the two models cannot be compared", param="kl"
    )


def texts_of(core: Core) -> Texts:
    """Tokens of the sequences in the slots, running ones first, no two alike. Engine thread."""
    found: Texts = []
    if core.is_vacant:
        return found
    slots = [core.slot_info(slot) for slot in range(core.n_slots)]
    for state, _, _, tokens, _ in sorted(slots, key=lambda info: (info[0] == RETAINED, -info[4])):
        if state and len(tokens) > TAIL + 1:
            text = window(tokens)
            if text not in found:
                found.append(text)
    return found[:SEQUENCES]


def window(tokens: Sequence[int]) -> list[int]:
    """As much as is compared: all, or the first token, which the others lean on, and the latest."""
    return list(tokens) if len(tokens) <= WINDOW else [tokens[0], *tokens[1 - WINDOW :]]


def compare(
    old: Model,
    new: Model,
    texts: Texts,
    config: ServeConfig,
    *,
    carry: bool,
    goes_on: Callable[[], bool],
    locks: Iterable[threading.Lock] = (),
) -> Compared:
    """Compare two models, also (``carry``) where the new one goes on from the KV of the old one. Blocks for seconds.

    Neither model may be closed meanwhile: who closes one makes ``goes_on`` false and then waits for its lock among
    ``locks``. Raises InvalidRequest when the vocabularies differ, ModelLoadError where there is no memory for two small
    contexts, ComputeFailed, ShuttingDown.
    """
    began = time.monotonic()

    def run() -> Compared:
        with ExitStack() as held:
            for lock in locks:
                held.enter_context(lock)
            if not goes_on():
                raise ShuttingDown("the models are closed now")
            chosen = texts or [window(old.tokenize(SAMPLE))]
            contexts = []
            for model in (old, new):
                contexts.append(_context(model, config))
                held.callback(contexts[-1].close)
            apart = Divergence(*contexts)
            recomputed = _mean(apart, chosen, False, goes_on)
            carried = _mean(apart, chosen, True, goes_on) if carry else None
            n, same = (carried or recomputed)[1:]
            return Compared(
                carried=None if carried is None else carried[0],
                recomputed=recomputed[0],
                same_top=same / n,
                texts=len(chosen),
                tokens=n,
                of="requests" if texts else "sample",
                ms=(time.monotonic() - began) * 1e3,
            )

    return in_background(run)


def try_to_compare(*args: Any, **kwargs: Any) -> Compared | None:
    """``compare``, after which the new weights are in charge whatever can be said of them: None where it fails."""
    try:
        return compare(*args, **kwargs)
    except Exception as error:
        is_told = isinstance(error, MullamaError)
        log.warning("the new weights could not be compared with the old ones: %s", error, exc_info=not is_told)
        return None


def _context(model: Model, config: ServeConfig) -> Context:
    return Context(
        model,
        n_slots=1,
        n_ctx=WINDOW,
        n_batch=BATCH,
        flash_attn=config.flash_attn,
        type_k=config.kv_type_k,
        type_v=config.kv_type_v,
        reference=config.deterministic,
    )


def _mean(apart: Divergence, texts: Texts, carry: bool, goes_on: Callable[[], bool]) -> tuple[float, int, int]:
    """The mean divergence, the places it is the mean of, and at how many both choose the same token."""
    values: list[float] = []
    n_same = 0
    for text in texts:
        found = apart.measure(text, min(TAIL, len(text) - 1), carry=carry, goes_on=goes_on)
        if found is None:
            raise ShuttingDown("the models are closed now")
        values += found[0]
        n_same += found[1]
    return sum(values) / len(values), len(values), n_same
