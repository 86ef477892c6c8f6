"""Model files that are not what they should be: one line, a ModelLoadError, and a process that lives on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mullama._core import Core, Model, set_log_level, system_info
from mullama.config import ServeConfig
from mullama.engine.engine import Engine
from mullama.errors import ConfigError, LoadCancelled, ModelLoadError


def refused(path: object, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as error:
        Model(path, **options)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    assert str(path) in message
    return message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.gguf")
    assert "no such file" in refused("")


def test_a_folder(tmp_path: Path) -> None:
    refused(tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf")


@pytest.mark.parametrize(
    "content", [b"G", b"GGUF", b"GGUF\x03\0\0\0", b"hello, world " * 1000, b"\0" * 4096, b"\xff" * 4096]
)
def test_what_is_not_a_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["with space.gguf", "ünïcode😀.gguf", "new\nline.gguf"])
def test_odd_names_of_good_files(tiny_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(tiny_model().read_bytes())
    Model(path).close()
    Model(str(path)).close()


# Damage may meet an assertion of llama.cpp's, which ends the process: so each kind runs in a process of its own.
DAMAGE = """
import sys
from pathlib import Path
from mullama.config import ServeConfig
from mullama.engine.weights.load import load_model
from mullama.errors import ModelLoadError
good, kind, path = Path(sys.argv[1]).read_bytes(), sys.argv[2], Path(sys.argv[3])
n = len(good)
def flipped(places):
    return [good[:at] + bytes([good[at] ^ flip]) + good[at + 1:] for at in places for flip in (0xFF, 0x80, 0x01)]
