"""What disturbs a server: neighbours on the cores, and a long prompt among short ones."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from bench import clients, common, servers
from bench.answers import RawCall, parse
from bench.context import MULLAMA, PEER, Context
from bench.prompts import PromptMaker

WINDOW_S = 0.5  # rates are looked at in windows of this length
RECOVERED = 0.9  # of the quiet rate
SETTLE_S = 1.0
QUIET_S = 0.5  # between two long prompts

BUSY_LOOP = [sys.executable, "-S", "-c", "while True: pass"]


# --- arithmetic on arrival times (pure) -------------------------------------------------------


def rate_between(arrivals_ns: Sequence[int], begin_ns: int, end_ns: int) -> float:
    """Arrivals a second within [begin, end)."""
    return sum(begin_ns <= t < end_ns for t in arrivals_ns) / ((end_ns - begin_ns) / 1e9)


def recovery_s(arrivals_ns: Sequence[int], stopped_ns: int, quiet_rate: float, end_ns: int) -> float | None:
    """Seconds from ``stopped`` until a window begins in which the rate is full again, None if it never was.

    A window that begins t seconds after the stop is full when it and the one after it reach ``RECOVERED``
    of the quiet rate: one lucky window does not count.
    """
    window = int(WINDOW_S * 1e9)
    step = window // 10
    for begin in range(stopped_ns, end_ns - 2 * window + 1, step):
        if all(rate_between(arrivals_ns, b, b + window) >= RECOVERED * quiet_rate for b in (begin, begin + window)):
            return (begin - stopped_ns) / 1e9
    return None


def gaps_within(streams: Sequence[Sequence[int]], begin_ns: int, end_ns: int) -> list[float]:
    """ITLs in ms of all streams whose later token arrived within [begin, end)."""
    return [(b - a) / 1e6 for stream in streams for a, b in itertools.pairwise(stream) if begin_ns <= b < end_ns]


# --- neighbours -------------------------------------------------------------------------------


@contextlib.contextmanager
def neighbour(command: list[str]) -> Iterator[None]:
    """A process beside the server. Raises RuntimeError when it did not live until the end of the block."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the neighbour {command[0]} ended early with {process.returncode}")
    finally:
        process.kill()  # at once: the time of its end is measured
        process.wait()


async def _phases(server: servers.Server, context: Context, phase_s: float) -> dict[str, Any]:
    """One client streams all the time; neighbours come and go. Rates in chunks a second, corrected to tokens."""
    engine = [*(str(context.tools.bench), "-m", str(context.model), "-t", "2", "-p", "0", "-n", "256"), "-r", "100000"]
    neighbours = {"busy loop": BUSY_LOOP, "engine": engine}
    n_out = min(512, context.ctx - 32)
    maker = context.prompts()
    marks: list[tuple[str, int, int]] = []  # phase, begin, end
    stops: dict[str, int] = {}

    async def phase(name: str, seconds: float) -> None:
        begin = time.monotonic_ns()
        await asyncio.sleep(seconds)
        marks.append((name, begin, time.monotonic_ns()))

    def request(_: int) -> bytes:
        return clients.completion_request(server.kind, maker.make(20), n_out)

    async with clients.background_streams(server.port, 1, request) as calls:
        await asyncio.sleep(2 * SETTLE_S)
        await phase("alone", phase_s)
        for name, command in neighbours.items():
            with neighbour(command):
                await asyncio.sleep(2 * SETTLE_S)  # llama-bench loads its model
                await phase(f"beside {name}", phase_s)
            stops[name] = time.monotonic_ns()
            await phase(f"after {name}", phase_s)
    outcomes = [parse(call) for call in calls]
    arrivals = sorted(t for out in outcomes for t in out.chunk_ns)
    tokens = sum(out.completion_tokens for out in outcomes if out.completion_tokens)
    chunks = sum(len(out.chunk_ns) for out in outcomes if out.completion_tokens)
    factor = tokens / chunks if chunks else 1.0  # tokens a chunk, from the streams that ended
    figures: dict[str, Any] = {name: factor * rate_between(arrivals, begin, end) for name, begin, end in marks}
    quiet = rate_between(arrivals, *next((b, e) for name, b, e in marks if name == "alone"))
    for name, stopped in stops.items():
        end = next(e for label, _, e in marks if label == f"after {name}")
        figures[f"full speed after {name} s"] = recovery_s(arrivals, stopped, quiet, end)
    return figures


def neighbours(context: Context, _: servers.Pool | None = None, *, phase_s: float = 8.0, n: int = 3) -> dict[str, Any]:
    """Each server alone on the machine but for one neighbour at a time; n interleaved rounds, medians."""
    rows: dict[str, list[dict[str, float]]] = {}
    plans = [(MULLAMA, MULLAMA, None), (f"{PEER} -t 2", PEER, 2), (f"{PEER} -t 1", PEER, 1)]
    context.prompts()  # before the loop: learning the words starts a server
    for i in range(n):
        for label, kind, threads in plans:
            common.progress(f"neighbours {i + 1}/{n}: {label}")
            with context.server(kind, name=label, threads=threads) as server:
                figures = clients.run(_phases(server, context, phase_s))
            rows.setdefault(label, []).append({k: float("nan") if v is None else v for k, v in figures.items()})
    result: dict[str, Any] = {label: common.median_by_key(row) for label, row in rows.items()}
    result["rounds"] = rows
    ours = result[MULLAMA]
    result["ratio to the best fixed thread count"] = {
        key: common.ratio(ours[key]["median"], max(result[label][key]["median"] for label, _, _ in plans[1:]))
        for key in ("alone", "beside busy loop", "beside engine")
    }
    return result


