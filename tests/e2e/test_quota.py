"""A real control group with a quota, where one can be made: as root, of version 1 or 2."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mullama.machine.cores import threads_for

from .support import clean_env, mullama

PERIOD = 100_000
Group = Callable[[str, float | None], Path]


@pytest.fixture
def group() -> Iterator[Group]:
    """``group("a/b", 1.5)``: a group in the hierarchy of processors, with a quota; removed at the end."""
    old, new = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    root = old if (old / "cgroup.procs").is_file() else new
    made: list[Path] = []

    def make(name: str, cores: float | None) -> Path:
        folder = root / f"mullama-test-{os.getpid()}" / name
        try:
            for one in (*reversed(folder.relative_to(root).parents), folder.relative_to(root)):
                if one.parts and not (root / one).is_dir():
                    (root / one).mkdir()
                    made.append(root / one)
            if cores is not None and root == old:
                (folder / "cpu.cfs_quota_us").write_text(str(round(cores * PERIOD)))
            elif cores is not None:
                (folder / "cpu.max").write_text(f"{round(cores * PERIOD)} {PERIOD}")
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        return folder

    yield make
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()


def threads_in(folder: Path, *args: str) -> dict[str, object]:
    """What doctor says of the threads of a process in that group."""
    command = ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh"]
    done = subprocess.run(
        [*command, *mullama("doctor", "--json", *args)], capture_output=True, text=True, env=clean_env(), timeout=60
    )
    found: dict[str, object] = json.loads(done.stdout)["threads"]
    return found


@pytest.mark.parametrize("cores", [0.5, 1.0, 1.5])
def test_a_quota_counts_as_cores(group: Group, cores: float) -> None:
    found = threads_in(group("own", cores))
    assert found["quota"] == cores
    assert found["used"] == threads_for(len(os.sched_getaffinity(0)), cores)


def test_the_tightest_group_above_counts(group: Group) -> None:
    """The kernel refuses a looser quota below a tighter one; without any of its own, it has that of the group above."""
    group("outer", 1.0)
    assert threads_in(group("outer/inner", None))["quota"] == 1.0
    assert threads_in(group("outer/tighter", 0.5))["quota"] == 0.5


def test_who_names_a_number_gets_it(group: Group) -> None:
    found = threads_in(group("own", 1.0), "--threads", "2")
    assert (found["asked"], found["used"]) == (2, 2)
