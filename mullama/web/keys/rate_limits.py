"""How much a key may ask for: requests and tokens a minute, requests at once. On the event loop.

A limit a minute is a bucket that fills at its rate up to a minute's worth. Tokens are prompt and completion: a request
takes what it may need when it is admitted, and in the end gets back what it did not use, or owes what it used more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from mullama.errors import InvalidRequest, RateLimited

MINUTE = 60.0


class Bucket:
    """``capacity`` 0: there is no limit."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.capacity = 0
        self._level = 0.0
        self._at = clock()

    def resize(self, capacity: int) -> None:
        """Another limit; what was used of the old one stays used."""
        used = self.capacity - self.level
        self.capacity, self._level = capacity, capacity - used

    @property
    def level(self) -> float:
        """What may be taken now; below 0: what is owed."""
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.capacity / MINUTE)
        self._at = now
        return self._level

    def seconds_until(self, amount: float) -> float:
        """Until so much may be taken; it must not be more than the capacity."""
        return max(amount - self.level, 0.0) * MINUTE / self.capacity

    def take(self, amount: float) -> None:
        """A negative amount is given back."""
        self._level = min(self.capacity, self.level - amount)


class Usage:
    """What a key has used, whatever becomes of its limits meanwhile. Raises RateLimited."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests = Bucket(clock)
        self.tokens = Bucket(clock)
        self.most_open = 0  # 0: no limit
        self.n_open = 0

    def limit(self, requests: int, tokens: int, most_open: int) -> None:
        self.requests.resize(requests)
        self.tokens.resize(tokens)
        self.most_open = most_open

    def admit(self) -> Permit:
        """The right to a request; ``release`` gives it back."""
        if self.most_open and self.n_open >= self.most_open:
            raise RateLimited(f"this key may have {self.most_open} requests at once, and has them", retry_after=1)
        if self.tokens.capacity:
            _check(self.tokens, 0, "tokens")
        if self.requests.capacity:
            _check(self.requests, 1, "requests")
            self.requests.take(1)
        self.n_open += 1
        return Permit(self)

    def headers(self) -> Iterator[tuple[str, str]]:
        """As OpenAI's clients read them."""
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket.capacity:
                yield f"x-ratelimit-limit-{name}", str(bucket.capacity)
                yield f"x-ratelimit-remaining-{name}", str(max(math.floor(bucket.level), 0))
                yield f"x-ratelimit-reset-{name}", duration(bucket.seconds_until(bucket.capacity))


class Permit:
    """One request of a key."""

    def __init__(self, usage: Usage) -> None:
        self.usage = usage
        self._is_open = True

    def reserve(self, prompt: int, completion: int) -> Reservation:
        """Take the tokens that a request may need: at most a minute's, the rest is owed if it comes to that.

        Raises RateLimited where they are not there, InvalidRequest for a prompt that has more than there ever will be.
        """
        bucket, amount = self.usage.tokens, 0
        if bucket.capacity:
            if prompt > bucket.capacity:
                raise InvalidRequest(
                    f"the prompt has {prompt} tokens, and this key may use {bucket.capacity} a minute, prompt and "
                    "completion together"
                )
            amount = min(prompt + completion, bucket.capacity)
            _check(bucket, amount, "tokens")
            bucket.take(amount)
        return Reservation(bucket, amount)

    def release(self) -> None:
        """Idempotent."""
        if self._is_open:
            self._is_open = False
            self.usage.n_open -= 1


class Reservation:
    """Tokens that were taken for a request that has not ended."""

    def __init__(self, bucket: Bucket, amount: int) -> None:
        self._bucket = bucket
        self._amount: int | None = amount

    def settle(self, used: int) -> None:
        """It has ended, and used so many. Only the first time counts."""
        if self._amount is not None and self._bucket.capacity:
            self._bucket.take(used - self._amount)
        self._amount = None


def _check(bucket: Bucket, amount: float, what: str) -> None:
    if bucket.level < amount:
        seconds = bucket.seconds_until(amount)
        raise RateLimited(
            f"this key may use {bucket.capacity} {what} a minute; {amount:g} more are there in {duration(seconds)}"
            if amount
            else f"this key may use {bucket.capacity} {what} a minute, and has used more; come back in "
            f"{duration(seconds)}",
            retry_after=math.ceil(seconds),
        )


def duration(seconds: float) -> str:
    """As OpenAI's headers have it: 120ms, 6s, 1m30s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60}s"
