"""Sequences that leave one engine and go on in another, whose model may speak another vocabulary. None is dropped.

On the old engine's thread ``depart`` takes them out of their slots, text and sampler and all; on the new one's
``arrive`` puts them in the queue, where they are computed again. What the new model's context does not hold stays
with the old engine to its end.
"""

from __future__ import annotations

import codecs
import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mullama.engine.client import Speaker
from mullama.engine.requests.reader import Reader, Reading
from mullama.engine.requests.sequences import LiveSequence, Sequences
from mullama.errors import MullamaError
from mullama.kv.index.tree import pack
from mullama.types import Finish, FinishReason, Preempt, Profile, Request, SeqState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mullama._core import Core, Parked

log = logging.getLogger("mullama.engine")


@dataclass(slots=True)
class Traveller:
    """A request between two engines, with what it was when it left."""

    seq: LiveSequence
    reading: Reading
    parked: Parked | None  # None: it never had a slot
    prompt: Sequence[int]  # in the new model's vocabulary
    tokens: list[int] | None  # prompt and answer so far in it; None: as they were


def depart(
    core: Core, seqs: Sequences, reader: Reader, speaker: Speaker, n_ctx: int, *, same_vocab: bool
) -> list[Traveller]:
    """Take out every sequence that can go on in ``n_ctx`` tokens, in order of arrival. On the thread of the old engine.

    One with LoRA adapters stays: the other engine does not have them.
    """
    travellers = []
    for handle, seq in list(seqs.live.items()):
        if seq.adapters:
            continue
        try:
            translated = _translate(core, seq, speaker, same_vocab)
        except MullamaError as error:
            log.warning("a request stays with the old model: %s", error.message)
            continue
        if translated.n >= n_ctx - 1:
            continue
        if seq.slot >= 0:
            seqs.preempt(handle, Preempt.RECOMPUTE, insist=True)
        parked = seq.parked
        if parked is not None:
            core.drop_saved(parked)
        reading = reader.release(handle)
        if reading is None:
            continue  # it was cancelled, or its last record is on the way
        if parked is not None:
            core.let_go(parked)
        seqs.remove(handle)
        travellers.append(Traveller(seq, reading, parked, translated.prompt, translated.tokens))
    return travellers


class Translated(NamedTuple):
    """A sequence in the new model's vocabulary."""

    prompt: Sequence[int]
    tokens: list[int] | None  # prompt and answer so far; None: as they were
    n: int  # tokens in all


def _translate(core: Core, seq: LiveSequence, speaker: Speaker, same_vocab: bool) -> Translated:
    request = seq.request
    if seq.slot >= 0:
        known = core.slot_info(seq.slot)[3]
    else:
        known = seq.parked.tokens() if seq.parked is not None else list(request.prompt)
    if same_vocab:
        return Translated(request.prompt, None, len(known))
    if request.translate is not None:
        prompt = request.translate(speaker)
    else:
        text = core.model.detokenize(request.prompt, special=True)
        prompt = speaker.tokenize(text, add_special=True, parse_special=True)
    # A character that has only begun waits in the slot for its other bytes: the new model goes on behind the first.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    answer = decoder.decode(core.model.detokenize_bytes(known[len(request.prompt) :]))
    begun = decoder.getstate()[0]
    spoken = speaker.tokenize(answer, add_special=False, parse_special=False)
    tokens = [*prompt, *spoken, *speaker.bytes_alone(begun)]
    return Translated(prompt, tokens, len(tokens))


def arrive(
    travellers: list[Traveller], core: Core, seqs: Sequences, reader: Reader, next_handle: Callable[[], int],
    cancel: Callable[[int], None], weights: str, arrived: Callable[[LiveSequence], None],
) -> None:  # fmt: skip
    """Queue them, in their order. On the thread of the engine they come to."""
    for one in travellers:
        handle = next_handle()
        seq = _renewed(one, handle)
        reader.adopt(handle, one.reading)
        try:
            if one.parked is not None:
                tokens = one.tokens
                sampling = seq.request.sampling if tokens is not None else None
                core.take_in(one.parked, handle, tokens, sampling, n_prompt=len(one.prompt))
                seq.view.prefill_left = one.parked.left()
                reader.note_weights(handle, weights, seq.view.generated)
        except MullamaError as error:
            reader.end_directly(handle, Finish(FinishReason.ERROR, Profile(), error=error))
            continue
        seqs.add(seq)
        arrived(seq)
        one.reading.generation.belongs_to(handle, cancel)


def _renewed(one: Traveller, handle: int) -> LiveSequence:
    """The sequence as the new engine knows it."""
    old = one.seq
    request: Request = dataclasses.replace(old.request, prompt=one.prompt)
    state = SeqState.WAITING if one.parked is None else SeqState.PREEMPTED
    n = len(one.prompt)
    view = dataclasses.replace(old.view, id=handle, state=state, prompt_tokens=n, prefill_left=n, cells=0)
    if state is SeqState.WAITING:
        view.cached_tokens = 0  # what the other engine expected
    return LiveSequence(
        view,
        request,
        parked=one.parked,
        spent_ns=old.spent_ns,
        first_token_ns=old.first_token_ns,
        key=pack(one.prompt),
        namespace=old.namespace,
    )
