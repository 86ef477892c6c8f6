"""How evenly users were served while they competed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from mullama.workload.base import Outcome

PROMPT_WEIGHT = 1.0  # of a token in the service a user received, as in the virtual token counter of
OUTPUT_WEIGHT = 2.0  # Sheng et al., Fairness in Serving Large Language Models, OSDI 2024

Spans = list[tuple[float, float]]  # from, to; in seconds


def jain(values: Sequence[float]) -> float | None:
    """Jain's fairness index (Jain, Chiu, Hawe 1984): 1 when all are equal, 1/n when one has everything.

    None for fewer than two values, or when all are 0.
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if len(values) > 1 and squares > 0 else None


def fairness(outcomes: Iterable[Outcome]) -> float | None:
    """Jain's index of the rates at which users were served while they competed.

    A user's rate is the service it received (tokens, output ones weighing twice; a prompt counts when its first token
    comes) per second in which a request of its, and one of another user, had arrived and was not finished.
    """
    by_user: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.request.user is not None:
            by_user[outcome.request.user].append(outcome)
    busy = {user: _union((o.request.at_s, o.finished_s) for o in own) for user, own in by_user.items()}
    contended = _at_least_two(busy.values())
    rates = []
    for user, own in by_user.items():
        time_s = sum(end - start for start, end in _intersection(busy[user], contended))
        if time_s > 0:
            rates.append(sum(_service(outcome, contended) for outcome in own) / time_s)
    return jain(rates)


def _service(outcome: Outcome, when: Spans) -> float:
    """The service within ``when``, which is sorted and disjoint."""
    total, i = 0.0, 0
    for number, at_s in enumerate(outcome.token_s):
        while i < len(when) and when[i][1] < at_s:
            i += 1
        if i == len(when):
            break
        if when[i][0] <= at_s:
            total += OUTPUT_WEIGHT + (PROMPT_WEIGHT * outcome.request.prompt_tokens if number == 0 else 0.0)
    return total


def _union(spans: Iterable[tuple[float, float]]) -> Spans:
    """Sorted and disjoint."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def _at_least_two(many: Iterable[Spans]) -> Spans:
    """When two of them or more hold at once; each is sorted and disjoint."""
    edges = sorted(edge for spans in many for start, end in spans for edge in ((start, 1), (end, -1)))
    found: Spans = []
    depth, since = 0, 0.0
    for at_s, step in edges:
        if depth < 2 <= depth + step:
            since = at_s
        elif depth + step < 2 <= depth and at_s > since:
            found.append((since, at_s))
        depth += step
    return _union(found)


def _intersection(a: Spans, b: Spans) -> Spans:
    found: Spans = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found
