"""``mullama doctor`` and ``mullama serve`` on builds that are broken: the same lines, status 1, never a signal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import mullama
from mullama.installation.instructions import library_folder

from .support import clean_env, run_mullama

#: Without ``site`` no editable install comes in between.
START = "import sys; from mullama.cli.main import main; sys.exit(main())"


class Installation:
    """A copy of mullama, whose libraries may be broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lib, self.core = folder / "mullama" / "lib", folder / "mullama" / "_core"
        for part in reversed([Path(part) for part in mullama.__path__]):
            for file in part.iterdir():
                if file.name in ("lib", "_core", "__pycache__"):
                    continue
                target = folder / "mullama" / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file)
            if (part / "_core").is_dir():
                shutil.copytree(part / "_core", self.core, dirs_exist_ok=True)
        shutil.copytree(library_folder(), self.lib)

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.folder), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
        return subprocess.run(
            [sys.executable, "-S", "-P", "-c", START, *args],
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            env=clean_env(PYTHONPATH=path, **env),
            cwd=self.folder,
        )

    def both(self, *args: str, **env: str) -> list[str]:
        """What doctor and serve say, the same; status 1 of both."""
        told = self.run("doctor", *args, **env)
        refused = self.run("serve", "--port", "0", *args, **env)
        errors = [[line for line in one.stderr.splitlines() if line.startswith("error:")] for one in (told, refused)]
        assert (told.returncode, refused.returncode) == (1, 1), (told.stderr, refused.stderr)
        assert errors[0] == errors[1]
        assert "Traceback" not in told.stderr + refused.stderr
        report = json.loads(self.run("doctor", "--json", *args, **env).stdout)
        assert [f"error: {fault}" for fault in report["faults"]] == errors[0]
        return errors[0]


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "copy")


@pytest.fixture
def model(smollm2: Path) -> list[str]:
    return ["--model", str(smollm2)]


def test_a_whole_build(installation: Installation, model: list[str]) -> None:
    done = installation.run("doctor", *model)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("nothing is wrong\n")
    report: dict[str, Any] = json.loads(installation.run("doctor", "--json", *model).stdout)
    assert report["faults"] == []
    assert report["devices"][0]["type"] == "cpu"
    assert {one["name"] for one in report["libraries"]} >= {"libllama.so", "libggml.so"}
    assert all(one["path"].startswith(str(installation.folder)) for one in report["libraries"])
    assert report["build"]["compiler"]


def test_libraries_that_are_removed(installation: Installation, model: list[str]) -> None:
    for name in ("libggml-base.so", "libllama-common.so"):
        (installation.lib / name).unlink()
    first, second = installation.both(*model)
    assert first.startswith(f"error: the library {installation.lib / 'libggml-base.so'} is missing; ")
    assert second.startswith(f"error: the library {installation.lib / 'libllama-common.so'} is missing; ")


def test_a_library_that_is_cut_off(installation: Installation, model: list[str]) -> None:
    """Loading it would end the process with a signal."""
    library = installation.lib / "libllama.so"
    library.write_bytes(library.read_bytes()[:100_000])
    (line,) = installation.both(*model)
    assert f"{library} is damaged: it is cut off after 100000 bytes" in line


def test_a_library_of_another_build(installation: Installation, model: list[str]) -> None:
    """A whole file that lacks what the others want of it."""
    shutil.copy(installation.lib / "libmullama-cpuid.so", installation.lib / "libggml.so")
    (line,) = installation.both(*model)
    assert line.startswith("error: the library ")
    assert "does not load: " in line
    assert "undefined symbol" in line


def test_no_build_at_all(installation: Installation, model: list[str]) -> None:
    shutil.rmtree(installation.lib)
    (line,) = installation.both(*model)
    assert "the record of the build" in line


def test_other_commands_name_it_as_well(installation: Installation, model: list[str]) -> None:
    library = installation.lib / "libggml-base.so"
    library.unlink()
    done = installation.run("run", model[1], "Hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: the library {library} is missing; " in done.stderr
    assert "Traceback" not in done.stderr


def test_no_write_access_anywhere(model: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    env = {"MULLAMA_HOME": str(file / "home")}
    args = ["--page-dir", str(file / "pages"), *model]
    told, refused = run_mullama("doctor", *args, **env), run_mullama("serve", "--port", "0", *args, **env)
    assert (told.returncode, refused.returncode) == (1, 1)
    lines = told.stderr.decode().splitlines()
    assert lines == refused.stderr.decode().splitlines()
    assert lines == [
        f"error: nothing can be written to the page folder {file}/pages: Not a directory; name another with --page-dir",
        f"error: nothing can be written to the store {file}/home: Not a directory; name another with MULLAMA_HOME",
    ]


def test_no_room_for_the_model(model: list[str], tmp_path: Path) -> None:
    args = ["--ctx-size", "16777216", "--parallel", "256", *model]
    told, refused = run_mullama("doctor", *args), run_mullama("serve", "--port", "0", *args)
    assert (told.returncode, refused.returncode) == (1, 1)
    (line,) = told.stderr.decode().splitlines()
    assert "256 x 16777216 tokens does not fit" in line
    # What is free is measured twice.
    (other,) = [text for text in refused.stderr.decode().splitlines() if text.startswith("error:")]
    assert other.partition(" of memory")[0] == line.partition(" of memory")[0]
