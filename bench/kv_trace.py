"""What each eviction policy keeps of a real trace: cache replay without a model, beside the best that was possible.

    python bench/kv_trace.py ../data/mooncake_conversation.jsonl --plot docs/img/kv-eviction.svg

The requests of a Mooncake trace, lengths scaled, run one after another through the prefix tree and the host tier, as an
engine would use them: take what is there, store the rest of the prompt and the answer. Answers are unique, so their KV
is never of use again, which a cache cannot know.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import common
from bench.belady import Units, optimum
from bench.common import progress
from mullama.errors import MullamaError
from mullama.kv.eviction import registry
from mullama.kv.eviction.policy import EvictionPolicy
from mullama.kv.index.tree import PrefixTree, pack
from mullama.kv.tiers.host_tier import HostTier
from mullama.workload.base import TraceRequest
from mullama.workload.traces import mooncake

MIB = 1 << 20
BOUNDLESS = 1 << 62
OPTIMUM = "optimum"


@dataclass(slots=True, frozen=True)
class Prompt:
    """A request as packed tokens."""

    prompt: bytes
    answer: bytes
    at_ns: int = 0  # when it arrives

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) // 4


class Rows:
    """KV of which only the size is known."""

    __slots__ = ("n_bytes", "token_bytes")

    def __init__(self, n_tokens: int, token_bytes: int) -> None:
        self.n_bytes = n_tokens * token_bytes
        self.token_bytes = token_bytes

    def split(self, n_tokens: int) -> tuple[Rows, Rows]:
        n_rest = self.n_bytes // self.token_bytes - n_tokens
        return Rows(n_tokens, self.token_bytes), Rows(n_rest, self.token_bytes)


def prompts_of(requests: Sequence[TraceRequest], *, answers: bool = True) -> list[Prompt]:
    """Equal block ids become equal tokens; what no block covers, and the answers, are unique to the request."""
    found = []
    unique = -1
    for request in requests:
        size = request.block_tokens
        tokens = [block * size + i for block in request.blocks for i in range(size)][: request.prompt_tokens]
        n_more = request.prompt_tokens - len(tokens)
        n_out = request.output_tokens if answers else 0
        own = range(unique, unique - n_more - n_out, -1)
        unique -= n_more + n_out
        found.append(Prompt(pack([*tokens, *own[:n_more]]), pack(own[n_more:]), round(request.at_s * 1e9)))
    return found


def replay(prompts: Sequence[Prompt], budget: int, policy: EvictionPolicy, token_bytes: int) -> list[int]:
    """The tokens that each request reuses; the last token of a prompt is always computed."""
    tree = PrefixTree()
    tier = HostTier(tree, budget, policy)
    reused = []
    for number, prompt in enumerate(prompts, 1):
        now_ns = prompt.at_ns + number  # no two at the same time
        n_reused = tree.match(b"", prompt.prompt[: 4 * (prompt.n_tokens - 1)]).n_host
        reused.append(n_reused)
        end = tree.insert(b"", prompt.prompt + prompt.answer, now_ns)
        path = end.path()
        # After the cut: what lies behind the part in common has not served.
        tier.touch([node for node in path if node.start < n_reused], now_ns)
        for node in path:
            if node.host is None and not tier.put(node, Rows(node.n_tokens, token_bytes), now_ns):
                break
        tree.prune(end)
    return reused


def best(prompts: Sequence[Prompt], budget: int, token_bytes: int, unit: int) -> int:
    """Tokens that a cache of whole units would reuse if it knew the future."""
    units = Units(unit)
    readings = [units.reading(prompt.prompt) for prompt in prompts]
    hits = optimum(readings, budget // (unit * token_bytes))
    return sum(min(n * unit, prompt.n_tokens - 1) for n, prompt in zip(hits, prompts, strict=True))


def measure(prompts: Sequence[Prompt], args: argparse.Namespace) -> dict[str, Any]:
    """Reused tokens of every policy (and of the optimum) at every size, beside what there was to reuse."""
    boundless = sum(replay(prompts, BOUNDLESS, registry.create("fifo"), args.token_bytes))
    policies: dict[str, dict[str, int]] = {}
    for spec in args.policies:
        progress(spec)
        policies[spec] = {
            str(size): sum(replay(prompts, size * MIB, registry.create(spec), args.token_bytes)) for size in args.sizes
        }
    progress(f"{OPTIMUM}, in units of {args.unit} tokens")
    policies[OPTIMUM] = {str(size): best(prompts, size * MIB, args.token_bytes, args.unit) for size in args.sizes}
    return {
        "requests": len(prompts),
        "prompt_tokens": sum(prompt.n_tokens for prompt in prompts),
        "answer_tokens": sum(len(prompt.answer) // 4 for prompt in prompts),
        "infinite_reused": boundless,
        "reused": policies,
    }


def size_name(mib: int) -> str:
    return f"{mib // 1024} GiB" if mib % 1024 == 0 else f"{mib} MiB"


def percent(part: float, whole: float) -> str:
    """One digit after the point: three significant digits would hide what is close to 100."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def result_table(results: Mapping[str, Any], sizes: Sequence[int]) -> str:
    """For each size the share of all prompt tokens, and of what an infinite cache would reuse."""
    head = ["policy", *(cell for size in sizes for cell in (size_name(size), "of infinite"))]
    rows = [
        [
            name,
            *(
                percent(reused[str(size)], results[whole])
                for size in sizes
                for whole in ("prompt_tokens", "infinite_reused")
            ),
        ]
        for name, reused in results["reused"].items()
    ]
    share = percent(results["infinite_reused"], results["prompt_tokens"])
    rows.append(["infinite", *(cell for _ in sizes for cell in (share, percent(1, 1)))])
    return common.table(head, rows)


