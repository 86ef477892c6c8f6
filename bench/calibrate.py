"""Was the machine itself? A fixed amount of work before and after every round, and a rule that discards rounds.

The work needs no model and no third-party package: SHA-256 in one thread and in two (hashlib releases the GIL, so
two threads really use two cores), and a copy through memory. A neighbour on a core shows in the pair "one thread
against two" first, because its share shrinks. Where llama-bench is at hand, a short decode with one and with two
threads is added: ggml's spinning barriers feel a stolen core long before anything else does.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

BLOCK = bytes(1 << 20)
HASH_BLOCKS = 128  # MiB a thread: some 0.1 s with SHA instructions
COPY_BYTES = 64 << 20
TOLERANCE = 0.10

Calibration = dict[str, float]  # every value is a rate: higher is better


def _hash(blocks: int) -> None:
    digest = hashlib.sha256()
    for _ in range(blocks):
        digest.update(BLOCK)


def hash_rate(threads: int, blocks: int = HASH_BLOCKS) -> float:
    """MiB a second over all threads together."""
    workers = [threading.Thread(target=_hash, args=(blocks,)) for _ in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return threads * blocks / (time.perf_counter() - begin)


def copy_rate(n_bytes: int = COPY_BYTES) -> float:
    """MiB a second of memory copied by one thread, the best of five (the first one pays for page faults)."""
    source, target = bytearray(n_bytes), bytearray(n_bytes)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        memoryview(target)[:] = source
        best = max(best, (n_bytes >> 20) / (time.perf_counter() - begin))
    return best


def calibrate(llama_bench: Path | None = None, model: str | None = None) -> Calibration:
    """One calibration; about half a second, two with llama-bench."""
    result = {"hash_1": hash_rate(1), "hash_2": hash_rate(2), "copy": copy_rate()}
    if llama_bench is not None and model is not None:
        for row in llama_bench_rows(llama_bench, model, ["-p", "0", "-n", "16", "-t", "1,2", "-r", "1"]):
            result[f"decode_{row['n_threads']}"] = float(row["avg_ts"])
    return result


def llama_bench_rows(binary: Path, model: str, args: Sequence[str], timeout: float = 600.0) -> list[dict[str, float]]:
    """Run llama-bench and return its rows. Raises RuntimeError with its last words when it fails."""
    command = [str(binary), "-m", model, *args, "-o", "jsonl", "--offline"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{binary.name} exited with {done.returncode}: {done.stderr[-500:]}")
    return jsonl(done.stdout)


def jsonl(text: str) -> list[dict[str, float]]:
    """The JSON objects among the lines of a tool's output."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def best_of(calibrations: Sequence[Mapping[str, float]]) -> Calibration:
    keys = dict.fromkeys(key for calibration in calibrations for key in calibration)
    return {key: max(c[key] for c in calibrations if key in c) for key in keys}


def faults(calibration: Mapping[str, float], best: Mapping[str, float], tolerance: float = TOLERANCE) -> list[str]:
    """Why this calibration says that the machine was not itself; empty when it was.

    Hash rates must lie within ``tolerance`` of the best seen, the copy rate (shared with all of a host's guests, so
    noisier) within twice of it. Decode rates vary more between runs of 16 tokens, so there only the tell-tale
    counts: two threads slower than one by more than ``tolerance``.
    """
    found = [
        f"{key} {calibration[key]:.0f} of {best[key]:.0f}"
        for key, allowed in (("hash_1", tolerance), ("hash_2", tolerance), ("copy", 2 * tolerance))
        if key in calibration and calibration[key] < (1 - allowed) * best[key]
    ]
    one, two = calibration.get("decode_1"), calibration.get("decode_2")
    if one is not None and two is not None and two < (1 - tolerance) * one:
        found.append(f"decode with 2 threads {two:.0f} t/s, with 1 {one:.0f}")
    return found


def keep(rounds: Sequence[tuple[Calibration, Calibration]], tolerance: float = TOLERANCE) -> list[bool]:
    """For each round, bracketed by two calibrations, whether it may be believed."""
    best = best_of([calibration for pair in rounds for calibration in pair])
    return [not any(faults(calibration, best, tolerance) for calibration in pair) for pair in rounds]
