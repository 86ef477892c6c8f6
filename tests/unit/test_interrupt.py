"""Signals before a server is ready: the process ends at once, also as process 1, also in the middle of a C call."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mullama.cli import load_progress
from mullama.errors import LoadCancelled

PRELUDE = """
import atexit, hashlib, signal, sys, time
from mullama.cli.interrupt import ends_by_signal, on_interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
def ready():
    print("ready", flush=True)
"""
#: A call into C that takes an hour, lets the GIL go and never looks at signals: what a load may be in the middle of.
DEAF = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"

BOTH = pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])


def start(body: str, *before: str) -> subprocess.Popen[str]:
    main = "from mullama.cli import main as program\nimport click\n"
    wrapped = f"""
@click.command()
def command():
{"".join(f"    {line}{chr(10)}" for line in body.strip().splitlines())}
program.cli.main = command.main
sys.exit(program.main([]))
"""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", PRELUDE + main + wrapped],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def end(process: subprocess.Popen[str], number: int, pid: int | None = None) -> tuple[int, str]:
    os.kill(pid or process.pid, number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in err
    return process.returncode, out


@BOTH
def test_a_call_that_hears_nothing_is_ended(number: int, status: int) -> None:
    process = start(f"with ends_by_signal():\n    ready()\n    {DEAF}")
    assert end(process, number) == (status, "")


@BOTH
def test_a_load_that_hears_nothing_is_ended(number: int, status: int) -> None:
    """Where a signal is a flag first."""
    body = f"with ends_by_signal():\n    with on_interrupt(lambda: None):\n        ready()\n        {DEAF}"
    assert end(start(body), number) == (status, "")


@BOTH
def test_what_can_end_by_itself_does(number: int, status: int) -> None:
    body = """
with ends_by_signal():
    told = []
    with on_interrupt(lambda: told.append(1)) as interrupt:
        ready()
        try:
            while not told:
                time.sleep(0.001)
        finally:
            print("cleaned", flush=True)
    interrupt.check()
"""
    assert end(start(body), number) == (status, "cleaned\n")


@BOTH
def test_python_code_is_interrupted_and_cleans_up(number: int, status: int) -> None:
    body = """
with ends_by_signal():
    try:
        ready()
        time.sleep(3600)
    finally:
        print("cleaned", flush=True)
"""
    assert end(start(body), number) == (status, "cleaned\n")


def test_cleaning_up_has_to_end_as_well() -> None:
    body = f"""
with ends_by_signal():
    try:
        ready()
        time.sleep(3600)
    finally:
        {DEAF}
"""
    assert end(start(body), signal.SIGTERM) == (0, "")


def test_after_the_start_there_is_time() -> None:
    """A server drains for longer than a second."""
    body = """
with ends_by_signal() as ending:
    ending.over()
    ending.over()
    told = []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    ready()
    while not told:
        time.sleep(0.001)
    time.sleep(2.0)
    signal.signal(signal.SIGTERM, before)
    print("drained", flush=True)
"""
    assert end(start(body), signal.SIGTERM) == (0, "drained\n")


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As of a server that a shell started in the background."""
    body = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with ends_by_signal():
    ready()
    signal.raise_signal(signal.SIGINT)
    time.sleep(1.0)
    print("alive", flush=True)
    time.sleep(3600)
"""
    process = start(body)
    assert process.stdout is not None and process.stdout.readline() == "alive\n"
    assert end(process, signal.SIGTERM) == (0, "")


def _as_process_one() -> list[str]:
    """What runs a command as process 1; empty where that is not allowed."""
    if shutil.which("unshare") is None:
        return []
    for flags in (["--pid"], ["--user", "--map-root-user", "--pid"]):
        command = ["unshare", *flags, "--fork", "--kill-child"]
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return []


@BOTH
@pytest.mark.parametrize("what", [DEAF, "time.sleep(3600)"])
def test_as_process_one(number: int, status: int, what: str) -> None:
    before = _as_process_one()
    if not before:
        pytest.skip("no process 1 of one's own here")
    process = start(f"with ends_by_signal():\n    ready()\n    {what}", *before)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert end(process, number, int(children[0])) == (status, "")


@pytest.mark.parametrize("is_late", [False, True])
def test_an_engine_that_is_loaded_too_late_is_closed(monkeypatch: pytest.MonkeyPatch, is_late: bool) -> None:
    class Engine:
        closed = 0

        @classmethod
        def load(cls, path: Path, *, progress: Any, **_: Any) -> Engine:
            signal.raise_signal(signal.SIGINT)
            if is_late:
                return cls()
            assert not progress(0.5)
            raise LoadCancelled("cancelled")

        def close(self) -> None:
            Engine.closed += 1

    monkeypatch.setitem(sys.modules, "mullama.engine.engine", cast(Any, SimpleNamespace(Engine=Engine)))
    model: Any = type("Found", (), {"name": "m", "path": Path("m"), "entry": None})()
    config: Any = None
    with pytest.raises(KeyboardInterrupt):
        load_progress.load_engine(model, config)
    assert Engine.closed == is_late
