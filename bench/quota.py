"""mullama under a CPU quota: the rate of each thread count beside that of one thread without a quota.

    python -m bench.quota --quotas 0.5 1 1.5

A control group of version 1 or 2 is made for each server, which takes root and a writable hierarchy. All servers are
started first and idle while another one is measured; rounds are interleaved, medians are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import clients, common, models, servers
from bench.common import progress

PERIOD_US = 100_000
LOADS = {"1 client": (1, 192), "8 clients": (8, 48)}  # clients, tokens each
PROMPT = list(range(300, 340))


@contextlib.contextmanager
def group(cores: float | None) -> Iterator[Path | None]:
    """A control group with such a quota, empty again at the end; None where there is to be no quota."""
    if cores is None:
        yield None
        return
    name = f"mullama-bench-{os.getpid()}-{cores:g}"
    old = Path("/sys/fs/cgroup/cpu") / name
    new = Path("/sys/fs/cgroup") / name
    folder = old if old.parent.is_dir() else new
    try:
        folder.mkdir(exist_ok=True)
        if folder == old:
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(round(cores * PERIOD_US)))
        else:
            (folder / "cpu.max").write_text(f"{round(cores * PERIOD_US)} {PERIOD_US}")
    except OSError as error:
        raise SystemExit(f"no control group with a quota can be made here: {error}") from None
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def command(model: str, port: int, threads: int, folder: Path | None, extra: list[str]) -> list[str]:
    """The server's command, in its group from the first instruction on."""
    serve = [*(sys.executable, "-P", "-m", "mullama", "serve", "--model", model, "--host", servers.HOST)]
    serve += ["--port", str(port), "--ctx-size", "1024", "--parallel", "8", "--kv-host-bytes", "0"]
    serve += ["--threads", str(threads), "--log-level", "warning", "--drain-timeout", "1", *extra]
    if folder is None:
        return serve
    return ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh", *serve]


def rate(port: int, n_clients: int, n_tokens: int, salt: int) -> float:
    """Tokens a second of so many clients at once. Raises RuntimeError when a request failed."""
    requests = [
        [clients.completion_request(servers.MULLAMA, [*PROMPT, 400 + salt, 500 + i], n_tokens)]
        for i in range(n_clients)
    ]  # fmt: skip
    figures = clients.load_figures(clients.run(clients.closed_loop(port, requests)))
    if figures["errors"]:
        raise RuntimeError(figures["first_error"])
    return float(figures["tok_s"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--quotas", type=float, nargs="+", default=[1.0, 1.5], metavar="CORES")
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2], help="0: what mullama chooses")
    parser.add_argument("--fixed", action="store_true", help="without the governor where a number is given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="where to write the record; default: bench/results/")
    args = parser.parse_args()
    servers.install_signal_cleanup()
    cases: list[tuple[float | None, int]] = [(None, 1), (None, 2), *((q, t) for q in args.quotas for t in args.threads)]
    rates: dict[tuple[float | None, int], dict[str, list[float]]] = {case: {k: [] for k in LOADS} for case in cases}
    model = str(models.model_file(args.model))
    with contextlib.ExitStack() as stack:
        running: dict[tuple[float | None, int], int] = {}
        folders = {quota: stack.enter_context(group(quota)) for quota in dict.fromkeys(q for q, _ in cases)}
        for quota, threads in cases:
            port = servers.free_port()
            extra = ["--threads-fixed"] if args.fixed and threads else []
            name = f"quota {quota}, threads {threads}"
            server = servers.Server(name, servers.MULLAMA, command(model, port, threads, folders[quota], extra), port)
            stack.enter_context(server)
            running[quota, threads] = port
            progress(f"{name}: ready after {server.ready_s:.1f} s")
        for i in range(args.rounds + 1):  # the first one warms up
            for case, port in running.items():
                for load, (n_clients, n_tokens) in LOADS.items():
                    found = rate(port, n_clients, n_tokens, i)
                    if i:
                        rates[case][load].append(found)
            progress(f"round {i} of {args.rounds}")
    base = {load: statistics.median(values) for load, values in rates[None, 1].items()}
    rows = [
        [
            "none" if quota is None else f"{quota:g}",
            threads or "auto",
            *(cell for load in LOADS for cell in _cells(rates[quota, threads][load], base[load])),
        ]
        for quota, threads in cases
    ]
    header = ["quota, cores", "threads", *(cell for load in LOADS for cell in (f"{load}, t/s", "x 1 thread"))]
    print(common.table(header, rows))
    results = [
        {"quota": quota, "threads": threads, "rates": rates[quota, threads]} for quota, threads in cases
    ]  # fmt: skip
    common.write_record(common.record("quota", vars(args), results), args.json)
    return 0


def _cells(values: list[float], base: float) -> tuple[float, float]:
    median = statistics.median(values)
    return median, median / base


if __name__ == "__main__":
    sys.exit(main())
