"""What every scenario of peers.py is given: the tools, the model, the servers and the prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import calibrate, common, servers
from bench.build_peers import Tools
from bench.common import progress
from bench.prompts import PromptMaker

MULLAMA = servers.MULLAMA
PEER = servers.LLAMA_SERVER

Figures = dict[str, float]

#: Before each turn. llama-server threads go on spinning for some 0.2 s after a decode (poll level 50), which whoever
#: comes next would pay for.
SETTLE_S = 1.0


@dataclass
class Context:
    tools: Tools
    model: Path
    reference: str = ""  # how mullama is told the model: a name in its store, or empty for the file
    ctx: int = 2048
    parallel: int = 8
    threads: int = 2
    rounds: int = 7
    seed: int = 0
    restart: bool = False
    prompt_tokens: int = 140
    max_tokens: int = 64
    count: int = 0  # prompts of a scenario that takes many of them; 0: as many as it says
    mullama_args: Sequence[str] = ()
    peer_args: Sequence[str] = ()
    _maker: PromptMaker | None = field(default=None, repr=False)

    def server(self, kind: str, *, name: str | None = None, threads: int | None = None) -> servers.Server:
        """A server that is not started yet, on a port of its own."""
        port = servers.free_port()
        n_threads = self.threads if threads is None else threads
        if kind == MULLAMA:
            command = servers.mullama_command(
                self.reference or str(self.model),
                port,
                ctx=self.ctx,
                parallel=self.parallel,
                threads=n_threads,
                extra=self.mullama_args,
            )
        else:
            command = servers.llama_server_command(
                self.tools.server,
                str(self.model),
                port,
                ctx=self.ctx,
                parallel=self.parallel,
                threads=n_threads,
                extra=self.peer_args,
            )
        return servers.Server(name or kind, kind, command, port)

    def pool(self) -> servers.Pool:
        return servers.Pool([self.server(MULLAMA), self.server(PEER)], restart=self.restart)

    def prompts(self) -> PromptMaker:
        """One maker for the whole run, so no prompt ever returns. Counts with llama-server's tokenizer, up front.

        Both servers read the same file, so they tokenise alike; every result is checked against ``usage`` anyway.
        The calibrated form asks a few times and then needs no server, which may not be running later.
        """
        if self._maker is None:
            progress("learning the tokenizer's words")
            with self.server(PEER) as server:
                _, count = servers.token_counter(server)
                self._maker = PromptMaker.calibrated(self.seed, count)
        return self._maker


def interleaved(
    context: Context, name: str, pool: servers.Pool, prepare: Callable[[int], Callable[[servers.Server], Figures]]
) -> dict[str, Any]:
    """Rounds in which both servers do the same work, each round bracketed by calibrations.

    ``prepare(i)`` makes round i's work (so that both get equal prompts) and returns the measurement. The order
    alternates between rounds. Rounds in which the machine was not itself are discarded and repeated, up to twice the
    number asked for. Returns medians of the kept rounds, ratios mullama / llama-server (the median of the
    rounds' ratios), and all rounds with their calibrations.
    """
    rounds: list[dict[str, Any]] = []
    calibrations: list[tuple[calibrate.Calibration, calibrate.Calibration]] = []
    kept: list[bool] = []
    while sum(kept) < context.rounds and len(rounds) < 2 * context.rounds:
        i = len(rounds)
        work = prepare(i)
        before = calibrate.calibrate(context.tools.bench, str(context.model))
        row: dict[str, Any] = {"idle_cpu": 0.0}  # of the server whose turn it is not, the worse of the two
        for kind in (MULLAMA, PEER) if i % 2 == 0 else (PEER, MULLAMA):
            server = pool.use(kind)
            time.sleep(SETTLE_S)
            row[kind] = work(server)
            row["idle_cpu"] = max(row["idle_cpu"], pool.idle_cpu())
        after = calibrate.calibrate(context.tools.bench, str(context.model))
        rounds.append(row)
        calibrations.append((before, after))
        kept = calibrate.keep(calibrations)  # judged anew: the best seen may have risen
        shown = ", ".join(f"{kind} {common.number(next(iter(row[kind].values())))}" for kind in (MULLAMA, PEER))
        progress(f"{name} round {i + 1}: {shown}{'' if kept[-1] else ' (discarded: the machine was not itself)'}")
    good = [row for row, believed in zip(rounds, kept, strict=True) if believed]
    ours, theirs = [row[MULLAMA] for row in good], [row[PEER] for row in good]
    return {
        "kept": len(good),
        "discarded": len(rounds) - len(good),
        MULLAMA: common.median_by_key(ours),
        PEER: common.median_by_key(theirs),
        "ratio": common.median_by_key(
            [{k: common.ratio(a[k], b[k]) for k in a if k in b} for a, b in zip(ours, theirs, strict=True)]
        ),
        "idle_cpu": max(row["idle_cpu"] for row in rounds),
        "rounds": [
            {"kept": believed, "calibration": pair, **row}
            for row, pair, believed in zip(rounds, calibrations, kept, strict=True)
        ],
    }


def _ratio(cell: dict[str, float] | None) -> str:
    return f"{cell['median']:.3f}" if cell and cell["n"] else "–"


def comparison_table(name: str, result: dict[str, Any]) -> str:
    """Medians of both servers with their middle-half spread, and the ratio."""

    def spread(cell: dict[str, float]) -> str:
        return f"{common.number(cell['median'])} ± {common.number(cell['iqr'] / 2)}"

    rows = [
        [key, spread(ours), spread(result[PEER][key]), _ratio(result["ratio"].get(key))]
        for key, ours in result[MULLAMA].items()
        if key in result[PEER]
    ]
    only = [[key, spread(ours), "–", "–"] for key, ours in result[MULLAMA].items() if key not in result[PEER]]
    text = common.table([name, MULLAMA, PEER, "ratio"], rows + only)
    notes = f"{result['kept']} rounds kept, {result['discarded']} discarded"
    if result["idle_cpu"] > 0.02:
        notes += f"; the idle server used {result['idle_cpu']:.0%} of a core: repeat with --restart"
    return f"{text}\n({notes})"
