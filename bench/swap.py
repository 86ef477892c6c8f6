"""Hot-swap under load, and switching between models, beside llama-server's router mode in the same run.

    python bench/swap.py --model smollm2:135m --other gemma3:270m
    python bench/swap.py --part quants --swaps 100

Parts: ``quants`` swaps one model's quantisations under streams, at two amounts of cached tokens, carrying KV and
recomputing it; ``models`` swaps two different models under one name; ``switch`` alternates requests between two models
of which one fits, and between two that both do; ``together`` lets two models decode at once; ``quantise`` makes another
quantisation beside four streams, and ``loading`` loads another model beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import clients, common, servers
from bench.answers import Outcome, RawCall, parse
from bench.build_peers import BUILD
from bench.common import percentile, progress
from bench.models import DEFAULT_MODEL, model_file

QUANTS = ("Q8_0", "Q4_0", "Q4_K_M")
PARTS = ("quants", "models", "switch", "together", "quantise", "loading")
QUIET_S = 4.0  # before and after work in the background
N_LOADS = 8  # one after another
ADMIN = "bench"  # the key that may name files of the server


def quantised(model: Path, folder: Path) -> dict[str, Path]:
    """The model in each of QUANTS, made once for this run."""
    from mullama._core import quantize

    found = {}
    for quant in QUANTS:
        found[quant] = folder / f"model-{quant}.gguf"
        if not found[quant].exists():
            progress(f"quantising to {quant}")
            quantize(model, found[quant], quant, n_threads=os.cpu_count() or 1)
    return found


def serve(models: Sequence[str], *, ctx: int, parallel: int, extra: Sequence[str] = ()) -> servers.Server:
    port = servers.free_port()
    command = servers.mullama_command(
        models[0], port, ctx=ctx, parallel=parallel, threads=os.cpu_count() or 1, extra=["--admin-key", ADMIN, *extra]
    )
    for model in models[1:]:
        command += ["--model", model]
    return servers.Server("mullama", servers.MULLAMA, command, port)


async def post(port: int, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """One POST of the admin's, beside the streams of this loop."""
    connection = clients.Connection(port)
    try:
        request = clients.http_post(path, body, {"Authorization": f"Bearer {ADMIN}"})
        call = await connection.call(request)
    finally:
        connection.close()
    head, _, payload = b"".join(data for _, data in call.packets).partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), json.loads(payload)


def judged(calls: Sequence[RawCall]) -> dict[str, Any]:
    """What became of the streams that the bench did not cut itself: every one must end for its length."""
    ended = [parse(call) for call in calls if call.ended_ns and call.packets]
    whole = [out for out in ended if out.finish_reason is not None]
    refused = [out for out in ended if out.status not in (0, 200)]
    return {
        "requests": len(whole),
        "failed": len(refused) + sum(out.finish_reason != "length" for out in whole),
    }


def rate_between(calls: Sequence[RawCall], start_ns: int, end_ns: int) -> float:
    """Chunks a second that arrived in a time: tokens, since each is a chunk of its own here."""
    n = sum(start_ns <= at < end_ns and b'"text":' in data for call in list(calls) for at, data in list(call.packets))
    return n / ((end_ns - start_ns) / 1e9)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"p50": statistics.median(values), "p99": percentile(values, 99), "max": max(values)}


