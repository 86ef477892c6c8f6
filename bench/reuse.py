"""Scenarios in which prompts return: a shared system prompt, and chats of several turns.

Both servers keep their caches on, as a user would have them: llama-server with its host-memory prompt cache
(``-cram``, on by default; ``--peer-arg=-cram --peer-arg=0`` turns it off). Every round has texts of its own, so each
round starts cold.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from bench import calibrate, clients, common, servers
from bench.answers import Outcome, RawCall, parse
from bench.context import MULLAMA, PEER, Context, Figures, interleaved
from bench.scenarios import Work

PREFIX_TOKENS = 930
SUFFIX_TOKENS = 20
OUT_TOKENS = 32
CHATS, TURNS = 16, 4
TURN_TOKENS = 60


@contextlib.contextmanager
def caching_pool(context: Context) -> Iterator[servers.Pool]:
    """Both servers with everything on that helps when prompts return."""
    peer = context.server(PEER)
    if "-cram" not in context.peer_args:
        peer.command += ["-cram", "8192"]
    with servers.Pool([context.server(MULLAMA), peer], restart=context.restart) as pool:
        yield pool


def body_of(**fields: Any) -> dict[str, Any]:
    return {
        "max_tokens": OUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


def figures_of(server: servers.Server, outcomes: Sequence[Outcome]) -> Figures:
    figures = clients.load_figures(outcomes)
    if figures["errors"]:
        raise RuntimeError(f"{server.name}: {figures['errors']} requests failed: {figures['first_error']}")
    return {
        "tok_s": figures["tok_s"],
        "ttft_p50_ms": figures["ttft_ms"]["p50"],
        "ttft_p99_ms": figures["ttft_ms"]["p99"],
        "itl_p50_ms": figures["itl_ms"]["p50"],
        "itl_p99_ms": figures["itl_ms"]["p99"],
        "prompt_tokens": float(figures["prompt_tokens"]),
        "cached_share": figures["cached_tokens"] / figures["prompt_tokens"],
    }


def shared_prefix(context: Context, _: servers.Pool | None = None) -> dict[str, Any]:
    """Eight clients, 24 requests that begin with the same 930 tokens, 32 tokens out, cold; and the engine's limit."""
    prompts = context.prompts()

    def prepare(_: int) -> Work:
        prefix = prompts.make(PREFIX_TOKENS)
        made = [
            clients.http_post("/v1/completions", body_of(prompt=f"{prefix} {prompts.make(SUFFIX_TOKENS)}"))
            for _ in range(24)
        ]

        def work(server: servers.Server) -> Figures:
            groups = [made[i::8] for i in range(8)]
            return figures_of(server, clients.run(clients.closed_loop(server.port, groups)))

        return work

    with caching_pool(context) as pool:
        result = interleaved(context, "shared-prefix", pool, prepare)
    limit = engine_limit(context)
    ours = result[MULLAMA]["tok_s"]["median"]
    return result | {"limit": limit, "of_limit": ours / limit["tok_s"]}


def engine_limit(context: Context, n: int = 3) -> Figures:
    """Tokens a second of the same work by llama.cpp's own tools: the prefix once, 24 suffixes, decodes of eight."""
    threads = str(context.threads)
    depth = PREFIX_TOKENS + SUFFIX_TOKENS
    runs: list[Figures] = []
    for _ in range(n):
        bench = calibrate.llama_bench_rows(
            context.tools.bench, str(context.model), ["-p", str(PREFIX_TOKENS), "-n", "0", "-t", threads, "-r", "1"]
        )
        prefix_s = PREFIX_TOKENS / float(bench[0]["avg_ts"])
        bench = calibrate.llama_bench_rows(
            context.tools.bench,
            str(context.model),
            ["-p", str(SUFFIX_TOKENS), "-n", "0", "-d", str(PREFIX_TOKENS), "-t", threads, "-r", "3"],
        )
        suffixes_s = 24 * SUFFIX_TOKENS / float(bench[0]["avg_ts"])
        command = [
            *(str(context.tools.batched_bench), "-m", str(context.model), "-c", str(context.ctx * 8)),
            *("-b", "512", "-ub", "512", "-npp", str(depth), "-ntg", str(OUT_TOKENS), "-npl", "8"),
            *("-t", threads, "-tb", threads, "--output-format", "jsonl", "--fit", "off", "--offline"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise RuntimeError(f"llama-batched-bench exited with {done.returncode}: {done.stderr[-500:]}")
        rate = float(calibrate.jsonl(done.stdout)[0]["speed_tg"])
        # A token of each answer comes out of its prompt.
        total_s = prefix_s + suffixes_s + 24 * (OUT_TOKENS - 1) / rate
        runs.append(
            {
                "prefix_s": prefix_s,
                "suffixes_s": suffixes_s,
                "decode_tok_s": rate,
                "tok_s": 24 * OUT_TOKENS / total_s,
            }
        )
    return {key: cell["median"] for key, cell in common.median_by_key(runs).items()}


def chats(context: Context, _: servers.Pool | None = None) -> dict[str, Any]:
    """Sixteen four-turn chats at once over eight sequences, 32 tokens out a turn."""
    prompts = context.prompts()

    def prepare(_: int) -> Work:
        texts = [[prompts.make(TURN_TOKENS) for _ in range(TURNS)] for _ in range(CHATS)]

        def work(server: servers.Server) -> Figures:
            outcomes = clients.run(_talk(server.port, texts))
            later = [out for chat in outcomes for out in chat[1:]]
            found = figures_of(server, [out for chat in outcomes for out in chat])
            reused = sum(out.cached_tokens for out in later) / sum(out.prompt_tokens for out in later)
            return found | {"cached_share_later_turns": reused}

        return work

    with caching_pool(context) as pool:
        return interleaved(context, "chats", pool, prepare)


async def _talk(port: int, texts: Sequence[Sequence[str]]) -> list[list[Outcome]]:
    """Every chat sends its next turn when the last one is answered."""

    async def one(turns: Sequence[str]) -> list[Outcome]:
        connection = clients.Connection(port)
        messages: list[dict[str, str]] = []
        outcomes = []
        try:
            for text in turns:
                messages.append({"role": "user", "content": text})
                call: RawCall = await connection.call(
                    clients.http_post("/v1/chat/completions", body_of(messages=messages))
                )
                outcomes.append(parse(call))
                messages.append({"role": "assistant", "content": outcomes[-1].text})
        finally:
            connection.close()
        return outcomes

    return list(await asyncio.gather(*(one(turns) for turns in texts)))


def report_shared(result: dict[str, Any]) -> str:
    from bench.context import comparison_table

    limit = result["limit"]
    return (
        comparison_table("shared-prefix", result)
        + f"\nengine limit {common.number(limit['tok_s'])} tok/s (prefix {limit['prefix_s']:.2f} s, 24 suffixes "
        f"{limit['suffixes_s']:.2f} s, decode {common.number(limit['decode_tok_s'])} tok/s): mullama is at "
        f"{result['of_limit']:.3f} of it"
    )
