"""Greedy equality: does mullama write what llama.cpp writes, alone and eight at a time?

llama-server alone, with the best log-probabilities of every token, is the reference. A text is *exact*, or it first
differs where the token that it took was nearly as good (*tie*: batches of another shape sum in another order), or it is
*different*. llama-server's own eight-at-a-time texts are judged by the same rule, so
that the reader sees how much of it is llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import clients, common, servers
from bench.answers import Outcome
from bench.context import MULLAMA, PEER, Context

LOOK_BACK = 2  # tokens before the one that holds the first differing byte
TIE_GAP = 0.4  # log-probability between the token of the reference and the one that was taken
N_PROBS = 8  # best tokens of every place that llama-server tells: often three or more lie close together
STRICT_PROMPT, STRICT_TOTAL = 64, 512  # below both, llama.cpp is deterministic on a CPU: only exact counts

QUESTIONS = (
    "Why is the sky blue?",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "Translate to German: Good morning, how are you?",
    '{"name": "Ada", "age": ',
    "The three primary colours are",
    "A haiku about autumn leaves:\n",
    "Water boils at",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name, price FROM products WHERE",
    "1, 1, 2, 3, 5, 8, 13,",
    "Photosynthesis is the process by which",
    "Ingredients for a simple bread:\n-",
    "The quick brown fox",
    "Naïve café owners in Zürich",
    "机器学习是",
    "To be, or not to be, that is",
    "# Heading\n\nThis document describes",
)


@dataclass(frozen=True)
class Verdict:
    kind: str  # "exact", "tie" or "different"
    gap: float | None = None  # log-probability between the two best where the texts part
    at_token: int | None = None


def token_bytes(entry: dict[str, Any]) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") is not None else str(entry["token"]).encode()


def judge(reference: str, logprobs: Sequence[dict[str, Any]], text: str, *, limit: float = TIE_GAP) -> Verdict:
    """Compare a text with the reference, whose tokens and best candidates are given.

    The texts part at the first differing byte, but the token that was chosen differently may have begun a little
    earlier (`` the`` and `` there`` share bytes): of the token that holds that byte and the ``LOOK_BACK`` before it,
    the last whose other candidate fits the text is the one. When none fits, it took one that is not among them: no tie.
    """
    ours, theirs = _final_bytes(text), _final_bytes(reference)
    if ours == theirs:
        return Verdict("exact")
    parting = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    starts, position = [], 0
    for entry in logprobs:
        starts.append(position)
        position += len(token_bytes(entry))
    holder = max((i for i, start in enumerate(starts) if start <= parting), default=-1)
    for i in range(holder, max(-1, holder - LOOK_BACK - 1), -1):
        rest = ours[starts[i] :]
        for other in logprobs[i].get("top_logprobs", ()):
            if other["id"] == logprobs[i]["id"] or not _fits(token_bytes(other), rest):
                continue
            gap = abs(float(logprobs[i]["logprob"]) - float(other["logprob"]))
            return Verdict("tie" if gap <= limit else "different", gap, i)
    return Verdict("different")


def _fits(piece: bytes, rest: bytes) -> bool:
    """Could this token have been chosen where ``rest`` follows? Where nothing follows, only an end token could:
    it has no text, or is written ``<…>``."""
    if not rest:
        return not piece or piece.startswith(b"<")
    return bool(piece) and rest.startswith(piece)


def _final_bytes(text: str) -> bytes:
    """A character cut by the token limit is dropped or replaced, as each server likes: leave it out."""
    return text.rstrip("\ufffd").encode()


def prompts(context: Context) -> list[str]:
    """40 short prompts and 16 longer ones; with 64 tokens out every total stays under 512."""
    maker = context.prompts()
    short = [*QUESTIONS, *(maker.make(n) for n in range(10, 50, 2))]
    return short + [maker.make(n) for n in range(70, 390, 20)]


def collect(server: servers.Server, texts: Sequence[str], n_clients: int, max_tokens: int) -> list[Outcome]:
    """Every prompt's greedy text, ``n_clients`` at a time, in the order of the prompts."""
    extra: dict[str, Any] = {"n_probs": N_PROBS} if server.kind == PEER else {}
    made = [
        clients.completion_request(server.kind, text, max_tokens, stream=False, ignore_eos=False, **extra)
        for text in texts
    ]
    groups = [made[i::n_clients] for i in range(n_clients)]
    outcomes = clients.run(clients.closed_loop(server.port, groups))
    ordered: list[Outcome | None] = [None] * len(texts)
    done = 0
    for i, group in enumerate(groups):
        ordered[i::n_clients] = outcomes[done : done + len(group)]
        done += len(group)
    for out, text in zip(ordered, texts, strict=True):
        if out is None or out.error is not None:
            raise RuntimeError(f"{server.name}: {out and out.error} for the prompt {text[:60]!r}")
    return [out for out in ordered if out is not None]


