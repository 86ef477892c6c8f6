"""Answers that are kept for a while: bounded in number, bytes and time, each to be seen by the tenant who asked.

Event loop only. What must go is the oldest of the tenant who has the most, so that nobody pushes others' answers out.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from mullama.errors import ResponseNotFound
from mullama.web.responses.response_bodies import Item
from mullama.web.stream.generations import Group

MAX_RESPONSES = 10_000
#: What an entry takes beside its texts, about.
OVERHEAD = 500


@dataclass(slots=True, eq=False)
class Stored:
    """A response: ``data`` is its JSON, ``items`` that of its input, without the input of those before it."""

    id: str
    tenant: str | None
    previous: str | None
    items: bytes
    data: bytes
    status: str
    group: Group | None = None  # of one that runs in the background
    is_cancelled: bool = False
    expires: float = 0.0
    n_counted: int = 0  # bytes, as the store counted it

    @property
    def n_bytes(self) -> int:
        return len(self.items) + len(self.data) + OVERHEAD


class _Outputs(msgspec.Struct):
    output: list[Item]


_items = msgspec.json.Decoder(list[Item])
_outputs = msgspec.json.Decoder(_Outputs)


class ResponseStore:
    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``ttl_s``: seconds that an answer is kept; < 0: as long as there is room."""
        self.max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._of: dict[str | None, OrderedDict[str, Stored]] = {}  # by tenant, the longest unused first
        self._n_bytes: dict[str | None, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    @property
    def n_bytes(self) -> int:
        return sum(self._n_bytes.values())

    def put(self, one: Stored) -> None:
        """Keep it; the same one again after a change. One that is larger than the whole store is not kept."""
        if one.tenant in self._of and (old := self._of[one.tenant].get(one.id)) is not None:
            self._take_out(old)
        if one.n_bytes > self.max_bytes:
            return
        one.expires = self._clock() + self._ttl_s if self._ttl_s >= 0 else float("inf")
        self._of.setdefault(one.tenant, OrderedDict())[one.id] = one
        one.n_counted = one.n_bytes
        self._n_bytes[one.tenant] = self._n_bytes.get(one.tenant, 0) + one.n_counted
        while self.n_bytes > self.max_bytes or len(self) > MAX_RESPONSES:
            most = max(self._n_bytes, key=self._n_bytes.__getitem__)
            mine = self._of[most]
            idle = (old for old in mine.values() if old.group is None and old is not one)
            self._take_out(next(idle, next(iter(mine.values()))))

    def get(self, response_id: str, tenant: str | None, *, param: str = "id") -> Stored:
        """Raises ResponseNotFound, also for another tenant's."""
        mine = self._of.get(tenant)
        one = mine.get(response_id) if mine is not None else None
        if one is not None and one.group is None and one.expires <= self._clock():
            self._take_out(one)
            one = None
        if one is None or mine is None:
            raise ResponseNotFound(f"{param}: no response '{response_id[:80]}' is stored (any more)", param=param)
        mine.move_to_end(response_id)
        return one

    def delete(self, response_id: str, tenant: str | None) -> None:
        """Forget it; one that runs is cancelled. Raises ResponseNotFound."""
        one = self.get(response_id, tenant)
        cancel(one)
        self._take_out(one)

    def chain(self, response_id: str, tenant: str | None) -> list[Stored]:
        """The responses that led to this one, the first first. Raises ResponseNotFound where one is gone."""
        found: list[Stored] = []
        at: str | None = response_id
        while at is not None:
            found.append(self.get(at, tenant, param="previous_response_id"))
            at = found[-1].previous
        return found[::-1]

    def is_kept(self, one: Stored) -> bool:
        return one.tenant in self._of and self._of[one.tenant].get(one.id) is one

    def _take_out(self, one: Stored) -> None:
        if self.is_kept(one):
            del self._of[one.tenant][one.id]
            self._n_bytes[one.tenant] -= one.n_counted
            if not self._of[one.tenant]:
                del self._of[one.tenant], self._n_bytes[one.tenant]


def history(chain: list[Stored]) -> list[Item]:
    """The items of a chain, what was asked and what was answered in turns. Any thread."""
    return [item for one in chain for item in (*_items.decode(one.items), *_outputs.decode(one.data).output)]


def cancel(one: Stored) -> None:
    if one.group is not None:
        one.is_cancelled = True
        one.group.cancel()
