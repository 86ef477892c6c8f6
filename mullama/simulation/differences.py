"""Two plans for the same moment: in what do they differ, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mullama.scheduling import Plan, SeqView
from mullama.types import SeqState

SHOWN = 6  # sequences that a sentence names


def differences(acted: Plan, other: Plan, views: Mapping[int, SeqView]) -> list[tuple[str, str]]:
    """(kind, sentence) for each way in which ``other`` decides differently; kinds: preempt, admit, decode, chunk.

    Sequences that ``views`` does not know (they ended meanwhile) are not compared, nor how often a plan is repeated.
    """
    preempted = acted.preempt.keys() | other.preempt.keys()
    found = {
        "preempt": _preemption(_known(acted.preempt, views), _known(other.preempt, views)),
        "admit": _admission(_queued(acted, views), _queued(other, views)),
        "decode": _taking_part(acted, other, views, SeqState.DECODE, preempted),
        "chunk": [
            *_taking_part(acted, other, views, SeqState.PREFILL, preempted),
            *_sizes(_known(acted.tokens, views), _known(other.tokens, views)),
        ],
    }
    return [(kind, f"would {'; '.join(parts)}") for kind, parts in found.items() if parts]


def _known(by_id: Mapping[int, object], views: Mapping[int, SeqView]) -> dict[int, str]:
    return {seq_id: str(value) for seq_id, value in by_id.items() if seq_id in views}


def _queued(plan: Plan, views: Mapping[int, SeqView]) -> list[int]:
    """Who is admitted, in order."""
    return [seq_id for seq_id in plan.tokens if seq_id in views and views[seq_id].is_queued]


def _preemption(ours: Mapping[int, str], theirs: Mapping[int, str]) -> list[str]:
    parts = []
    if more := theirs.keys() - ours.keys():
        parts.append(f"preempt {_ids(sorted(more))}")
    if fewer := ours.keys() - theirs.keys():
        parts.append(f"not preempt {_ids(sorted(fewer))}")
    if otherwise := [
        f"{i} by {theirs[i]}, not {ours[i]}" for i in sorted(ours.keys() & theirs) if ours[i] != theirs[i]
    ]:
        parts.append(f"preempt {_ids(otherwise)}")
    return parts


def _admission(ours: list[int], theirs: list[int]) -> list[str]:
    if ours == theirs:
        return []
    if not theirs:
        return [f"admit nobody, not {_ids(ours)}"]
    if not ours:
        return [f"admit {_ids(theirs)}"]
    return [f"admit {_ids(theirs)}, not {_ids(ours)}" + (", in this order" if set(ours) == set(theirs) else "")]


def _taking_part(
    acted: Plan, other: Plan, views: Mapping[int, SeqView], state: SeqState, preempted: Iterable[int]
) -> list[str]:
    """Of those in ``state``, who computes in one plan only; preemptions are named elsewhere."""
    ours, theirs = ({i for i in plan.tokens if i in views and views[i].state is state} for plan in (acted, other))
    parts = []
    if more := theirs - ours - set(preempted):
        parts.append(f"let {_ids(sorted(more))} {_VERB[state]}")
    if fewer := ours - theirs - set(preempted):
        parts.append(f"not let {_ids(sorted(fewer))} {_VERB[state]}")
    return parts


_VERB = {SeqState.DECODE: "decode", SeqState.PREFILL: "go on with the prompt"}


def _sizes(ours: Mapping[int, str], theirs: Mapping[int, str]) -> list[str]:
    sizes = [f"{theirs[i]} tokens of {i}, not {ours[i]}" for i in sorted(ours.keys() & theirs) if ours[i] != theirs[i]]
    return [f"compute {_ids(sizes)}"] if sizes else []


def _ids(which: Iterable[object]) -> str:
    parts = [str(one) for one in which]
    return ", ".join(parts if len(parts) <= SHOWN else [*parts[:SHOWN], f"{len(parts) - SHOWN} more"])