async def quants(files: dict[str, Path], args: argparse.Namespace, kv: str, cached: int) -> dict[str, Any]:
    """``--swaps`` changes of weights under 16 streams; ``cached`` tokens of KV over all of them, on average."""
    n, prompt = 16, 32
    longest = 2 * (cached // n) - prompt  # of prompt and answer
    with serve([f"m={files['Q8_0']}"], ctx=1024, parallel=n) as server:

        def make(i: int) -> bytes:
            # The first ones begin at all stages, so that the average holds from the start.
            begun = prompt + (i * (longest - prompt) // n if i < n else 0)
            tokens = [100 + (i * 131 + k * 7) % 30000 for k in range(begun)]
            return clients.completion_request(servers.MULLAMA, tokens, max(longest - begun, 1), profile=True)

        reports = []
        async with clients.background_streams(server.port, n, make) as calls:
            await asyncio.sleep(5 + cached / 500)
            start = time.monotonic_ns()
            await asyncio.sleep(8)
            quiet = rate_between(calls, start, time.monotonic_ns())
            begun = time.monotonic_ns()
            for i in range(args.swaps):
                to = QUANTS[(i + 1) % len(QUANTS)]
                status, report = await post(server.port, "/internal/models/m/swap", {"to": str(files[to]), "kv": kv})
                if status != 200:
                    raise SystemExit(f"swap {i} to {to}: {status} {report}")
                reports.append(report)
                await asyncio.sleep(0.3)
                if i % 10 == 9:
                    progress(f"{kv}, {cached} cached: {i + 1} swaps")
            during = rate_between(calls, begun, time.monotonic_ns())
            await asyncio.sleep(2)
        loads = [report["load_ms"] for report in reports]
        pauses = [report["pause_ms"] for report in reports if report["pause_ms"] is not None]
        firsts = [report["first_token_ms"] for report in reports if report["first_token_ms"] is not None]
        totals = [report["total_ms"] for report in reports]
        return {
            "kv": kv,
            "cached_tokens": cached,
            "swaps": len(reports),
            **judged(calls),
            "pause_ms": spread(pauses),
            "first_token_ms": spread(firsts),
            "load_ms": spread(loads),
            "total_ms": spread(totals),
            "moved": sum(report["sequences_moved"] for report in reports),
            "recomputed": sum(report["sequences_recomputed"] for report in reports),
            "mib_moved": sum(report["bytes_moved"] for report in reports) / 2**20,
            "tok_s_quiet": quiet,
            "tok_s_swapping": during,
        }


async def two_models(model: Path, other: Path, args: argparse.Namespace, kv: str) -> dict[str, Any]:
    """Twenty changes between two models under one name and 8 streams; each followed by one short request."""
    n, out_tokens = 8, 64
    with serve([f"m={model}"], ctx=1024, parallel=n) as server:

        def make(i: int) -> bytes:
            prompt = f"Story number {i}: once upon a time there was a machine that counted to {i * 7}, and then"
            return clients.completion_request(servers.MULLAMA, prompt, out_tokens, profile=True)

        answers, firsts, loads, moved = [], [], [], 0
        probe = clients.Connection(server.port)
        async with clients.background_streams(server.port, n, make) as calls:
            await asyncio.sleep(3)
            for i in range(20):
                to = other if i % 2 == 0 else model
                start = time.monotonic_ns()
                status, report = await post(server.port, "/internal/models/m/swap", {"to": str(to), "kv": kv})
                if status != 200:
                    raise SystemExit(f"swap {i} to {to.name}: {status} {report}")
                call = await probe.call(clients.completion_request(servers.MULLAMA, "And so", 1, profile=True))
                out = parse(call)
                assert out.profile is not None, out.error
                if out.profile["weights"][-1]["weights"] != report["weights_to"]:
                    raise SystemExit(f"{out.profile['weights']} answered after a swap to {report['weights_to']}")
                answers.append((out.chunk_ns[0] - start) / 1e6 if out.chunk_ns else (out.ended_ns - start) / 1e6)
                loads.append(report["load_ms"])
                moved += report["sequences_recomputed"]
                if report["first_token_ms"] is not None:
                    firsts.append(report["first_token_ms"])
                await asyncio.sleep(0.5)
            await asyncio.sleep(3)
        probe.close()
        return {
            "kv": kv,
            "swaps": 20,
            **judged(calls),
            "first_token_ms": spread(firsts) if firsts else None,
            "first_new_answer_ms": spread(answers),
            "load_ms": spread(loads),
            "recomputed": moved,
        }


async def alternate(port: int, kind: str, names: Sequence[str], n: int) -> list[Outcome]:
    """``n`` short requests, to one model and the other in turn, on one connection."""
    connection = clients.Connection(port)
    found = []
    for i in range(n):
        body = clients.completion_request(kind, f"Number {i} is", 1, model=names[i % len(names)])
        found.append(parse(await connection.call(body)))
    connection.close()
    return found


async def switching(files: dict[str, Path], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Request to first token when every request wants the model that is not loaded, and when both are."""
    pair = folder / "pair"
    pair.mkdir(exist_ok=True)
    for name, quant in (("a", "Q8_0"), ("b", "Q4_0")):
        with contextlib.suppress(FileExistsError):
            os.link(files[quant], pair / f"{name}.gguf")
    models = [f"a={pair / 'a.gguf'}", f"b={pair / 'b.gguf'}"]
    result: dict[str, Any] = {}
    for most in (1, 2):
        port = servers.free_port()
        command = [
            *(str(args.bin / "llama-server"), "--models-dir", str(pair), "--models-max", str(most)),
            *("--host", servers.HOST, "--port", str(port), "-np", "8", "-c", "8192", "--no-webui", "--offline"),
            *("-t", str(os.cpu_count()), "-cram", "0", "--fit", "off", "-lv", "1"),
        ]
        peer = servers.Server("llama-server", servers.LLAMA_SERVER, command, port)
        ours = serve(models, ctx=1024, parallel=8, extra=["--max-models", str(most)])
        times: dict[str, list[float]] = {"mullama": [], "llama-server": []}
        with ours, peer:
            for server, kind in ((ours, servers.MULLAMA), (peer, servers.LLAMA_SERVER)):
                await alternate(server.port, kind, ("a", "b"), 2)
            for _ in range(args.rounds):
                for server, kind in ((ours, servers.MULLAMA), (peer, servers.LLAMA_SERVER)):
                    await asyncio.sleep(1)
                    outcomes = await alternate(server.port, kind, ("a", "b"), 6)
                    if errors := [out.error for out in outcomes if out.error]:
                        raise SystemExit(f"{server.name}: {errors[0]}")
                    times[server.name] += [(out.ended_ns - out.started_ns) / 1e6 for out in outcomes]
        result[f"max_models_{most}"] = {
            "mullama_ms": spread(times["mullama"]),
            "llama_server_ms": spread(times["llama-server"]),
            "ratio": statistics.median(times["mullama"]) / statistics.median(times["llama-server"]),
        }
    return result


async def together(files: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and ITL of two models, alone and at once, one and four streams each; rounds interleaved."""
    models = [f"a={files['Q8_0']}", f"b={files['Q4_0']}"]
    rows: list[dict[str, Any]] = []
    with serve(models, ctx=1024, parallel=8) as server:
        for streams in (1, 4):
            for _ in range(args.rounds):
                cell: dict[str, Any] = {"streams": streams}
                for who in (("a",), ("b",), ("a", "b")):
                    cell["+".join(who)] = await _loaded(server.port, who, streams)
                rows.append(cell)
    result = {}
    for streams in (1, 4):
        mine = [row for row in rows if row["streams"] == streams]
        alone = {who: statistics.median(row[who][who]["tok_s"] for row in mine) for who in ("a", "b")}
        both = {who: statistics.median(row["a+b"][who]["tok_s"] for row in mine) for who in ("a", "b")}
        # Turns alternate: with equal shares of the time each would have half of its own rate.
        of_alone = statistics.median(
            sum(row["a+b"][who]["tok_s"] / row[who][who]["tok_s"] for who in ("a", "b")) for row in mine
        )
        itl = {
            name: {who: statistics.median(row[name][who]["itl_p99_ms"] for row in mine) for who in name.split("+")}
            for name in ("a", "b", "a+b")
        }
        result[f"{streams} streams each"] = {"alone": alone, "both": both, "of_alone": of_alone, "itl_p99_ms": itl}
    return result


async def _loaded(port: int, names: Sequence[str], streams: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    async with contextlib.AsyncExitStack() as stack:
        calls = {}
        for name in names:

            def make(i: int, name: str = name) -> bytes:
                return clients.completion_request(servers.MULLAMA, f"Chapter {i}: It was", 256, model=name)

            calls[name] = await stack.enter_async_context(clients.background_streams(port, streams, make))
        await asyncio.sleep(2)
        start = time.monotonic_ns()
        await asyncio.sleep(6)
        end = time.monotonic_ns()
        for name in names:
            gaps = []
            for call in calls[name]:
                at = [ns for ns, data in call.packets if b'"text":' in data and start <= ns < end]
                gaps += [(b - a) / 1e6 for a, b in itertools.pairwise(at)]
            found[name] = {"tok_s": rate_between(calls[name], start, end), "itl_p99_ms": percentile(gaps, 99)}
    return found


async def quantising(files: dict[str, Path], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of four streams before, while and after ``mullama quantize`` works on the same machine."""

    async def work(port: int, n_round: int) -> None:
        for k in range(2):
            await _quantise(files["Q8_0"], f"variant-{n_round}-{k}", folder / "home")

    return await _beside("quantise", [f"m={files['Q8_0']}"], work, args.rounds)


async def loading(files: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of four streams before, while and after another model is loaded again and again."""

    async def work(port: int, n_round: int) -> None:
        for _ in range(N_LOADS):
            for action in ("unload", "load"):
                status, answer = await post(port, f"/internal/models/b/{action}", {})
                if status != 200:
                    raise SystemExit(f"{action}: {status} {answer}")

    return await _beside("loading", [f"a={files['Q8_0']}", f"b={files['Q4_K_M']}"], work, args.rounds)


async def _beside(
    what: str, models: Sequence[str], work: Callable[[int, int], Awaitable[None]], rounds: int
) -> dict[str, Any]:
    """What four streams of the first model keep of their rate while ``work(port, round)`` goes on."""
    rows: list[dict[str, float]] = []
    with serve(models, ctx=1024, parallel=8) as server:

        def make(i: int) -> bytes:
            name = models[0].partition("=")[0]
            return clients.completion_request(servers.MULLAMA, f"Chapter {i}: It was", 512, model=name)

        async with clients.background_streams(server.port, 4, make) as calls:
            await asyncio.sleep(3)
            for i in range(rounds):
                marks = [time.monotonic_ns()]
                await asyncio.sleep(QUIET_S)
                marks.append(time.monotonic_ns())
                await work(server.port, i)
                marks.append(time.monotonic_ns())
                await asyncio.sleep(QUIET_S)
                marks.append(time.monotonic_ns())
                before, during, after = (rate_between(calls, *span) for span in itertools.pairwise(marks))
                row = {
                    "before": before,
                    "during": during,
                    "after": after,
                    "work_s": (marks[2] - marks[1]) / 1e9,
                    "of_quiet": 2 * during / (before + after),
                }
                rows.append(row)
                progress(f"{what}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]} | {"rounds": rows}


async def _quantise(model: Path, name: str, home: Path) -> None:
    """Run ``mullama quantize`` into a store of its own. Raises SystemExit when it fails."""
    command = [sys.executable, "-P", "-m", "mullama", "quantize", str(model), "Q4_K_M", "--name", name]
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "MULLAMA_HOME": str(home)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode:
        raise SystemExit(f"mullama quantize exited with {process.returncode}: {said.decode()[-500:]}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the model whose quantisations are swapped")
    parser.add_argument("--other", default="gemma3:270m", help="another model, for the part 'models'")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--swaps", type=int, default=100, help="changes of weights for each setting of 'quants'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bin", type=Path, default=BUILD / "bin", help="folder of llama-server")
    parser.add_argument("--json", help="where the record goes; default: bench/results/")
    args = parser.parse_args(argv)
    servers.install_signal_cleanup()
    parts = args.part or list(PARTS)
    results: dict[str, Any] = {}
    model = model_file(args.model)
    with tempfile.TemporaryDirectory(prefix="mullama-swap-") as temporary:
        folder = Path(temporary)
        files = quantised(model, folder)
        if "quants" in parts:
            results["quants"] = [
                clients.run(quants(files, args, kv, cached))
                for kv, cached in (("carry", 1000), ("carry", 8000), ("recompute", 1000))
            ]
        if "models" in parts:
            other = model_file(args.other)
            results["models"] = [
                clients.run(two_models(files["Q8_0"], other, args, kv)) for kv in ("recompute", "drain")
            ]
        if "switch" in parts:
            results["switch"] = clients.run(switching(files, folder, args))
        if "together" in parts:
            results["together"] = clients.run(together(files, args))
        if "quantise" in parts:
            results["quantise"] = clients.run(quantising(files, folder, args))
        if "loading" in parts:
            results["loading"] = clients.run(loading(files, args))
    flags = {key: str(value) for key, value in vars(args).items()}
    path = common.write_record(common.record("swap", flags, results), args.json)
    print(json.dumps(results, indent=2))
    progress(f"record: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