def draw(results: Mapping[str, Any], sizes: Sequence[int], file: Path) -> None:
    """Share of the prompt tokens by size, a line for each policy. The same numbers give the same file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    whole = results["prompt_tokens"]
    limit = 100 * results["infinite_reused"] / whole
    with rc_context({"svg.hashsalt": "mullama", "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.axhline(limit, color="black", linewidth=1, label="infinite cache")
        for position, (name, reused) in enumerate(results["reused"].items()):
            # Policies may agree: the later and smaller mark lies inside the earlier one.
            style: dict[str, Any] = {"marker": "oD^svP"[position % 6], "markersize": max(11 - 2 * position, 4)}
            label = name
            if name == OPTIMUM:
                style |= {"color": "black", "linestyle": "--"}
                label = "optimum (knows the future)"
            heights = [100 * reused[str(size)] / whole for size in sizes]
            axes.plot(sizes, heights, fillstyle="none", label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [size_name(size) for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(0, 1.08 * limit if limit else 1)
        axes.set_xlabel("cache")
        axes.set_ylabel("prompt tokens reused (%)")
        axes.legend(fontsize="small", loc="lower right")
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {".svg": {"Date": None}, ".png": {"Software": None}}.get(file.suffix)
        figure.savefig(file, metadata=metadata, dpi=150)
    progress(f"wrote {file}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        workload = mooncake(
            str(args.trace), f"n={args.requests},length_scale={1 / args.divide:.17g},block={args.block}"
        )
        results = measure(prompts_of(workload.requests, answers=not args.no_answers), args)
    except MullamaError as error:
        print(error, file=sys.stderr)
        return 1
    print(result_table(results, args.sizes))
    common.write_record(common.record("kv_trace", vars(args), results), args.json)
    if args.plot is not None:
        draw(results, args.sizes, args.plot)
    return 0


def whole_numbers(text: str) -> list[int]:
    found = sorted({int(part) for part in text.split(",")})
    if found[0] <= 0:
        raise argparse.ArgumentTypeError("sizes are above 0")
    return found


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.kv_trace", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trace", type=Path, help="a Mooncake trace (JSONL)")
    parser.add_argument("--requests", type=int, default=300, help="the first of the trace (default: 300)")
    parser.add_argument("--divide", type=float, default=16.0, help="all lengths by this (default: 16)")
    parser.add_argument("--block", type=int, default=32, help="tokens of a block of the trace then (default: 32)")
    parser.add_argument("--sizes", type=whole_numbers, default=[256, 512, 1024], help="caches in MiB, with commas")
    parser.add_argument("--token-bytes", type=int, default=23040, help="KV of a token (default: SmolLM2-135M, f16)")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=list(registry.BUILTINS))
    parser.add_argument("--unit", type=int, default=32, help="tokens that the optimum keeps or gives up together")
    parser.add_argument("--no-answers", action="store_true", help="store prompts only")
    parser.add_argument("--plot", type=Path, default=None, help="draw it there (.svg, .png)")
    parser.add_argument("--json", default=None, help="where to write the record; default: bench/results/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
