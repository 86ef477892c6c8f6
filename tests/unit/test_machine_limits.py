"""What control groups of both versions, CPU sets and affinity leave to a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from machine_support import Groups, memory_v1, memory_v2, write

from mullama.machine import cgroups, cores, memory

UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_this_machine() -> None:
    free = memory.available_memory()
    assert free is None or free > 0
    assert (memory.total_memory() or 1 << 62) >= (free or 0)
    found = cores.own_cores()
    assert 1 <= len(found.affinity) <= found.online
    assert 1 <= found.threads == cores.usable_threads() <= len(found.affinity)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(before)})
        assert cores.own_cores().affinity == (max(before),)
        assert cores.usable_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_without_groups(groups: Groups) -> None:
    assert cgroups.groups("cpu", groups.proc) == []
    groups.belong("4:cpu:/own", "0::/own")  # a member of what is not mounted
    assert cgroups.groups("cpu", groups.proc) == []
    assert cgroups.cpu_quota(groups.proc) is None
    assert cgroups.memory_left(groups.proc) is None
    assert cgroups.memory_limit(groups.proc) is None
    assert cgroups.cpu_set(groups.proc) is None


# -- quotas


def test_a_quota_of_version_2(groups: Groups) -> None:
    own = groups.mount() / "a.slice" / "b.service"
    groups.belong("1:name=systemd:/", "0::/a.slice/b.service")
    own.mkdir(parents=True)
    assert cgroups.cpu_quota(groups.proc) is None
    write(own, cpu_max="max 100000")
    assert cgroups.cpu_quota(groups.proc) is None
    write(own, cpu_max="150000 100000")
    assert cgroups.cpu_quota(groups.proc) == 1.5
    write(own.parent, cpu_max="25000 50000")  # the group above gives less
    assert cgroups.cpu_quota(groups.proc) == 0.5
    write(own.parent, cpu_max="400000 100000")
    assert cgroups.cpu_quota(groups.proc) == 1.5


def test_a_quota_of_version_1(groups: Groups) -> None:
    own = groups.mount("cpu,cpuacct") / "docker" / "abc"
    groups.belong("3:cpu,cpuacct:/docker/abc", "2:cpuset:/other", "0::/")
    write(own, cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    assert cgroups.cpu_quota(groups.proc) is None
    write(own, cpu_cfs_quota_us=250000)
    assert cgroups.cpu_quota(groups.proc) == 2.5
    write(own.parent, cpu_cfs_quota_us=100000, cpu_cfs_period_us=100000)
    assert cgroups.cpu_quota(groups.proc) == 1.0
    write(own, cpu_cfs_quota_us="nonsense", cpu_cfs_period_us=0)
    assert cgroups.cpu_quota(groups.proc) == 1.0


def test_both_versions_at_once(groups: Groups) -> None:
    """A controller lies in one of them; which one, only its files tell."""
    old, new = groups.mount("cpu") / "own", groups.mount() / "own"
    groups.belong("1:cpu:/own", "0::/own")
    write(old, cpu_cfs_quota_us=300000, cpu_cfs_period_us=100000)
    write(new, cgroup_procs="")
    assert cgroups.cpu_quota(groups.proc) == 3.0
    write(new, cpu_max="200000 100000")
    assert cgroups.cpu_quota(groups.proc) == 2.0


def test_a_container_that_sees_its_host_s_names(groups: Groups) -> None:
    """Its own group is mounted, with the host's name of it as root, or with no word of it."""
    point = groups.mount(root="/docker/abc")
    groups.belong("0::/docker/abc/inner")
    write(point, cpu_max="300000 100000")
    write(point / "inner", cpu_max="200000 100000")
    assert [folder for _, folder in cgroups.groups("cpu", groups.proc)] == [point / "inner", point]
    assert cgroups.cpu_quota(groups.proc) == 2.0
    groups.belong("0::/kubepods/pod1/xyz")
    assert [folder for _, folder in cgroups.groups("cpu", groups.proc)] == [point]
    groups.belong("0::/../other")
    assert cgroups.cpu_quota(groups.proc) == 3.0


def test_a_mount_point_with_a_space(groups: Groups) -> None:
    own = groups.mount(point="my groups") / "own"
    groups.belong("0::/own")
    write(own, cpu_max="100000 100000")
    assert cgroups.cpu_quota(groups.proc) == 1.0


def test_cpu_sets(groups: Groups) -> None:
    own = groups.mount("cpuset") / "own"
    groups.belong("5:cpuset:/own")
    write(own, cpuset_cpus="")
    assert cgroups.cpu_set(groups.proc) is None
    write(own.parent, cpuset_effective_cpus="0-3")
    assert cgroups.cpu_set(groups.proc) == "0-3"
    write(own, cpuset_cpus="1")
    assert cgroups.cpu_set(groups.proc) == "1"


# -- memory


def test_memory_of_version_2(groups: Groups) -> None:
    own = groups.mount() / "a.slice" / "b.service"
    groups.belong("1:name=x:/", "0::/a.slice/b.service")
    memory_v2(own, "max")
    assert cgroups.memory_left(groups.proc) is None
    memory_v2(own.parent, 1000, files=(100, 20))  # the group above has a limit
    assert cgroups.memory_left(groups.proc) == 520
    memory_v2(own, 900, files=(10, 0))
    assert cgroups.memory_left(groups.proc) == 310
    assert cgroups.memory_limit(groups.proc) == 900
    memory_v2(own, 500)
    assert cgroups.memory_left(groups.proc) == 0
    memory_v2(own, "max", high="700")  # it may take more, and is throttled then
    assert cgroups.memory_limit(groups.proc) == 700
    assert cgroups.memory_left(groups.proc) == 100
    write(own, memory_stat="nothing known")  # all that is used may be pages of files
    assert cgroups.memory_left(groups.proc) == 520


def test_memory_of_version_1(groups: Groups) -> None:
    own = groups.mount("memory") / "docker" / "abc"
    groups.belong("4:memory:/docker/abc", "0::/")
    memory_v1(own, UNLIMITED)
    assert cgroups.memory_limit(groups.proc) is None
    assert cgroups.memory_left(groups.proc) is None
    memory_v1(own, 1000, files=(100, 20))
    assert cgroups.memory_limit(groups.proc) == 1000
    assert cgroups.memory_left(groups.proc) == 520
    memory_v1(own.parent, 800)
    assert cgroups.memory_limit(groups.proc) == 800
    assert cgroups.memory_left(groups.proc) == 200


def test_a_group_never_leaves_more_than_its_limit(groups: Groups) -> None:
    own = groups.mount() / "own"
    groups.belong("0::/own")
    memory_v2(own, 500, used=100, files=(300, 300))  # counted at different moments
    assert cgroups.memory_left(groups.proc) == 500


def test_the_least_of_machine_and_groups_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, group, expected in ((5, 3, 3), (3, 5, 3), (None, 4, 4), (4, None, 4), (None, None, None)):
        monkeypatch.setattr(memory, "machine_left", lambda left=machine: left)
        monkeypatch.setattr(cgroups, "memory_left", lambda left=group: left)
        assert memory.available_memory() == expected
