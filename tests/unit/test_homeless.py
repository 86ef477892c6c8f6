"""A process without HOME, whose user id has no name, as in a container with ``--user 54321``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models_support import make_gguf

from mullama import home
from mullama.config import ServeConfig
from mullama.errors import ConfigError, MullamaError
from mullama.models.child.probe import Verdicts
from mullama.models.reference import parse_spec
from mullama.models.sources.local import LocalSource
from mullama.models.store.store import Store
from mullama.plugins.user_code import load_object
from mullama.web.profile_log import ProfileLog

#: What such a container lacks: the id's entry in the user database, HOME, a temporary folder.
CHILD = """
import os, pwd, sys, tempfile
def nobody(*_):
    raise KeyError("getpwuid(): uid not found: 54321")
def nowhere(*_):
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
pwd.getpwuid = pwd.getpwnam = nobody
tempfile._get_default_tempdir = nowhere
from mullama.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def homeless_env() -> dict[str, str]:
    gone = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "MULLAMA_HOME", "TMPDIR")
    return {name: value for name, value in os.environ.items() if name not in gone}


def run(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", CHILD, *args],
        cwd=tmp_path, env=homeless_env(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["list"], 0, "the store is empty"),
        (["du"], 0, ""),
        (["verify"], 0, ""),
        (["show", "smollm2:135m"], 1, "smollm2:135m is not in the store"),
        (["rm", "smollm2:135m"], 1, "is not in the store"),
        (["cp", "smollm2:135m", "mine"], 1, "is not in the store"),
        (["pull", "smollm2:135m"], 2, "set MULLAMA_HOME to a folder"),
        (["pull", "hf:nobody/nothing"], 2, "set MULLAMA_HOME to a folder"),
    ],
)
def test_every_command_answers_in_a_line(tmp_path: Path, args: list[str], status: int, said: str) -> None:
    done = run(tmp_path, *args)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert done.returncode == 0 or done.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == [], "a folder that is called ~ is nobody's home"


def test_a_file_is_shown_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf())
    done = run(tmp_path, "show", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "llama" in done.stdout


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    for name in ("HOME", "XDG_CACHE_HOME", "MULLAMA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def test_the_root_of_nobody(homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home.default_root() == home.NOWHERE
    store = Store()
    assert store.list() == [] and store.find("smollm2:135m") is None and store.lookup("x") is None
    with pytest.raises(ConfigError, match="MULLAMA_HOME"):
        store.make_folders()
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf())
    assert store.resolve(parse_spec(str(path), store.lookup).reference) == path
    assert Verdicts().find(path, None) is None
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path))
    assert home.default_root() == tmp_path
    monkeypatch.delenv("MULLAMA_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home.default_root() == tmp_path / "mullama"


@pytest.mark.parametrize("path", ["~/x", "~nobody-of-this-name/x"])
def test_a_home_that_nobody_knows(homeless: None, path: str) -> None:
    with pytest.raises(ConfigError, match=r"nobody knows the home that '~.*' means; write the path out"):
        home.expand(path)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/m.gguf", "~nobody-of-this-name"])
def test_a_tilde_is_never_a_traceback(path: str) -> None:
    """Also where HOME is known: a request may name such a file."""
    with pytest.raises(MullamaError, match="nobody knows the home"):
        LocalSource().normalise(path)
    with pytest.raises(MullamaError):
        parse_spec(f"{path}/m.gguf", lambda name: None)
    with pytest.raises(MullamaError, match="nobody knows the home"):
        load_object(f"{path}/policy.py:Policy", "scheduler")
    with pytest.raises(MullamaError, match="nobody knows the home"):
        ProfileLog(path)


def test_a_tilde_in_mullama_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULLAMA_HOME", "~nobody-of-this-name/store")
    with pytest.raises(ConfigError, match="nobody knows the home"):
        Store()
    assert ServeConfig().model == []
