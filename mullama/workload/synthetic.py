"""Seeded synthetic workloads: Poisson and bursty arrivals, two classes, closed-loop clients.

Arrival times and lengths come from generators of their own for each user, seeded by the seed and the user's name: a
tenant's requests are the same whether or not another tenant is there, and other lengths leave the arrivals alone.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator

from mullama.errors import ConfigError
from mullama.workload.base import Client, TraceRequest, Workload
from mullama.workload.grammar import MAX_REQUESTS, MAX_SECONDS, Options

_COMMON = ("n", "seconds", "prompt", "out", "users", "priority", "slo_ms")
_URGENT = ("every", "urgent_prompt", "urgent_out", "urgent_priority", "urgent_slo_ms")
_PRIORITIES = (-(1 << 31), (1 << 31) - 1)
_REQUESTS_A_SECOND = 10  # of one closed-loop client, at most, where only the seconds are given

#: Makes the request that arrives at a time.
Make = Callable[[float], TraceRequest]


def poisson(text: str, seed: int) -> Workload:
    """Independent arrivals at a mean rate: exponential gaps."""
    options = Options("poisson", text, ("rate", *_COMMON))
    return Workload(requests=_open_loop(options, seed, cv=1.0, group="", priority=0))


def bursty(text: str, seed: int) -> Workload:
    """Gamma-distributed gaps with a coefficient of variation: 1 is Poisson, above it requests come in bursts."""
    options = Options("bursty", text, ("rate", "cv", *_COMMON))
    cv = options.number("cv", 3.0, 0.01, 30.0)
    return Workload(requests=_open_loop(options, seed, cv=cv, group="", priority=0))


def two_class(text: str, seed: int) -> Workload:
    """Bursty or Poisson batch requests, and urgent ones every now and then until the last of them has arrived."""
    options = Options("two-class", text, ("rate", "cv", *_COMMON, *_URGENT))
    cv = options.number("cv", 1.0, 0.01, 30.0)
    batch = _open_loop(options, seed, cv=cv, group="batch", priority=10)
    urgent = _urgent(options, seed, batch[-1].at_s if batch else 0.0)
    return Workload(requests=tuple(sorted([*batch, *urgent], key=lambda request: request.at_s)))


def closed(text: str, seed: int) -> Workload:
    """Clients that send their next request when the last one is answered, and urgent requests beside them."""
    options = Options("closed", text, ("clients", "think_s", *_COMMON, *_URGENT))
    options.exclude("clients", "users", "users says how many clients each of them has")
    many = options.pairs("users", 1, 4096, whole=True) or {"": float(options.whole("clients", 8, 1, 4096))}
    owners = [user for user, number in many.items() for _ in range(int(number))]
    seconds = options.maybe("seconds", 1e-3, MAX_SECONDS)
    if seconds is None and any(options.has(name) for name in _URGENT):
        raise ConfigError("closed: urgent requests need seconds=, which says for how long they come", param="seconds")
    guess = 200 if seconds is None else len(owners) * math.ceil(seconds * _REQUESTS_A_SECOND)
    n = options.whole("n", min(guess, MAX_REQUESTS), 1, MAX_REQUESTS)
    think_s = options.number("think_s", 0.0, 0.0, MAX_SECONDS)
    clients = []
    for number, owner in enumerate(owners):
        make = _maker(options, f"{seed}/{owner}/{number}/lengths", owner, "batch", 10)
        own = n // len(owners) + (number < n % len(owners))
        clients.append(Client(tuple(make(0.0) for _ in range(own)), think_s))
    urgent: list[TraceRequest] = []
    if seconds is not None and any(options.has(name) for name in _URGENT):
        urgent = _urgent(options, seed, seconds)
    return Workload(requests=tuple(urgent), clients=tuple(clients), stop_s=seconds)


def _maker(options: Options, seed: str, user: str, group: str, priority: int) -> Make:
    """Requests of one user of the main class; ``seed`` is of their lengths."""
    rng = random.Random(seed)
    prompt = options.lengths("prompt", "lognormal(median=128,sigma=0.6,max=1024)")
    out = options.lengths("out", "64")
    priority = options.whole("priority", priority, *_PRIORITIES)
    slo_ms = options.maybe("slo_ms", 1e-3, MAX_SECONDS)
    return lambda at_s: TraceRequest(
        at_s, prompt.tokens(rng), out.tokens(rng), priority=priority, user=user or group or None, slo_ms=slo_ms,
        group=group,
    )  # fmt: skip


def _open_loop(options: Options, seed: int, *, cv: float, group: str, priority: int) -> tuple[TraceRequest, ...]:
    options.exclude("rate", "users", "users says at which rate each of them sends")
    rates = options.pairs("users", 1e-6, 1e6) or {"": options.number("rate", 1.0, 1e-6, 1e6)}
    seconds = options.maybe("seconds", 1e-3, MAX_SECONDS)
    n = options.whole("n", 200 if seconds is None else MAX_REQUESTS, 1, MAX_REQUESTS)
    streams = [
        _stream(
            random.Random(f"{seed}/{user}/arrivals"),
            rate,
            cv,
            _maker(options, f"{seed}/{user}/lengths", user, group, priority),
        )
        for user, rate in rates.items()
    ]
    merged: Iterator[TraceRequest] = heapq.merge(*streams, key=lambda request: request.at_s)
    if seconds is not None:
        end = seconds
        merged = itertools.takewhile(lambda request: request.at_s < end, merged)
    requests = tuple(itertools.islice(merged, n))
    if seconds is not None and not options.has("n") and len(requests) == MAX_REQUESTS:
        raise ConfigError(f"{options.kind}: {seconds:g} s hold more than {MAX_REQUESTS} requests", param="seconds")
    if not requests:
        raise ConfigError(
            f"{options.kind}: no request arrives within seconds={seconds:g} at this rate", param="seconds"
        )
    return requests


def _stream(rng: random.Random, rate: float, cv: float, make: Make) -> Iterator[TraceRequest]:
    """An endless stream of arrivals at ``rate`` a second, with gaps of coefficient of variation ``cv``."""
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate) if cv == 1.0 else rng.gammavariate(1 / cv**2, cv**2 / rate)
        yield make(at_s)


def _urgent(options: Options, seed: int, end_s: float) -> list[TraceRequest]:
    every = options.gaps("every", "uniform(0.4,1)")
    prompt = options.lengths("urgent_prompt", "32")
    out = options.lengths("urgent_out", "16")
    priority = options.whole("urgent_priority", 0, *_PRIORITIES)
    slo_ms = options.maybe("urgent_slo_ms", 1e-3, MAX_SECONDS)
    times, lengths = random.Random(f"{seed}/urgent/arrivals"), random.Random(f"{seed}/urgent/lengths")
    requests: list[TraceRequest] = []
    at_s = 0.0
    while True:
        at_s += max(every.seconds(times), 1e-3)
        if at_s >= end_s:
            return requests
        if len(requests) == MAX_REQUESTS:
            raise ConfigError(f"{options.kind}: more than {MAX_REQUESTS} urgent requests", param="every")
        requests.append(
            TraceRequest(
                at_s,
                prompt.tokens(lengths),
                out.tokens(lengths),
                priority=priority,
                user="urgent",
                slo_ms=slo_ms,
                group="urgent",
            )
        )
