"""Types of weights: mullama's engine beside llama.cpp with each of its own switches, on a random model of a 1.5B's
width.

    python bench/weight_types.py --rounds 3 --type Q4_K_M --type Q6_K

The model is 2,048 wide with 5,632 hidden values and a vocabulary of 32,000; ``--layers`` of them (a step is the same
work in each). It is made once as random Q8_0 and requantised by llama-quantize into ``build/types``. In each round
llama-batched-bench runs with every switch that changes how weights are multiplied, and mullama in a process of its own,
one after another. A figure is the median of the rounds; llama.cpp's is the best of its switches. Needs the checkout:
the model's writer is the tests'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import build_peers, common
from bench.common import progress

TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q4_0", "Q8_0", "IQ4_XS")
PROMPT = 512
SEQUENCES = (1, 4, 8, 16)
DECODED = 48
FOLDER = common.ROOT / "build" / "types"

#: llama.cpp's own switches: arguments and environment.
SWITCHES: dict[str, tuple[list[str], dict[str, str]]] = {
    "default": ([], {}),
    "no repack": (["--no-repack"], {}),
    "no tiles": ([], {"GGML_CPU_TILED_MM": "0"}),
    "neither": (["--no-repack"], {"GGML_CPU_TILED_MM": "0"}),
}


def build_model(kind: str, layers: int, quantize: Path) -> Path:
    """The model's file, made when it is not there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = FOLDER / f"random-{layers}-Q8_0.gguf"
    if not base.exists():
        sys.path.append(str(common.ROOT / "tests"))
        import shaped

        progress(f"writing {base.name}")
        shape = shaped.Shape(
            n_layer=layers, n_embd=2048, n_ff=5632, n_head=32, n_head_kv=8, head=64, n_vocab=32000, kind="Q8_0"
        )
        shaped.build(base.with_suffix(".part"), shape, random=True).rename(base)
    if kind == "Q8_0":
        return base
    path = FOLDER / f"random-{layers}-{kind}.gguf"
    if not path.exists():
        progress(f"quantising {path.name}")
        scratch = path.with_suffix(".part")
        command = [str(quantize), "--allow-requantize", str(base), str(scratch), kind]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        scratch.rename(path)
    return path


def of_llama(tool: Path, model: Path, threads: int, arguments: list[str], env: dict[str, str]) -> dict[str, float]:
    """Tokens a second of llama-batched-bench."""
    figures = {}
    for n_prompt, n_out, sequences in ((PROMPT, 1, (1,)), (16, DECODED, SEQUENCES)):
        n_ctx = max(sequences) * (n_prompt + n_out)
        command = [
            *(str(tool), "-m", str(model), "-t", str(threads), "-tb", str(threads), "-c", str(n_ctx), "-b", "2048"),
            *("-ub", "512", "-npp", str(n_prompt), "-ntg", str(n_out), "-npl", ",".join(map(str, sequences))),
            *("--output-format", "jsonl", *arguments),
        ]
        done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                if n_out == 1:
                    figures["prefill"] = row["speed_pp"]
                else:
                    figures[f"decode {row['pl']}"] = row["speed_tg"]
    return figures


def of_mullama(model: Path, threads: int) -> dict[str, float]:
    """The same from a process of its own (``--child``)."""
    command = [sys.executable, __file__, "--child", str(model), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(model: Path, threads: int) -> None:
    import random

    from bench.offline import Offline
    from mullama.config import ServeConfig
    from mullama.engine.engine import Engine
    from mullama.types import Request, SamplingParams

    numbers = random.Random(1)

    class Random(Offline):
        """Prompts of random tokens: the model has no sense anyway."""

        def _submit(self, n_prompt: int, max_tokens: int) -> Any:
            self._n_requests += 1
            tokens = [numbers.randrange(300, 30000) for _ in range(n_prompt)]
            sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            return self.engine.submit_sync(Request(id=f"bench-{self._n_requests}", prompt=tokens, sampling=sampling))

    config = ServeConfig(threads=threads, parallel=max(SEQUENCES), ctx_size=1024)
    with Engine.load(model, config=config) as engine:
        bench = Random(engine, 1)
        bench.decode(1, 24)
        figures = {"prefill": bench.prefill(PROMPT)["tok_s"]}
        for n in SEQUENCES:
            # the window begins when all decode and ends before the first has ended
            figures[f"decode {n}"] = bench.decode(n, DECODED + 5 * n)["tok_s"]
        print(json.dumps({**figures, "kernels": engine.info.kernels}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--type", action="append", choices=TYPES, help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", help="where the record goes")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child, args.threads)
        return 0
    tools = build_peers.Tools.at()
    results: dict[str, Any] = {}
    try:
        for kind in args.type or TYPES:
            model = build_model(kind, args.layers, tools.quantize)
            of_mullama(model, args.threads)  # the trials of the first load
            rounds: dict[str, list[dict[str, float]]] = {}
            for i in range(args.rounds):
                progress(f"{kind}: round {i + 1} of {args.rounds}")
                ours = of_mullama(model, args.threads)
                results.setdefault(kind, {})["kernels"] = ours.pop("kernels")
                rounds.setdefault("mullama", []).append(ours)
                for name, (arguments, env) in SWITCHES.items():
                    found = of_llama(tools.batched_bench, model, args.threads, arguments, env)
                    rounds.setdefault(name, []).append(found)
            results[kind]["rounds"] = rounds
            results[kind]["ratios"] = _ratios(rounds)
    except KeyboardInterrupt:
        progress("stopped; what was measured is kept")
    print(_report(results))
    print(
        f"record: {common.write_record(common.record('weight_types', vars(args), results), args.json)}", file=sys.stderr
    )
    return 0


def _ratios(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """By figure: ours, llama.cpp's best and its switches, and ours over theirs (medians of the rounds)."""
    ratios = {}
    for figure in rounds["mullama"][0]:
        medians = {name: median(each[figure] for each in runs) for name, runs in rounds.items()}
        ours = medians.pop("mullama")
        best = max(medians, key=lambda name: medians[name])
        by_round = [
            mine[figure] / max(rounds[name][i][figure] for name in SWITCHES) for i, mine in enumerate(rounds["mullama"])
        ]
        ratios[figure] = {"ours": ours, "best": medians[best], "switches": best, "ratio": median(by_round)}
    return ratios


def _report(results: dict[str, Any]) -> str:
    figures = ["prefill", *(f"decode {n}" for n in SEQUENCES)]
    rows = []
    for kind, result in results.items():
        if ratios := result.get("ratios"):
            cells = [f"{ratios[f]['ours']:.0f} ({ratios[f]['ratio']:.2f})" for f in figures]
            rows.append([kind, *cells, ", ".join(sorted({ratios[f]["switches"] for f in figures}))])
    return common.table(["type", *figures, "llama.cpp's best with"], rows)


if __name__ == "__main__":
    sys.exit(main())
