"""One server over HTTP: throughput, TTFT and ITL of closed-loop and open-loop clients.

Without ``--url`` it starts ``python -m mullama serve`` and stops it afterwards:

    python bench/online.py --model FILE
    python bench/online.py --url http://127.0.0.1:8080 --kind llama-server
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import clients, common, servers
from bench.answers import Outcome
from bench.common import progress
from bench.models import DEFAULT_MODEL
from bench.prompts import PromptMaker


def prompt_maker(server: servers.Server, seed: int, host: str = servers.HOST) -> PromptMaker:
    """Prompts of exact length for this server, by its own tokenizer."""
    free, count = servers.token_counter(server, host=host)
    return PromptMaker(seed, count) if free else PromptMaker.calibrated(seed, count)


def requests(
    maker: PromptMaker, kind: str, n: int, *, prompt_tokens: int, max_tokens: int, sampling: dict[str, Any], seed: int
) -> list[bytes]:
    """``n`` unique requests; sampled ones carry a seed each, so that a run can be repeated."""
    return [
        clients.completion_request(
            kind,
            maker.make(prompt_tokens),
            max_tokens,
            sampling=sampling if sampling.get("temperature") == 0 else sampling | {"seed": seed + i},
        )
        for i in range(n)
    ]


def check_lengths(outcomes: Sequence[Outcome], prompt_tokens: int, max_tokens: int) -> str | None:
    """What differs from the workload that was meant, or None. Compares with the server's own usage."""
    good = [out for out in outcomes if out.error is None]
    if wrong := [out.prompt_tokens for out in good if out.prompt_tokens != prompt_tokens]:
        return f"{len(wrong)} of {len(good)} prompts had another length than {prompt_tokens}, such as {wrong[0]}"
    if wrong := [out.completion_tokens for out in good if out.completion_tokens != max_tokens]:
        return f"{len(wrong)} of {len(good)} answers had another length than {max_tokens}, such as {wrong[0]}"
    return None


def engine_times(server: servers.Server, host: str) -> tuple[int, int] | None:
    """Nanoseconds that mullama's engine was busy, and of these inside llama_decode. None for other servers."""
    if server.kind != servers.MULLAMA:
        return None
    with urllib.request.urlopen(f"http://{host}:{server.port}/internal/scheduler", timeout=10) as answer:
        counters = json.load(answer)["counters"]
    return counters["busy_ns"], counters["decode_ns"]


def decode_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """The share of the busy time that lay inside llama_decode; None where nothing was computed or nobody counts."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    return (after[1] - before[1]) / (after[0] - before[0])


def measure(server: servers.Server, host: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    progress("preparing prompts")
    maker = prompt_maker(server, args.seed, host)
    sampling = clients.SAMPLED if args.sampled else clients.GREEDY

    def batch(n: int, offset: int) -> list[bytes]:
        return requests(
            maker,
            server.kind,
            n,
            prompt_tokens=args.prompt_tokens,
            max_tokens=args.max_tokens,
            sampling=sampling,
            seed=args.seed + offset,
        )

    clients.run(clients.closed_loop(server.port, [[request] for request in batch(2, 0)], host=host))  # warm-up
    results = []
    loads: list[tuple[str, float]] = [("closed", float(n)) for n in args.clients] + [("open", r) for r in args.rate]
    for kind, amount in loads:
        for i in range(args.rounds):
            before = engine_times(server, host)
            if kind == "closed":
                work = [batch(args.requests, 1000 * (i + 1) + c) for c in range(int(amount))]
                outcomes = clients.run(clients.closed_loop(server.port, work, host=host))
            else:
                n = args.open_requests
                arrivals = clients.poisson_arrivals(n, amount, args.seed + i)
                outcomes = clients.run(clients.open_loop(server.port, batch(n, 1000 * i), arrivals, host=host))
            figures = clients.load_figures(outcomes)
            figures["in_llama_decode"] = decode_share(before, engine_times(server, host))
            figures["warning"] = check_lengths(outcomes, args.prompt_tokens, args.max_tokens)
            progress(f"{kind} {amount:g}, round {i + 1}/{args.rounds}: {common.number(figures.get('tok_s'))} t/s")
            results.append({"load": kind, "amount": amount, "round": i + 1, **figures})
    return results


def report(results: Sequence[dict[str, Any]]) -> str:
    """One row a load: medians over the rounds."""
    rows = []
    for load in dict.fromkeys((row["load"], row["amount"]) for row in results):
        same = [row for row in results if (row["load"], row["amount"]) == load]
        done = [row for row in same if "tok_s" in row]

        def middle(key: str, part: str | None = None, done: list[dict[str, Any]] = done) -> float:
            values = [row[key] if part is None else row[key][part] for row in done]
            return common.summarize(values)["median"]

        label = f"{load[1]:g} clients" if load[0] == "closed" else f"{load[1]:g} arrivals/s"
        rows.append(
            [
                label,
                sum(row["requests"] for row in same),
                sum(row["errors"] for row in same),
                middle("tok_s"),
                middle("decode_tok_s"),
                *(middle("ttft_ms", part) for part in ("p50", "p99")),
                *(middle("itl_ms", part) for part in ("p50", "p99")),
                middle("in_llama_decode") if all(row["in_llama_decode"] is not None for row in done) else None,
            ]
        )
    counts = ["load", "requests", "errors", "t/s", "decode t/s a client"]
    text = common.table([*counts, "TTFT p50 ms", "TTFT p99", "ITL p50 ms", "ITL p99", "in llama_decode"], rows)
    warnings = dict.fromkeys(row["warning"] for row in results if row["warning"])
    errors = dict.fromkeys(row["first_error"] for row in results if "first_error" in row)
    return "\n\n".join([text, *(f"NOTE: {line}" for line in [*warnings, *errors])])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.online", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default=None, help="a running server instead of starting mullama")
    parser.add_argument("--kind", choices=(servers.MULLAMA, servers.LLAMA_SERVER), default=servers.MULLAMA)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model for the server that is started")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens a request may use")
    parser.add_argument("--parallel", type=int, default=8, help="requests that run at once")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    parser.add_argument("--clients", type=_numbers, default=[1, 8], help="closed-loop clients, such as 1,8,16")
    parser.add_argument("--requests", type=int, default=2, help="requests of each closed-loop client a round")
    parser.add_argument("--rate", type=_rates, default=[], help="open-loop arrivals a second, such as 0.5,2")
    parser.add_argument("--open-requests", type=int, default=32, help="requests of an open-loop round")
    parser.add_argument("--prompt-tokens", type=int, default=140)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top-k 40, top-p 0.95; else greedy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of prompts, arrivals and sampling")
    parser.add_argument("--json", default=None, help="where to write the record; default: bench/results/")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    servers.install_signal_cleanup()
    try:
        if args.url:
            url = urlsplit(args.url)
            host, port = url.hostname or servers.HOST, url.port or 80
            results = measure(servers.Server(args.kind, args.kind, [], port), host, args)
        else:
            port = servers.free_port()
            shape = {"ctx": args.ctx, "parallel": args.parallel, "threads": args.threads}
            command = servers.mullama_command(args.model, port, **shape)
            progress("starting mullama")
            with servers.Server(servers.MULLAMA, servers.MULLAMA, command, port) as server:
                results = measure(server, servers.HOST, args)
    except (servers.ServerFailed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(report(results))
    common.write_record(common.record("online", vars(args), results), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
