"""mullama beside llama-server and llama-bench, of the same llama.cpp, in one run.

    python bench/peers.py --model FILE             builds the peers, runs every scenario
    python bench/peers.py --no-build --scenario one --scenario eight-greedy --rounds 3
    python bench/peers.py --build-only

README.md says what each scenario measures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import json

from bench import (
    build_peers,
    cached_equality,
    calibrate,
    common,
    context,
    disturbance,
    equality,
    models,
    reuse,
    scenarios,
    servers,
)
from bench.common import progress
from bench.context import MULLAMA, PEER, Context, comparison_table

Result = dict[str, Any]


def peers_offline(ctx: Context, _: servers.Pool | None = None, n: int = 3) -> Result:
    """The engines without HTTP: llama-bench and llama-batched-bench beside bench/offline.py, interleaved.

    All three read 16-token prompts before decoding, as offline.py does; tg of llama-bench starts with none.
    """
    threads = str(ctx.threads)
    rows: dict[str, list[dict[str, float]]] = {"llama.cpp": [], MULLAMA: []}
    for i in range(n):
        figures: dict[str, float] = {}
        bench_args = ["-p", "512", "-n", "256", "-t", threads, "-r", "2"]
        for row in calibrate.llama_bench_rows(ctx.tools.bench, str(ctx.model), bench_args):
            figures["prefill 512" if row["n_prompt"] else "decode 1"] = float(row["avg_ts"])
        command = [
            *(str(ctx.tools.batched_bench), "-m", str(ctx.model), "-c", str(ctx.ctx * 8), "-b", "512", "-ub", "512"),
            *("-npp", "16", "-ntg", "256", "-npl", "2,4,8", "-t", threads, "-tb", threads),
            *("--output-format", "jsonl", "--fit", "off", "--offline"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise RuntimeError(f"llama-batched-bench exited with {done.returncode}: {done.stderr[-500:]}")
        for row in calibrate.jsonl(done.stdout):
            figures[f"decode {row['pl']}"] = float(row["speed_tg"])
        rows["llama.cpp"].append(figures)
        ours = _offline(ctx)
        rows[MULLAMA].append(
            {
                "prefill 512": ours["prefill-512"]["tok_s"]["median"],
                **{f"decode {k}": ours[f"decode-{k}"]["tok_s"]["median"] for k in (1, 2, 4, 8)},
                **{f"in llama_decode, {k}": ours[f"decode-{k}"]["decode_share"]["median"] for k in (1, 8)},
                "hole cost": ours["hole-cost"]["ratio"],
            }
        )
        progress(f"peers-offline {i + 1}/{n}")
    return {name: common.median_by_key(row) for name, row in rows.items()} | {"rounds": rows}


def _offline(ctx: Context) -> Result:
    """bench/offline.py in a process of its own, one round."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "offline.json"
        command = [
            *(sys.executable, str(common.ROOT / "bench" / "offline.py"), "--model", str(ctx.model)),
            *("--ctx", str(ctx.ctx), "--parallel", "8", "--threads", str(ctx.threads)),
            *("--rounds", "2", "--json", str(out)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise RuntimeError(f"bench/offline.py exited with {done.returncode}: {done.stderr[-1000:]}")
        results: Result = json.loads(out.read_text(encoding="utf-8"))["results"]
        return results


def offline_report(result: Result) -> str:
    rows = []
    for key, ours in result[MULLAMA].items():
        theirs = result["llama.cpp"].get(key)
        mine = ours["median"]
        rows.append([key, mine, theirs and theirs["median"], theirs and common.ratio(mine, theirs["median"])])
    return common.table(["peers-offline, t/s", MULLAMA, "llama-bench / batched-bench", "ratio"], rows)


def startup_report(result: Result) -> str:
    rows = [[kind, cell["median"], cell["min"], cell["max"]] for kind, cell in result.items()]
    return common.table(["startup, s", "median", "min", "max"], rows)


Scenario = tuple[bool, Callable[[Context, Any], Result], Callable[[Result], str]]

# name: (needs both servers loaded, run, report)
SCENARIOS: dict[str, Scenario] = {
    "one": (True, scenarios.one, lambda r: comparison_table("one", r)),
    "eight-greedy": (True, scenarios.eight_greedy, lambda r: comparison_table("eight-greedy", r)),
    "eight-sampled": (True, scenarios.eight_sampled, lambda r: comparison_table("eight-sampled", r)),
    "short-ttft": (True, scenarios.short_ttft, lambda r: comparison_table("short-ttft", r)),
    "greedy-equality": (True, equality.greedy_equality, equality.report),
    "cached-equality": (False, cached_equality.cached_equality, cached_equality.report),
    "itl-under-long-prompt": (True, disturbance.itl_under_long_prompt, disturbance.itl_report),
    "shared-prefix": (False, reuse.shared_prefix, reuse.report_shared),
    "chats": (False, reuse.chats, lambda r: comparison_table("chats", r)),
    "neighbours": (False, disturbance.neighbours, disturbance.neighbours_report),
    "startup": (False, scenarios.startup, startup_report),
    "peers-offline": (False, peers_offline, offline_report),
}


def run(ctx: Context, names: Sequence[str], results: Result) -> bool:
    """Run the scenarios and print each table as it is done. A scenario that fails does not stop the others.

    ``results`` is filled on the way, so that an interrupted run keeps what it has. True: none failed.
    """
    fine = True
    together = [name for name in names if SCENARIOS[name][0]]
    apart = [name for name in names if not SCENARIOS[name][0]]

    def one(name: str, pool: servers.Pool | None) -> bool:
        progress(f"--- {name}")
        try:
            results[name] = SCENARIOS[name][1](ctx, pool)
        except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            results[name] = {"failed": str(error)}
            print(f"\n{name} FAILED: {error}", flush=True)
            return False
        print("\n" + SCENARIOS[name][2](results[name]), flush=True)
        return True

    if together:
        ctx.prompts()
        with ctx.pool() as pool:
            scenarios.warm_up(pool, ctx)
            for name in together:
                fine &= one(name, pool)
    for name in apart:
        fine &= one(name, None)
    return fine


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=models.DEFAULT_MODEL, help="GGUF file or a reference in mullama's store")
    parser.add_argument("--quantize", default=None, metavar="TYPE", help="measure a requantised copy, such as Q8_0")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="believed rounds of each interleaved scenario")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens a request may use, on both servers")
    parser.add_argument("--parallel", type=int, default=8, help="requests that run at once, on both servers")
    parser.add_argument("--threads", type=int, default=2, help="most CPU threads, on both servers")
    parser.add_argument("--prompt-tokens", type=int, default=140)
    parser.add_argument("--max-tokens", type=int, default=64, help="out, of the eight-client scenarios")
    parser.add_argument("--count", type=int, default=0, help="prompts of cached-equality (default: 500)")
    parser.add_argument("--restart", action="store_true", help="never keep both servers loaded at once")
    parser.add_argument("--no-build", action="store_true", help="use what build/peers already holds")
    parser.add_argument("--build-only", action="store_true", help="build the peers and stop")
    parser.add_argument("--build-dir", type=Path, default=build_peers.BUILD)
    parser.add_argument("--mullama-arg", action="append", default=[], metavar="ARG", help="extra; use --mullama-arg=-x")
    parser.add_argument("--peer-arg", action="append", default=[], metavar="ARG", help="extra; use --peer-arg=-x")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of prompts and sampling")
    parser.add_argument(
        "--json", default=None, metavar="FILE", help="where to write the record; default: bench/results/"
    )
    return parser.parse_args(argv)


