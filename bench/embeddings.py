"""Embeddings over HTTP beside llama-server's ``--embedding``, of the same file, in one run.

    python bench/peers.py --build-only
    python bench/embeddings.py --model minilm

Rounds are interleaved; both servers stay loaded, and sleep when it is not their turn. Bodies are made beforehand and
answers are only counted, so that the client costs little of the cores that it shares; the first answers are compared:
lengths by ``usage``, and vectors by their cosine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import build_peers, common, models, servers
from bench.common import progress
from bench.servers import LLAMA_SERVER, MULLAMA, Server

#: Words of one token each in BERT's English vocabulary.
WORDS = (
    "the river runs through a small town where people work every day in old stone houses near green fields and "
    "quiet streets some walk to market others read books or write letters while children play games under tall "
    "trees when night falls lights shine from open windows music plays dogs bark far away rain comes with cold wind "
    "but inside it is warm bread fire burns friends talk about war peace love money law science history art food "
    "health school"
)


@dataclass(frozen=True)
class Work:
    """``n_clients`` ask at once, each for ``batch`` texts of ``n_tokens``."""

    n_tokens: int
    batch: int
    n_clients: int

    @property
    def name(self) -> str:
        return f"{self.n_tokens} tokens, {self.n_clients} × {self.batch}"


WORKS = (Work(20, 32, 4), Work(200, 32, 4), Work(20, 1, 8), Work(200, 1, 8))


def texts_of(work: Work, n: int, seed: int) -> list[str]:
    """Texts of exactly so many tokens, with the two that the vocabulary puts around them."""
    rng = random.Random(f"{seed}-{work.n_tokens}")
    return [" ".join(rng.choices(WORDS.split(" "), k=work.n_tokens - 2)) for _ in range(n)]


def bodies_of(work: Work, n: int, seed: int) -> list[bytes]:
    texts = texts_of(work, n * work.batch, seed)
    batches = [texts[i * work.batch : (i + 1) * work.batch] for i in range(n)]
    return [json.dumps({"model": "bench", "input": batch}).encode() for batch in batches]


def measure(port: int, work: Work, seconds: float, seed: int) -> float:
    """Texts a second of clients that ask anew as soon as they are answered."""
    bodies = bodies_of(work, 32, seed)
    counts = [0] * work.n_clients
    begun = time.monotonic()
    ends = begun + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(servers.HOST, port, timeout=120)
        i = number
        while time.monotonic() < ends:
            connection.request("POST", "/v1/embeddings", bodies[i % len(bodies)], {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}")
            counts[number] += work.batch
            i += work.n_clients
        connection.close()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(work.n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - begun)


def answer_of(port: int, work: Work) -> tuple[list[list[float]], int]:
    body = json.loads(bodies_of(work, 1, 99)[0])
    status, answer = servers.post_json(port, "/v1/embeddings", body)
    if status != 200:
        raise RuntimeError(f"{status}: {answer}")
    return [one["embedding"] for one in answer["data"]], int(answer["usage"]["prompt_tokens"])


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def compare(ports: dict[str, int], work: Work) -> float:
    """The smallest cosine of the servers' vectors. Raises RuntimeError for other numbers of tokens."""
    found = {name: answer_of(port, work) for name, port in ports.items()}
    for name, (_, n) in found.items():
        if n != work.n_tokens * work.batch:
            raise RuntimeError(f"{name}: {n} tokens where {work.n_tokens * work.batch} were meant")
    first, *others = (vectors for vectors, _ in found.values())
    return min((cosine(a, b) for one in others for a, b in zip(first, one, strict=True)), default=math.nan)


def peer(binary: Path, model: str, threads: int, parallel: int, n_ctx: int) -> Server:
    port = servers.free_port()
    command = servers.llama_server_command(binary, model, port, ctx=n_ctx, parallel=parallel, threads=threads)
    ubatch = str(max(512, min(n_ctx * parallel, 2048)))
    command += ["--embedding", "-b", ubatch, "-ub", ubatch]
    return Server(f"{LLAMA_SERVER} -np {parallel}", LLAMA_SERVER, command, port)


def ours(model: str, threads: int, extra: Sequence[str]) -> Server:
    port = servers.free_port()
    command = servers.mullama_command(f"bench={model}", port, ctx=512, parallel=8, threads=threads, extra=extra)
    return Server(MULLAMA, MULLAMA, command, port)


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = str(models.model_file(args.model))
    pool = [ours(model, args.threads, args.ours_arg)]
    if not args.alone:
        binary = args.llama_server or build_peers.Tools.at().server
        pool += [peer(binary, model, args.threads, n, 512) for n in args.peer_parallel]
    results: dict[str, Any] = {}
    try:
        for one in pool:
            progress(f"starting {one.name}")
            one.start()
        ports = {one.name: one.port for one in pool}
        for work in WORKS:
            least = compare(ports, work)
            rates: dict[str, list[float]] = {name: [] for name in ports}
            for i in range(args.rounds):
                order = list(ports) if i % 2 == 0 else list(ports)[::-1]
                for name in order:
                    time.sleep(0.5)
                    measure(ports[name], work, 0.5, seed=i)
                    rates[name].append(measure(ports[name], work, args.seconds, seed=1000 + i))
                progress(f"{work.name}: {', '.join(f'{name} {rates[name][-1]:.0f}/s' for name in ports)}")
            results[work.name] = {
                "least_cosine": least, "rounds": rates,
                "texts_s": {name: common.summarize(values) for name, values in rates.items()},
            }  # fmt: skip
    finally:
        for one in pool:
            one.stop()
    return results


def report(results: dict[str, Any]) -> str:
    names = list(next(iter(results.values()))["texts_s"])
    rows = []
    for work, found in results.items():
        mine, *others = (found["texts_s"][name]["median"] for name in names)
        best = common.ratio(mine, max(others)) if others else None
        rows.append([work, mine, *others, best, f"{found['least_cosine']:.6f}"])
    return common.table(["texts a second", *names, "ratio to the best", "least cosine"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--llama-server", type=Path, help="default: the one that peers.py builds")
    parser.add_argument("--peer-parallel", type=int, nargs="*", default=[4, 32], help="slots; each is a server")
    parser.add_argument("--alone", action="store_true", help="without llama-server")
    parser.add_argument("--ours-arg", action="append", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    servers.install_signal_cleanup()
    results = run(args)
    print(report(results))
    common.write_record(common.record("embeddings", vars(args), results), args.json)


if __name__ == "__main__":
    main()