def neighbours_report(result: dict[str, Any]) -> str:
    labels = [label for label in result if label.startswith((MULLAMA, PEER))]
    rows = []
    for key in result[MULLAMA]:
        # a recovery that never came is left out of the median, so its count is shown
        rows.append([key, *(_with_count(result[label][key], len(result["rounds"][label])) for label in labels)])
    text = common.table(["neighbours, t/s", *labels], rows)
    ratios = result["ratio to the best fixed thread count"]
    return text + "\n(mullama / best fixed: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()) + ")"


def _with_count(cell: dict[str, float], expected: int) -> str:
    missing = expected - int(cell["n"])
    return common.number(cell["median"]) + (f" ({missing} of {expected} never)" if missing else "")


# --- a long prompt among running streams ------------------------------------------------------


def long_text(seed: int, n_chars: int) -> str:
    """A text of that many characters; unlike prompts, its token count does not matter."""
    maker = PromptMaker(seed)
    text = ""
    while len(text) < n_chars:
        text += maker.make(200)
    return text[:n_chars]


async def _with_long_prompt(server: servers.Server, context: Context, n_chars: int, repeats: int) -> dict[str, Any]:
    maker = context.prompts()
    n_out = min(1024, context.ctx - 32)
    quiet: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    answers: list[RawCall] = []
    bodies = [
        clients.completion_request(
            server.kind, long_text(context.seed + i, n_chars), 1, stream=False, profile=server.kind == MULLAMA
        )
        for i in range(repeats)
    ]

    def request(_: int) -> bytes:
        return clients.completion_request(server.kind, maker.make(20), n_out)

    async with clients.background_streams(server.port, 4, request) as calls:
        await asyncio.sleep(2 * SETTLE_S)
        connection = clients.Connection(server.port)
        for body in bodies:
            # Steps grow longer as the streams do, so quiet times and prompts alternate.
            begin = time.monotonic_ns()
            await asyncio.sleep(QUIET_S)
            quiet.append((begin, time.monotonic_ns()))
            begin = time.monotonic_ns()
            answers.append(await connection.call(body))
            await asyncio.sleep(0.2)  # what it left behind counts too
            spans.append((begin, time.monotonic_ns()))
        connection.close()
    streams = [parse(call).chunk_ns for call in calls]
    before = [gap for begin, end in quiet for gap in gaps_within(streams, begin, end)]
    during = [gap for begin, end in spans for gap in gaps_within(streams, begin, end)]
    parsed = [parse(answer) for answer in answers]
    computed = [out for out in parsed if out.status == 200]
    own = [
        float((out.profile or {}).get("prefill_ms") or (out.timings or {}).get("prompt_ms") or 0) for out in computed
    ]
    return {
        "status": parsed[0].status,
        "answer_ms": statistics.median((out.ended_ns - out.started_ns) / 1e6 for out in parsed),
        "own_compute_ms": statistics.median(own) if own else 0.0,
        "itl_p50_before_ms": common.percentile(before, 50),
        "itl_p99_before_ms": common.percentile(before, 99),
        "itl_p50_during_ms": common.percentile(during, 50),
        "itl_p99_during_ms": common.percentile(during, 99),
        "itl_p99_ratio": common.percentile(during, 99) / common.percentile(before, 99),
        "itl_max_during_ms": max(during, default=float("nan")),
        "samples_before": len(before),
        "samples_during": len(during),
    }


def itl_under_long_prompt(
    context: Context, pool: servers.Pool, *, n_chars: int = 100_000, n: int = 3, repeats: int = 8
) -> dict[str, Any]:
    """Four streams decode while 100,000-character prompts arrive (refused, or computed where they fit)."""
    rows: dict[str, list[dict[str, float]]] = {}
    for i in range(n):
        for kind in (MULLAMA, PEER):
            server = pool.use(kind)
            rows.setdefault(kind, []).append(clients.run(_with_long_prompt(server, context, n_chars, repeats)))
            common.progress(
                f"itl-under-long-prompt {i + 1}/{n}: {kind} p99 {common.number(rows[kind][-1]['itl_p99_before_ms'])} → "
                f"{common.number(rows[kind][-1]['itl_p99_during_ms'])} ms"
            )
    result: dict[str, Any] = {kind: common.median_by_key(row) for kind, row in rows.items()}
    return result | {"rounds": rows}


def itl_report(result: dict[str, Any]) -> str:
    rows = [[key, *(result[kind][key]["median"] for kind in (MULLAMA, PEER))] for key in result[MULLAMA]]
    return common.table(["itl-under-long-prompt", MULLAMA, PEER], rows)
