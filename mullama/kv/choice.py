"""Where a prompt's KV is taken from: the way that costs least, by what this process has measured. Sans-I/O."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

ESTIMATES = 64  # queued requests, in order of arrival, whose prompts are looked up in the KV cache before their turn
MIN_GAIN = 32  # tokens: it is not worth waiting for another request's prefix for less
LOSS_WEIGHT = 0.25  # a cached token that is lost without a tier to save it to, in tokens to compute


class KvSource(enum.StrEnum):
    """Where reused tokens came from; the numbers of abi.KV_SOURCES by position."""

    NONE = "none"
    IN_PLACE = "in_place"
    COPY = "copy"
    HOST = "host"
    DISK = "disk"

    @property
    def number(self) -> int:
        return list(KvSource).index(self)


@dataclass(slots=True, frozen=True)
class KvCosts:
    """In ns, measured. ``prefill_token`` is never 0: before anything is known a millisecond is assumed."""

    prefill_token: float = 1e6
    save_byte: float = 0.3
    restore_byte: float = 0.3
    copy_byte: float = 0.3  # 0 where slots can share cells
    disk_byte: float = 1.0


@dataclass(slots=True, frozen=True)
class SlotOffer:
    """A slot whose tokens begin like the prompt."""

    slot: int
    n_tokens: int  # that it can serve
    running: bool
    can_cut: bool  # in place: it can go on from there
    tail_unsaved: int  # tokens behind them that no tier holds: in place they have to be saved, or are lost
    can_copy: bool


@dataclass(slots=True, frozen=True)
class Choice:
    """Take ``n_slot`` tokens from ``slot`` (in place or by copy), then go on to ``n_tokens`` from the tiers."""

    source: KvSource
    n_tokens: int = 0
    slot: int = -1
    n_slot: int = 0
    cost_ns: float = 0.0


def choose(
    n_prompt: int,
    offers: Iterable[SlotOffer],
    n_stored: int,
    n_host: int,
    *,
    costs: KvCosts,
    token_bytes: int,
    can_extend: bool,
    tail_weight: float,
) -> Choice:
    """The cheapest way to the KV of ``n_prompt`` tokens (all that may be reused).

    ``n_stored`` tokens are in the tiers, ``n_host`` of them in host memory. ``can_extend``: stored rows can be put
    behind what a slot holds. ``tail_weight``: what a token of a lost tail counts, in tokens to compute.
    """

    def stored(start: int, end: int) -> float:
        n_disk = max(end - max(start, n_host), 0)
        return token_bytes * ((end - start) * costs.restore_byte + n_disk * costs.disk_byte)

    best = Choice(KvSource.NONE, cost_ns=n_prompt * costs.prefill_token)
    if n_stored > 0:
        cost = stored(0, n_stored) + (n_prompt - n_stored) * costs.prefill_token
        if cost < best.cost_ns:
            best = Choice(KvSource.DISK if n_stored > n_host else KvSource.HOST, n_stored, cost_ns=cost)
    for offer in offers:
        ways = []
        if offer.can_cut and not offer.running:
            tail = offer.tail_unsaved * tail_weight * costs.prefill_token
            ways.append((KvSource.IN_PLACE, tail))
        if offer.can_copy:
            ways.append((KvSource.COPY, offer.n_tokens * token_bytes * costs.copy_byte))
        for source, cost in ways:
            end = max(offer.n_tokens, n_stored) if can_extend else offer.n_tokens
            cost += (n_prompt - end) * costs.prefill_token
            if end > offer.n_tokens:
                cost += stored(offer.n_tokens, end)
            if cost < best.cost_ns:
                best = Choice(source, end, offer.slot, offer.n_tokens, cost)
    return best


def tail_weight(costs: KvCosts, token_bytes: int, *, has_host: bool) -> float:
    """What a token of a tail that makes room counts: saving it, or losing it."""
    return min(token_bytes * costs.save_byte / costs.prefill_token, LOSS_WEIGHT) if has_host else LOSS_WEIGHT


class SlotFill(NamedTuple):
    """A slot whose tokens begin like a prompt."""

    slot: int
    shared: int  # tokens of the prompt
    n_past: int  # tokens in its cells
    n_tokens: int  # tokens known of what it holds


class Foreseen(NamedTuple):
    """Tokens that a prompt could reuse now, and those that it could once the running prompt of ``slot`` got there."""

    now: int
    later: int = 0
    slot: int = -1  # -1: there is nothing worth waiting for


def foreseen(n_stored: int, fills: Iterable[SlotFill], limit: int) -> Foreseen:
    """What a prompt could reuse of its first ``limit`` tokens, of which ``n_stored`` are in the tiers."""
    now, later, whose = n_stored, 0, -1
    for slot, shared, n_past, n_tokens in fills:
        now = max(now, min(shared, n_past, limit))
        if n_past < n_tokens - 1 and shared > later:  # it is in its prompt
            later, whose = shared, slot
    return Foreseen(now, later, whose) if later >= now + MIN_GAIN else Foreseen(now)
