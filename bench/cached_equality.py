"""Does a cache change what is written? Prompts that share beginnings, in random order, with and without it.

Each server answers every prompt twice: with its cache on, as users have it, and computing all of every prompt
(mullama: a ``cache_salt`` for each request; llama-server: ``cache_prompt`` false). A server's cached text is judged
against its own computed one by the rule of equality.py: *exact*; or *tie*, where the token that it took first differs
and lies within 0.4 of the other's choice; or *different*. One request at a time, so that the cache is all that differs.

The log-probabilities are llama-server's. Where its own text had gone another way before the place in question, it is
asked for that place.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench import clients, common, servers
from bench.answers import Outcome
from bench.context import MULLAMA, PEER, Context
from bench.equality import LOOK_BACK, N_PROBS, TIE_GAP, Verdict, judge
from bench.prompts import PromptMaker

COUNT = 500
BLOCK = 50  # prompts that one server answers before it is the next one's turn
OUT_TOKENS = 24
COMPUTING = ", computing"  # of a server's name: its cache is off
KINDS = (MULLAMA, MULLAMA + COMPUTING, PEER, PEER + COMPUTING)

SHORT, N_SHORT = (30, 60), 6  # tokens of short system prompts, how many there are
LONG, N_LONG = (300, 700), 8
QUESTION = (15, 60)
TURNS = 5  # of a chat, every one of them a prompt

Guard = Callable[[], contextlib.AbstractContextManager[object]]


def prompts(maker: PromptMaker, seed: int, count: int) -> list[str]:
    """A quarter are turns of chats, the rest questions behind short and long system prompts; in random order."""
    rng = random.Random(seed)

    def text(size: tuple[int, int]) -> str:
        return maker.make(rng.randint(*size))

    short, long = [text(SHORT) for _ in range(N_SHORT)], [text(LONG) for _ in range(N_LONG)]
    found: list[str] = []
    while len(found) < count // 4:
        whole = rng.choice(short)
        for _ in range(TURNS):
            whole += text(QUESTION)
            found.append(whole)
            whole += text(QUESTION)  # stands for the answer
    found = found[: count // 4]
    found += [rng.choice(long) + text(QUESTION) for _ in range(count * 7 // 20)]
    found += [rng.choice(short) + text(QUESTION) for _ in range(count - len(found))]
    rng.shuffle(found)
    return found


def make_pool(context: Context) -> servers.Pool:
    """Each server twice, so that the computing one never disturbs the other's cache."""
    made = []
    for name in KINDS:
        server = context.server(MULLAMA if name.startswith(MULLAMA) else PEER, name=name)
        if name == PEER:
            server.command += ["-cram", "8192"]
        elif name == MULLAMA + COMPUTING:
            server.command += ["--kv-host-bytes", "0"]
        made.append(server)
    return servers.Pool(made, restart=context.restart)


def request(name: str, prompt: str | Sequence[int], number: int, max_tokens: int = OUT_TOKENS) -> bytes:
    is_computing = name.endswith(COMPUTING)
    if name.startswith(MULLAMA):
        extra: dict[str, Any] = {"cache_salt": f"alone-{number}"} if is_computing else {}
        return clients.completion_request(MULLAMA, prompt, max_tokens, stream=False, ignore_eos=False, **extra)
    extra = {"n_probs": N_PROBS, "cache_prompt": not is_computing}
    return clients.completion_request(PEER, prompt, max_tokens, stream=False, ignore_eos=False, **extra)


def ask(server: servers.Server, made: Sequence[bytes]) -> list[Outcome]:
    outcomes = clients.run(clients.closed_loop(server.port, [made]))
    for out in outcomes:
        if out.error is not None:
            raise RuntimeError(f"{server.name}: {out.error}")
    return outcomes


def cached_equality(
    context: Context, _: servers.Pool | None = None, *, guard: Guard = contextlib.nullcontext
) -> dict[str, Any]:
    """``guard`` is entered around every block, for whoever shares the machine."""
    with guard():
        texts = prompts(context.prompts(), context.seed, context.count or COUNT)
    tally = Tally()
    with make_pool(context) as pool:
        try:
            for at in range(0, len(texts), BLOCK):
                block = texts[at : at + BLOCK]
                with guard():
                    answers, seconds = answer_block(pool, block, at)
                    tally.add(block, answers, seconds, Probe(pool.use(PEER + COMPUTING)))
                common.progress(f"cached-equality: {tally.n_prompts} of {len(texts)}; {tally.short()}")
        except BaseException:  # what is judged is worth showing, whatever ended the rest
            if tally.n_prompts:
                common.progress(f"cached-equality ended after {tally.n_prompts} prompts; {tally.short()}")
            raise
    return tally.result()


def answer_block(
    pool: servers.Pool, texts: Sequence[str], first: int
) -> tuple[dict[str, list[Outcome]], dict[str, float]]:
    """What each server answers to all of them, and the seconds that took. ``first`` is the number of the first one."""
    answers, seconds = {}, {}
    for name in KINDS:
        server = pool.use(name)
        made = [request(name, text, first + i) for i, text in enumerate(texts)]
        begun = time.monotonic()
        answers[name] = ask(server, made)
        seconds[name] = time.monotonic() - begun
    return answers, seconds


#: Whose texts are judged, against whose.
PAIRS = ((MULLAMA, MULLAMA + COMPUTING), (PEER, PEER + COMPUTING), (MULLAMA + COMPUTING, PEER + COMPUTING))


