"""``mullama serve`` with a task on its event loop that notes how late it is called, each 5 ms.

Started as the program in place of ``mullama``, with the file of the notes first. A note is four numbers of 64 bits, in
ns: when the task was to be called (CLOCK_MONOTONIC), by how much later it was, how long the loop's thread computed
since it was called before, and for how long it was ready to run and had no core. The first two tell of the loop and of
the machine, the third of the loop alone.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NOTE = struct.Struct("<4q")
EVERY_NS = 5_000_000


@dataclass(frozen=True)
class Note:
    due_ns: int
    late_ns: int
    ran_ns: int
    waited_ns: int

    @property
    def held_ns(self) -> int:
        """By how much the loop held up what it serves: no more than its thread computed, whatever else was going on."""
        return min(self.late_ns, self.ran_ns)

    @property
    def own_ns(self) -> int:
        """The same with waits for locks and disks; with those for a core of other threads that hold the GIL, too."""
        return max(self.late_ns - self.waited_ns, 0)


def read_notes(path: Path) -> list[Note]:
    data = path.read_bytes()
    return [Note(*numbers) for numbers in NOTE.iter_unpack(data[: len(data) // NOTE.size * NOTE.size])]


def summary(values_ns: list[int]) -> dict[str, float]:
    """In ms."""
    ordered = sorted(values_ns)
    shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    found = {name: ordered[int(share * (len(ordered) - 1))] / 1e6 for name, share in shares.items()}
    return {name: round(value, 2) for name, value in {**found, "worst": ordered[-1] / 1e6}.items()}


def program(notes: Path) -> list[str]:
    """The command line that takes the place of ``mullama``."""
    return [sys.executable, str(Path(__file__)), str(notes)]


def check_lag(path: Path, sent: Sequence[tuple[int, str]] = ()) -> None:
    """At most 10 ms in 99 of 100 cases and 50 ms in the worst one. Counted is what the loop's thread computed: what a
    loaded machine keeps from it is printed beside. ``sent``: what was asked, and when, to name those to blame."""
    notes = read_notes(path)
    held = [note.held_ns for note in notes]
    print(
        f"{len(notes)} looks at the event loop, in ms: held up {summary(held)}, with locks and disks "
        f"{summary([note.own_ns for note in notes])}, with the machine {summary([note.late_ns for note in notes])}"
    )
    worst = max(notes, key=lambda note: note.held_ns)
    during = [what for at, what in sent if worst.due_ns - 10**8 < at < worst.due_ns + worst.late_ns]
    assert worst.held_ns <= 50e6, f"{worst.held_ns / 1e6:.0f} ms, while these came: {during[-5:]}"
    assert summary(held)["p99"] <= 10


def _waited_ns(tid: int) -> int:
    """What the system's scheduler kept a thread waiting; 0 where it does not say."""
    try:
        return int(Path(f"/proc/self/task/{tid}/schedstat").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0


async def _watch(file: int) -> None:
    tid = threading.get_native_id()
    while True:
        due = time.monotonic_ns() + EVERY_NS
        ran, waited = time.thread_time_ns(), _waited_ns(tid)
        await asyncio.sleep(EVERY_NS / 1e9)
        late = max(time.monotonic_ns() - due, 0)
        os.write(file, NOTE.pack(due, late, time.thread_time_ns() - ran, _waited_ns(tid) - waited))


def main() -> None:
    file = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    from mullama.cli.main import main as command
    from mullama.web.server import Server

    tasks = []
    startup = Server.startup

    async def started(self: Server, *args: object, **kwargs: object) -> None:
        await startup(self, *args, **kwargs)  # type: ignore[arg-type]
        tasks.append(asyncio.get_running_loop().create_task(_watch(file)))

    Server.startup = started  # type: ignore[method-assign]
    sys.exit(command(sys.argv[1:]))


if __name__ == "__main__":
    main()