if kind == "truncated":
    points = {*range(0, 64), *range(64, n, n // 150), n - 1, n - 32, n - 33}
    cases = [good[:point] for point in sorted(points) if 0 <= point < n]
elif kind == "head":
    cases = flipped(range(24))
else:
    cases = flipped([*range(24, 500, 3), *range(500, 12_000, 101)])
refused = loaded = 0
for number, data in enumerate(cases):
    path.write_bytes(data)
    print("case", number, flush=True)
    try:
        model = load_model(path, ServeConfig(), None)
    except ModelLoadError as error:
        assert "\\n" not in str(error) and str(path) in str(error), str(error)
        refused += 1
        continue
    loaded += 1
    model.close()
print("end", refused, loaded)
"""


def damage(kind: str, good: Path, folder: Path) -> tuple[int, int]:
    """Load files with that kind of damage; how many were refused and how many loaded all the same."""
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE, str(good), kind, str(folder / "x.gguf")],
        cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )  # fmt: skip
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, f"died at {last}: {done.stderr[-500:]}"
    assert done.stderr == "", "nothing but the exception"
    word, refused, loaded = last.split()
    assert word == "end"
    return int(refused), int(loaded)


def test_a_file_truncated_anywhere(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    refused, loaded = damage("truncated", tiny_model(), tmp_path)
    assert refused > 150 and loaded == 0


def test_a_damaged_head(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Magic, version and counts; a flipped version bit may still be a version that llama.cpp reads."""
    refused, loaded = damage("head", tiny_model(), tmp_path)
    assert refused > 60 and loaded < 8


def test_damaged_metadata(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """A name or a text may change without harm; nothing may end the process."""
    refused, loaded = damage("metadata", tiny_model(), tmp_path)
    assert refused > 100 and loaded > 0


def test_loading_reports_its_progress(tiny_model: Callable[..., Path]) -> None:
    seen: list[float] = []
    Model(tiny_model(), progress=seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0 and all(0 <= fraction <= 1 for fraction in seen)


def test_loading_can_be_cancelled(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(LoadCancelled, match="cancelled"):
        Model(tiny_model(), progress=lambda fraction: False)
    Model(tiny_model(), progress=lambda fraction: None).close()


def test_an_error_in_the_progress_callback_comes_out(tiny_model: Callable[..., Path]) -> None:
    def fail(fraction: float) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model(tiny_model(), progress=fail)


def test_a_vocabulary_alone_has_no_core(tiny_model: Callable[..., Path]) -> None:
    model = Model(tiny_model(), vocab_only=True)
    assert model.vocab_only
    assert model.tokenize("HI") == [72, 73]
    assert model.metadata()["general.architecture"] == "llama"
    with pytest.raises(ModelLoadError, match="without weights"):
        Core(model, n_slots=1, n_ctx=512)
    model.close()


def test_a_model_without_memory_has_no_core(tiny_model: Callable[..., Path]) -> None:
    """llama.cpp calls it a decoder, and ends the process at its first prompt of more tokens than slots."""
    model = Model(tiny_model("bert"))
    facts = model.facts()
    assert facts["has_decoder"] and not facts["has_encoder"] and not facts["is_diffusion"]
    for _ in range(2):
        with pytest.raises(ModelLoadError, match=r"only decoder-only text models can be served \(bert is not one\)"):
            Core(model, n_slots=1, n_ctx=512)
    model.close()


def test_without_mmap(tiny_model: Callable[..., Path]) -> None:
    model = Model(tiny_model(), mmap=False)
    assert model.tokenize("HI") == [72, 73]
    model.close()


def test_devices_that_do_not_exist(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ModelLoadError, match="no device named 'nonsense'; there are") as error:
        Model(tiny_model(), devices=["nonsense"])
    assert error.value.param == "device"
    with pytest.raises(ModelLoadError) as error:
        Model(tiny_model(), tensor_split=[1.0] * 1000)
    assert error.value.param == "tensor_split"


def test_an_error_of_one_load_is_not_told_of_the_next(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"nonsense" * 100)
    refused(tmp_path / "bad.gguf")
    Model(tiny_model()).close()
    assert "nonsense" not in refused(tmp_path / "none.gguf")


def test_log_lines_go_to_stderr_on_request_only(
    tiny_model: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    Model(tiny_model()).close()
    assert capfd.readouterr().err == ""
    try:
        set_log_level("debug")
        Model(tiny_model()).close()
    finally:
        set_log_level("none")
    assert "llama" in capfd.readouterr().err
    with pytest.raises(KeyError):
        set_log_level("loud")


def test_the_build_says_what_it_is() -> None:
    assert "CPU" in system_info()


# -- Engine.load


def load(path: Path, **options: Any) -> Engine:
    return Engine.load(path, config=ServeConfig(**options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chat_template": "{% nonsense %}"}, ModelLoadError, "does not parse"),
        ({"chat_template": "@/none.jinja"}, ConfigError, "cannot read the chat template"),
        ({"chat_template": "llama9"}, ConfigError, "'llama9' is not a chat template: it must be Jinja.* llama3, "),
        ({"chat_template": "user: "}, ConfigError, "'user: ' is not a chat template"),
        ({"chat_template": __file__}, ConfigError, "for the file of that name write @"),
        ({"chat_template": "@/dev/null"}, ConfigError, "/dev/null holds no chat template"),
        ({"chat_template": '{"a": 1}'}, ConfigError, "writes nothing of the messages"),
        ({"chat_template": "{% for m in message %}{{ m.content }}{% endfor %}"}, ConfigError, "writes nothing of"),
        ({"ctx_size": 1 << 24, "parallel": 256}, ModelLoadError, "lower --ctx-size or --parallel"),
        ({"device": ["nonsense"]}, ModelLoadError, "no device named"),
        ({"page_dir": "/proc/nonsense"}, ModelLoadError, "cannot use the page folder"),
        ({"tensor_split": "a,b"}, ConfigError, "tensor_split"),
    ],
)
def test_an_engine_that_cannot_be_made(
    tiny_model: Callable[..., Path], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        load(tiny_model(), **options)
    assert "\n" not in str(refused.value)


def test_a_models_own_template_that_is_deaf_is_logged(
    tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    load(tiny_model(chat_template="{{ 'always the same' }}"), ctx_size=128, parallel=1, threads=1).close()
    assert "its chat template writes nothing of the messages" in caplog.text
    caplog.clear()
    load(tiny_model(chat_template="{{ raise_exception('only haiku') }}"), ctx_size=128, parallel=1, threads=1).close()
    load(tiny_model(), ctx_size=128, parallel=1, threads=1, chat_template="Llama3").close()
    assert "template" not in caplog.text


def test_an_engine_of_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"(?i)no such file"):
        load(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelLoadError):
        load(tmp_path / "bad.gguf")


def test_loading_an_engine_can_be_cancelled(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(LoadCancelled):
        Engine.load(tiny_model(), progress=lambda fraction: False)


def test_what_is_known_of_a_loaded_model(make_engine: Callable[..., Engine], tiny_model: Callable[..., Path]) -> None:
    info = make_engine(tiny_model("gemma3"), ctx_size=300, parallel=3).info
    assert (info.architecture, info.n_layer, info.n_embd, info.n_swa) == ("gemma3", 3, 64, 32)
    assert info.n_ctx >= 300 and info.n_parallel == 3
    assert info.has_chat_template and not info.is_recurrent and not info.is_hybrid
    assert info.name == Path(info.path).stem.lower()
    assert make_engine(tiny_model("mamba")).info.is_recurrent
    assert make_engine(tiny_model("lfm2")).info.is_hybrid


def test_the_page_of_a_dead_process_is_swept(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    other = make_engine()
    page = "import sys; from mullama._core import Page; page = Page(1, sys.argv[1]); import os; os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", page, str(pages / "12345-x-1.page")], cwd=tmp_path, check=False)
    (pages / "1-init-1.page").touch()  # a pid that lives, of a process that has no page
    (pages / "notes.page").touch()
    assert (pages / "12345-x-1.page").exists(), "it was killed"
    engine = make_engine()
    assert {p.name for p in pages.iterdir()} == {
        Path(engine.page_path()).name, Path(other.page_path()).name, "notes.page",
    }  # fmt: skip
    other.close()
    engine.close()
    assert not Path(engine.page_path() or "/nonexistent").is_file()