class Tally:
    """The verdicts so far. A block is judged when it is answered, so a run that is cut short has counts to show."""

    def __init__(self) -> None:
        self.n_prompts = 0
        self._rows: dict[str, dict[str, Any]] = {
            f"{name} | {against}": {"exact": 0, "tie": 0, "different": 0, "cases": []} for name, against in PAIRS
        }
        self._servers = {name: {"prompt_tokens": 0, "cached_tokens": 0, "seconds": 0.0} for name in KINDS}

    def add(
        self, texts: Sequence[str], answers: dict[str, list[Outcome]], seconds: dict[str, float], probe: Probe
    ) -> None:
        self.n_prompts += len(texts)
        for name, used in self._servers.items():
            used["prompt_tokens"] += sum(out.prompt_tokens for out in answers[name])
            used["cached_tokens"] += sum(out.cached_tokens for out in answers[name])
            used["seconds"] += seconds[name]
        for (name, against), row in zip(PAIRS, self._rows.values(), strict=True):
            known = answers[PEER + COMPUTING]
            for text, best, ours, theirs in zip(texts, known, answers[name], answers[against], strict=True):
                verdict = verdict_of(text, best, theirs.text, ours.text, probe)
                row[verdict.kind] += 1
                if verdict.kind != "exact":
                    row["cases"].append(
                        {
                            "prompt_tokens": best.prompt_tokens,
                            "cached_tokens": ours.cached_tokens,
                            "verdict": verdict.kind,
                            "gap": verdict.gap,
                            "prompt": text,
                            "computed": theirs.text,
                            "text": ours.text,
                        }
                    )

    def short(self) -> str:
        """One line: exact, tie and different of each server."""
        return ", ".join(
            f"{name.split(' | ')[0]} {row['exact']}+{row['tie']}+{row['different']}" for name, row in self._rows.items()
        )

    def result(self) -> dict[str, Any]:
        return {
            "prompts": self.n_prompts,
            "max_tokens": OUT_TOKENS,
            "tie_gap": TIE_GAP,
            "against": self._rows,
            "servers": self._servers,
            "holds": self._rows[f"{MULLAMA} | {MULLAMA + COMPUTING}"]["different"] == 0,
        }


class Probe:
    """Asks llama-server for the log-probabilities of a text that is not its own, near the place in question."""

    def __init__(self, server: servers.Server) -> None:
        self._server = server
        self.n_asked = 0

    def _tokens(self, text: str, *, is_begin: bool) -> list[int]:
        body = {"content": text, "add_special": is_begin}
        status, answer = servers.post_json(self._server.port, "/tokenize", body)
        if status != 200:
            raise RuntimeError(f"/tokenize answered {status}: {answer}")
        return list(answer["tokens"])

    def logprobs(self, prompt: str, text: str, at_byte: int) -> list[dict[str, Any]]:
        """Entries as llama-server's own; with candidates only for the token at ``at_byte`` and those before it."""
        before, tokens = self._tokens(prompt, is_begin=True), self._tokens(text, is_begin=False)
        status, answer = servers.post_json(self._server.port, "/tokenize", {"content": text, "with_pieces": True})
        if status != 200:
            raise RuntimeError(f"/tokenize answered {status}: {answer}")
        entries: list[dict[str, Any]] = []
        for row in answer["tokens"]:
            piece = row["piece"]
            entries.append({"id": row["id"], "bytes": list(piece.encode()) if isinstance(piece, str) else piece})
        position, holder = 0, len(entries) - 1
        for i, entry in enumerate(entries):
            if position <= at_byte:
                holder = i
            position += len(entry["bytes"])
        for i in range(max(holder - LOOK_BACK, 0), holder + 1):
            (out,) = ask(self._server, [request(PEER + COMPUTING, before + tokens[:i], 0, 1)])
            self.n_asked += 1
            best = out.logprobs[0]["top_logprobs"]
            chosen = next((one for one in best if one["id"] == entries[i]["id"]), None)
            entries[i]["logprob"] = chosen["logprob"] if chosen else float("-inf")
            entries[i]["top_logprobs"] = best
        return entries


def verdict_of(prompt: str, known: Outcome, computed: str, text: str, probe: Probe) -> Verdict:
    """Judge ``text`` against ``computed``, by the log-probabilities of ``known`` as far as it went the same way."""
    if judge(computed, (), text).kind == "exact":
        return Verdict("exact")
    parting = len(shared(computed, text))
    for same, other in ((computed, text), (text, computed)):
        if known.text == same or len(shared(known.text, same)) > parting:
            return judge(known.text, known.logprobs, other)
    return judge(computed, probe.logprobs(prompt, computed, parting), text)


def shared(a: str, b: str) -> bytes:
    """The bytes that two texts begin with."""
    left, right = a.encode(), b.encode()
    n = next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right)))
    return left[:n]


def report(result: dict[str, Any]) -> str:
    header = ["cached-equality", "against", "exact", f"tie ≤ {TIE_GAP}", "different"]
    rows = [
        [*name.split(" | "), *(row[key] for key in ("exact", "tie", "different"))]
        for name, row in result["against"].items()
    ]
    used = [[name, *row.values()] for name, row in result["servers"].items()]
    return (
        f"{common.table(header, rows)}\n\n{common.table(['server', 'prompt tokens', 'cached', 'seconds'], used)}\n"
        f"({result['prompts']} prompts, {result['max_tokens']} tokens out, one at a time; holds: {result['holds']})"
    )
