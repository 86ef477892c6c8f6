"""A process without HOME, whose user id has no name, as in a container with ``--user 54321``."""

from __future__ import annotations

from pathlib import Path

import pytest
from homes import homeless
from models_support import make_gguf

from mullama import home
from mullama.config import ServeConfig
from mullama.errors import ConfigError, MullamaError
from mullama.models.child.probe import Verdicts
from mullama.models.parse import parse_spec
from mullama.models.sources.local import LocalSource
from mullama.models.store.store import Store
from mullama.plugins.user_code import load_object
from mullama.web.profile_log import ProfileLog


def run(folder: Path, *args: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    process = homeless(folder, *args)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


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
    returned, stdout, stderr = run(tmp_path, *args)
    assert "Traceback" not in stderr, stderr
    assert returned == status, stderr
    assert said in stdout + stderr
    assert returned == 0 or stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == [], "a folder that is called ~ is nobody's home"


def test_a_file_is_shown_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf())
    returned, stdout, stderr = run(tmp_path, "show", str(path))
    assert (returned, stderr) == (0, "")
    assert "llama" in stdout


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    for name in ("HOME", "XDG_CACHE_HOME", "MULLAMA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_the_root_of_nobody(nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_home_that_nobody_knows(nobody: None, path: str) -> None:
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