def greedy_equality(context: Context, pool: servers.Pool, max_tokens: int = 64) -> dict[str, Any]:
    texts = prompts(context)
    answers: dict[tuple[str, int], list[Outcome]] = {}
    for kind in (PEER, MULLAMA):
        server = pool.use(kind)
        for n_clients in (1, 8):
            common.progress(f"greedy-equality: {kind}, {n_clients} at a time")
            answers[kind, n_clients] = collect(server, texts, n_clients, max_tokens)
    reference = answers[PEER, 1]
    result: dict[str, Any] = {"prompts": len(texts), "max_tokens": max_tokens, "tie_gap": TIE_GAP}
    for kind, n_clients in ((MULLAMA, 1), (MULLAMA, 8), (PEER, 8)):
        result[f"{kind} {n_clients}"] = tally(texts, reference, answers[kind, n_clients])
    result["holds"] = all(
        result[f"{MULLAMA} {n}"]["different"] == 0 and result[f"{MULLAMA} {n}"]["strict_not_exact"] == 0 for n in (1, 8)
    )
    return result


def tally(texts: Sequence[str], reference: Sequence[Outcome], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts of verdicts, and every case that is not exact."""
    counts = {"exact": 0, "tie": 0, "different": 0, "strict": 0, "strict_not_exact": 0, "token_counts_differ": 0}
    cases = []
    for text, ref, out in zip(texts, reference, outcomes, strict=True):
        verdict = judge(ref.text, ref.logprobs, out.text)
        strict = ref.prompt_tokens < STRICT_PROMPT and ref.prompt_tokens + ref.completion_tokens < STRICT_TOTAL
        counts[verdict.kind] += 1
        counts["strict"] += strict
        counts["strict_not_exact"] += strict and verdict.kind != "exact"
        counts["token_counts_differ"] += out.prompt_tokens != ref.prompt_tokens
        if verdict.kind != "exact":
            cases.append(
                {
                    "prompt": text[:80],
                    "prompt_tokens": ref.prompt_tokens,
                    "verdict": verdict.kind,
                    "gap": verdict.gap,
                    "at_token": verdict.at_token,
                    "reference": ref.text,
                    "text": out.text,
                }
            )
    # the same prompts come twice, so mullama's second pass also shows that reused KV changes nothing
    return counts | {"cached_tokens": sum(out.cached_tokens for out in outcomes), "cases": cases}


def report(result: dict[str, Any]) -> str:
    keys = ("exact", "tie", "different", "strict", "strict_not_exact", "token_counts_differ")
    rows = [[name, *(cell[key] for key in keys)] for name, cell in result.items() if isinstance(cell, dict)]
    header = ["greedy-equality (at a time)", "exact", f"tie ≤ {TIE_GAP}", "different", "strict", "strict, not exact"]
    text = common.table([*header, "prompt counts differ"], rows)
    return f"{text}\n({result['prompts']} prompts, reference: llama-server alone; holds: {result['holds']})"