def make_context(args: argparse.Namespace, tools: build_peers.Tools) -> Context:
    model, reference = models.model_file(args.model), args.model
    if args.quantize:
        reference = ""
        progress(f"requantising to {args.quantize}")
        model = models.quantized(model, args.quantize, tools.quantize, args.build_dir / "models")
    return context.Context(
        tools=tools,
        model=model,
        reference=reference,
        ctx=args.ctx,
        parallel=args.parallel,
        threads=args.threads,
        rounds=args.rounds,
        seed=args.seed,
        restart=args.restart,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        count=args.count,
        mullama_args=args.mullama_arg,
        peer_args=args.peer_arg,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    servers.install_signal_cleanup()
    results: Result = {}
    status = 0
    try:
        tools = build_peers.Tools.at(args.build_dir) if args.no_build else build_peers.build_tools(args.build_dir)
        if args.build_only:
            return 0
        ctx = make_context(args, tools)
        names = list(dict.fromkeys(args.scenario or SCENARIOS))
        status = 0 if run(ctx, names, results) else 1
    except (build_peers.BuildFailed, models.NoModel, servers.ServerFailed) as error:
        print(error, file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        progress("interrupted; what was measured so far is kept")
        status = 130
    if results:
        flags = vars(args) | {"llama_cpp": build_peers.upstream_commit(), "cmake": build_peers.DEFINES, "peer": PEER}
        flags |= {"peer_patches": build_peers.needed_patches()}
        common.write_record(common.record("peers", flags, results), args.json)
    return status


if __name__ == "__main__":
    sys.exit(main())
