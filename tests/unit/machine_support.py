"""A machine made of files: groups of version 1 and 2, as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

Files = tuple[int, int]  # bytes of inactive and of active pages


class Groups:
    """``proc`` is what ``/proc/self`` would hold; hierarchies are mounted under ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proc = folder / "proc"
        self.proc.mkdir()
        self._mounts: list[str] = []

    def mount(self, controllers: str = "", root: str = "/", point: str = "") -> Path:
        """Mount a hierarchy of version 1, or that of version 2 where no controllers are named."""
        where = self.folder / (point or controllers or "unified")
        where.mkdir(parents=True, exist_ok=True)
        kind = f"cgroup cgroup rw,{controllers}" if controllers else "cgroup2 cgroup2 rw,nsdelegate"
        shown = str(where).replace(" ", "\\040")
        self._mounts.append(f"{30 + len(self._mounts)} 23 0:28 {root} {shown} rw,nosuid shared:9 - {kind}\n")
        other = "22 1 8:1 / / rw - ext4 /dev/vda rw\n24 22 0:5 / /proc rw - proc proc rw\n"
        (self.proc / "mountinfo").write_text(other + "".join(self._mounts))
        return where

    def belong(self, *lines: str) -> None:
        """Lines of ``/proc/self/cgroup``."""
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in lines))


def write(folder: Path, **files: str | int) -> None:
    """Files of a group; ``cpu_max="…"`` is the file ``cpu.max``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def memory_v2(
    folder: Path, limit: str | int, used: int = 600, files: tuple[int, int] = (0, 0), high: str = "max"
) -> None:
    stat = f"anon 1\ninactive_file {files[0]}\nactive_file {files[1]}"
    write(folder, memory_max=limit, memory_high=high, memory_current=used, memory_stat=stat)


def memory_v1(folder: Path, limit: int, used: int = 600, files: Files = (0, 0)) -> None:
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {files[0]}\ntotal_active_file {files[1]}"
    write(folder, memory_limit_in_bytes=limit, memory_usage_in_bytes=used, memory_stat=stat)
