"""The control groups that this process lies in, and the limits of each: containers and services are made of them.

A limit holds for all groups below it, so the tightest of a group and its ancestors counts. Version 1 has a hierarchy a
controller, version 2 one for all; a machine may have both, each controller in one of them. Only groups that are mounted
can be seen: what lies above a container's own is its host's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")
NO_LIMIT = 1 << 60  # bytes; version 1 says 2**63 less a page where there is none


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted hierarchy. ``root``: which of its groups is seen at ``point``."""

    version: int
    controllers: frozenset[str]  # of version 1; version 2 says so in each group
    root: str
    point: Path


def groups(controller: str, proc: Path = PROC) -> list[tuple[int, Path]]:
    """Version and folder of the groups that a controller ('cpu', 'memory', 'cpuset') may limit this process in.

    The own group first, then those above it. Empty where there are no control groups.
    """
    try:
        memberships = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return []
    mounts = list(_mounts(proc))
    found: list[tuple[int, Path]] = []
    for line in memberships:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        version = 2 if number == "0" and not names else 1
        if version == 1 and controller not in names.split(","):
            continue
        for mount in mounts:
            if mount.version == version and (version == 2 or controller in mount.controllers):
                found += [(version, folder) for folder in _upwards(mount, path)]
                break
    return found


def cpu_quota(proc: Path = PROC) -> float | None:
    """Cores' worth of time that the tightest quota gives, such as 1.5; None: no quota."""
    found = (_quota_v2(folder) if version == 2 else _quota_v1(folder) for version, folder in groups("cpu", proc))
    return min((quota for quota in found if quota is not None), default=None)


def memory_limit(proc: Path = PROC) -> int | None:
    """Bytes that the tightest limit allows all processes of its group together; None: no limit."""
    found = (_memory(version, folder) for version, folder in groups("memory", proc))
    return min((limit for limit, _ in (one for one in found if one is not None)), default=None)


def memory_left(proc: Path = PROC) -> int | None:
    """Bytes that the limits leave; None: no limit. Pages of files count as free, as they do in ``MemAvailable``."""
    found = (_memory(version, folder) for version, folder in groups("memory", proc))
    return min((left for _, left in (one for one in found if one is not None)), default=None)


def cpu_set(proc: Path = PROC) -> str | None:
    """The cores of the own group as the system writes them, such as '0-3,8'; None where it does not say.

    The affinity of a process lies within it always; it is told to explain that.
    """
    for _, folder in groups("cpuset", proc):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            text = _read(folder / name)
            if text:
                return text
    return None


def _mounts(proc: Path) -> Iterator[Mount]:
    """``ID PARENT DEVICE ROOT POINT OPTIONS [TAGS…] - TYPE SOURCE SUPER-OPTIONS``, a line each."""
    for line in (_read(proc / "mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if len(fields) >= 5 and len(tail) >= 3 and tail[0] in ("cgroup", "cgroup2"):
            point = Path(_unescaped(fields[4]))
            yield Mount(2 if tail[0] == "cgroup2" else 1, frozenset(tail[2].split(",")), _unescaped(fields[3]), point)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _upwards(mount: Mount, path: str) -> Iterable[Path]:
    """The folders of a group and of those above it, as far as they are mounted."""
    own, root = _parts(path), _parts(mount.root)
    if own[: len(root)] == root:
        own = own[len(root) :]
    if ".." in own:  # it lies outside of what is mounted here
        own = []
    folders = [mount.point.joinpath(*own[:n]) for n in range(len(own), -1, -1)]
    # Without a namespace for groups, a container sees its own group at the mount, and its host's name of it.
    return folders if folders[0].is_dir() else folders[-1:]


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(file: Path) -> int | None:
    try:
        return int(_read(file) or "")
    except ValueError:
        return None


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
    return _cores(quota, period or "100000")


def _quota_v1(folder: Path) -> float | None:
    return _cores(_read(folder / "cpu.cfs_quota_us") or "", _read(folder / "cpu.cfs_period_us") or "")


def _cores(quota: str, period: str) -> float | None:
    """Both in µs. ``max``, -1 and what is no number are no quota."""
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _memory(version: int, folder: Path) -> tuple[int, int] | None:
    """Limit and what it leaves, bytes; None: no limit."""
    if version == 2:
        # Above ``high`` the kernel takes pages back all the time, which stops a decode as well as ``max`` does.
        limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
        used, prefix = _number(folder / "memory.current"), ""
    else:
        limits = [_number(folder / "memory.limit_in_bytes")]
        used, prefix = _number(folder / "memory.usage_in_bytes"), "total_"  # with the groups below
    limit = min((one for one in limits if one is not None and one < NO_LIMIT), default=None)
    if limit is None or used is None:
        return None
    try:
        stat = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
        files = int(stat[f"{prefix}active_file"]) + int(stat[f"{prefix}inactive_file"])
    except (KeyError, ValueError):  # all of it may be pages of files
        files = used
    return limit, min(max(limit - used + files, 0), limit)
