"""A long run of one target: rounds of libFuzzer (through atheris) in children, and what they found.

Native code is guided by its coverage, too, where the core was built for it (docs/testing.md says how).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from . import ROOT
from .targets import corpus, load

ROUND_SECONDS = 300
MOST_BYTES = 8192
PATIENCE_SECONDS = 60  # of one input, before libFuzzer calls it a hang
MOST_MIB = 3000
_STATUS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")
_RUNS = re.compile(r"stat::number_of_executed_units: *(\d+)|^#(\d+)\s", re.MULTILINE)


@dataclass
class Told:
    """What a campaign has done."""

    target: str
    runs: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    coverage: int = 0  # edges, of Python and of instrumented native code
    features: int = 0
    corpus: int = 0
    findings: list[str] = field(default_factory=list)


class PlainFiles:
    """Finds mullama's Python files as plain ones: atheris cannot instrument what an editable install's loader loads."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if fullname.partition(".")[0] != "mullama":
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:  # type: ignore[arg-type]
            spec = finder.find_spec(fullname, path, target)  # type: ignore[arg-type]
            if spec is not None:
                if spec.origin is not None and spec.origin.endswith(".py"):
                    spec.loader = SourceFileLoader(fullname, spec.origin)
                return spec
        return None


def fuzz(name: str, arguments: list[str]) -> None:
    """The child: never returns."""
    import atheris

    with atheris.instrument_imports(include=["mullama"]):
        sys.meta_path.insert(1, PlainFiles())
        target = load(name)

    def one(data: bytes) -> None:
        target(data)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return target.change(rng, bytes(data))[:most]
        return bytes(atheris.Mutate(data, most))

    words = tempfile.NamedTemporaryFile("w", encoding="ascii", suffix=".dict")  # noqa: SIM115 - until the process ends
    words.write("".join(f'"{_escaped(word)}"\n' for word in target.words))
    words.flush()
    atheris.Setup([sys.argv[0], f"-dict={words.name}", *arguments], one, custom_mutator=mutate)
    atheris.Fuzz()


def run(name: str, seconds: float, work: Path) -> int:
    """Fuzz for so much processor time. Prints what was done; returns 1 when something was found."""
    if importlib.util.find_spec("atheris") is None:
        print("this needs atheris: python -m pip install atheris", file=sys.stderr)
        return 2
    growing, found = work / "corpus", work / "findings"
    for folder in (growing, found):
        folder.mkdir(parents=True, exist_ok=True)
    for case, data in corpus(name).items():
        if not case.startswith("slow:"):
            (growing / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    told = Told(name)
    began, cpu_before = time.monotonic(), _cpu()
    while told.cpu_seconds < seconds:
        left = max(5, min(ROUND_SECONDS, round(seconds - told.cpu_seconds)))
        log = _round(name, growing, found, left)
        told.cpu_seconds = round(_cpu() - cpu_before, 1)
        told.wall_seconds = round(time.monotonic() - began, 1)
        _note(told, log)
        for path in sorted(found.iterdir()):
            if path.suffix or path.name in told.findings:
                continue
            if _fails(name, path):
                told.findings.append(path.name)
                told_by = log[max(log.find("ERROR: "), log.find("=== Uncaught"), 0) :]
                path.with_suffix(".log").write_text(told_by, encoding="utf-8")
                print(f"FOUND {path}\n{told_by[:3000]}", flush=True)
            else:
                path.unlink()  # a machine that was busy or paused
        print(json.dumps(asdict(told)), flush=True)
        (work / "told.json").write_text(json.dumps(asdict(told), indent=1), encoding="utf-8")
    return 1 if told.findings else 0


def _round(name: str, growing: Path, found: Path, seconds: int) -> str:
    arguments = [
        str(growing), f"-artifact_prefix={found}/", f"-max_total_time={seconds}", "-print_final_stats=1",
        f"-max_len={MOST_BYTES}", f"-timeout={PATIENCE_SECONDS}", f"-rss_limit_mb={MOST_MIB}", "-reload=0",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, "--child", *arguments],
        cwd=ROOT, env=_environment(), capture_output=True, check=False,
    )  # fmt: skip
    return (done.stdout + done.stderr).decode("utf-8", "replace")


def _fails(name: str, path: Path) -> bool:
    """Whether an input fails by itself, in a process of its own."""
    command = [sys.executable, "-m", "tests.fuzz", name, "--child", str(path), f"-timeout={PATIENCE_SECONDS}",
               f"-rss_limit_mb={MOST_MIB}"]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=_environment(), capture_output=True, check=False, timeout=20 * PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def _environment() -> dict[str, str]:
    """atheris's libFuzzer comes first where the core calls it: a build with -fsanitize=fuzzer-no-link,address."""
    found = dict(os.environ)
    package = importlib.util.find_spec("mullama")
    folders = package.submodule_search_locations if package is not None else None
    cores = [path for folder in folders or () for path in Path(folder).glob("_core/model.*.so")]
    if not any(b"__sanitizer_cov_" in path.read_bytes() for path in cores):
        return found
    atheris = importlib.util.find_spec("atheris")
    assert atheris is not None and atheris.origin is not None
    found["LD_PRELOAD"] = str(Path(atheris.origin).parents[1] / "asan_with_fuzzer.so")
    found.setdefault("ASAN_OPTIONS", "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1")
    return found


def _note(told: Told, log: str) -> None:
    runs = [int(a or b) for a, b in _RUNS.findall(log)]
    told.runs += max(runs, default=0)
    for coverage, features, n_corpus in _STATUS.findall(log):
        told.coverage = max(told.coverage, int(coverage))
        told.features = max(told.features, int(features))
        told.corpus = int(n_corpus)


def _escaped(word: bytes) -> str:
    return "".join(chr(b) if 0x20 < b < 0x7F and b not in b'"\\' else f"\\x{b:02x}" for b in word)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
