"""The scenarios that both servers do alike, in interleaved rounds: one client, eight clients, first token."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench import clients, common, servers
from bench.answers import Outcome, RawCall, parse
from bench.context import MULLAMA, Context, Figures, interleaved
from bench.online import check_lengths, requests

Work = Callable[[servers.Server], Figures]


def warm_up(pool: servers.Pool, context: Context) -> None:
    """Both servers have decoded alone and side by side before anything is measured."""
    for name in pool.servers:
        server = pool.use(name)
        work = requests(
            context.prompts(),
            server.kind,
            context.parallel,
            prompt_tokens=32,
            max_tokens=16,
            sampling=clients.GREEDY,
            seed=0,
        )
        clients.run(clients.closed_loop(server.port, [work[:1]]))
        clients.run(clients.closed_loop(server.port, [[request] for request in work[1:]]))


def load_work(context: Context, n_clients: int, per_client: int, max_tokens: int, sampling: dict[str, Any]) -> Work:
    """``n_clients`` closed-loop clients; both servers get the same prompts."""
    prompts = context.prompts().many(n_clients * per_client, context.prompt_tokens)
    seeds = range(context.seed, context.seed + len(prompts))

    def work(server: servers.Server) -> Figures:
        made = [
            clients.completion_request(
                server.kind,
                prompt,
                max_tokens,
                sampling=sampling if sampling.get("temperature") == 0 else sampling | {"seed": seed},
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        groups = [made[i::n_clients] for i in range(n_clients)]
        outcomes = clients.run(clients.closed_loop(server.port, groups))
        figures = clients.load_figures(outcomes)
        if figures["errors"]:
            raise RuntimeError(f"{server.name}: {figures['errors']} requests failed: {figures['first_error']}")
        if warning := check_lengths(outcomes, context.prompt_tokens, max_tokens):
            raise RuntimeError(f"{server.name}: {warning}")
        return flat(figures)

    return work


def flat(figures: dict[str, Any]) -> Figures:
    """The figures that are compared, in the order in which they are shown."""
    return {
        "tok_s": figures["tok_s"],
        "decode_tok_s": figures["decode_tok_s"],
        "ttft_p50_ms": figures["ttft_ms"]["p50"],
        "ttft_p99_ms": figures["ttft_ms"]["p99"],
        "itl_p50_ms": figures["itl_ms"]["p50"],
        "itl_p99_ms": figures["itl_ms"]["p99"],
        "tokens_per_chunk": figures["tokens_per_chunk"],
        "cached_tokens": float(figures["cached_tokens"]),
    }


def one(context: Context, pool: servers.Pool) -> dict[str, Any]:
    """One client, 128 tokens out, greedy: the total rate and the rate from the second token on."""
    return interleaved(context, "one", pool, lambda _: load_work(context, 1, 3, 128, clients.GREEDY))


def eight_greedy(context: Context, pool: servers.Pool) -> dict[str, Any]:
    """Eight clients, unique 140-token prompts, 64 tokens out, greedy."""
    return interleaved(
        context, "eight-greedy", pool, lambda _: load_work(context, 8, 2, context.max_tokens, clients.GREEDY)
    )


def eight_sampled(context: Context, pool: servers.Pool) -> dict[str, Any]:
    """The same with temperature 0.8, top-k 40, top-p 0.95."""
    return interleaved(
        context, "eight-sampled", pool, lambda _: load_work(context, 8, 2, context.max_tokens, clients.SAMPLED)
    )


# --- time to the first token ------------------------------------------------------------------


CLOSED = "the server closed the connection"


def raw_connection(port: int) -> socket.socket:
    sock = socket.create_connection((servers.HOST, port), timeout=60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def first_token(sock: socket.socket, request: bytes) -> Outcome:
    """One request on a raw blocking keep-alive socket, for the least noise on the client's side."""
    call = RawCall(time.monotonic_ns())
    sock.sendall(request)
    head, tail = b"", b""  # a head can end like a body's last chunk: "Keep-Alive: … max=100"
    while not tail.endswith(b"0\r\n\r\n"):
        data = sock.recv(65536)
        if not data:
            call.error = CLOSED
            break
        call.packets.append((time.monotonic_ns(), data))
        if b"\r\n\r\n" in head:
            tail = (tail + data)[-5:]
        else:
            head += data
            tail = head.partition(b"\r\n\r\n")[2][-5:]
        if len(call.packets) == 1 and not data.startswith(b"HTTP/1.1 200"):
            call.error = data.split(b"\r\n", 1)[0].decode("latin-1")
            break
    call.ended_ns = time.monotonic_ns()
    return parse(call)


def prefill_ms(out: Outcome) -> float:
    """The time the server spent decoding the prompt, by its own account."""
    if out.profile is not None:
        return float(out.profile["prefill_ms"])
    if out.timings is not None:
        return float(out.timings["prompt_ms"])
    raise RuntimeError("the answer carried neither a profile nor timings")


def short_ttft(context: Context, pool: servers.Pool, n: int = 200, pause: float = 0.02) -> dict[str, Any]:
    """20-token prompts one at a time on an idle server: TTFT, and what of it was not the prompt's decode.

    The n requests are spread over the rounds. llama-server's ``prompt_ms`` counts more than the decode call alone
    (it starts when the slot starts), so its overhead is a lower bound; mullama's ``prefill_ms`` is the decode.
    """
    each = -(-n // context.rounds)

    def prepare(_: int) -> Work:
        prompts = context.prompts().many(each, 20)

        def work(server: servers.Server) -> Figures:
            ttfts, overheads = [], []
            sock = raw_connection(server.port)
            try:
                for prompt in prompts:
                    request = clients.completion_request(server.kind, prompt, 4, profile=server.kind == MULLAMA)
                    if server.kind != MULLAMA:  # it closes its connections after a streamed answer
                        sock.close()
                        sock = raw_connection(server.port)
                    time.sleep(pause)  # the server falls idle, its threads asleep
                    out = first_token(sock, request)
                    if (
                        out.error == CLOSED
                    ):  # llama-server closes after a streamed answer: its next one gets a fresh one
                        sock.close()
                        sock = raw_connection(server.port)
                        out = first_token(sock, request)
                    if out.error is not None:
                        raise RuntimeError(f"{server.name}: {out.error}")
                    if out.ttft_ms is None:
                        continue  # four tokens without a whole character
                    ttfts.append(out.ttft_ms)
                    overheads.append(out.ttft_ms - prefill_ms(out))
            finally:
                sock.close()
            if not ttfts:
                raise RuntimeError(f"{server.name}: no answer held any text")
            return {
                "ttft_ms": statistics.median(ttfts),
                "overhead_ms": statistics.median(overheads),
                "overhead_p99_ms": common.percentile(overheads, 99),
            }

        return work

    return interleaved(context, "short-ttft", pool, prepare)


# --- start ------------------------------------------------------------------------------------


def startup(context: Context, _: servers.Pool | None = None, n: int = 5) -> dict[str, Any]:
    """Spawn to the first 200 of /ready (mullama) or /health (llama-server), one after the other, n times."""
    times: dict[str, list[float]] = {}
    for i in range(n):
        for kind in (MULLAMA, servers.LLAMA_SERVER):
            with context.server(kind) as server:
                times.setdefault(kind, []).append(server.ready_s)
                common.progress(f"startup {i + 1}/{n}: {kind} {server.ready_s:.2f} s")
    return {kind: common.summarize(values) for kind, values in times.items()}
