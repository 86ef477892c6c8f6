"""Names, progress and failures of quantising, with a child that only claims to quantise; the commands on top."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from models_support import make_gguf

from mullama import child
from mullama.cli.main import main
from mullama.errors import ConfigError, InvalidRequest, LoadCancelled, ModelLoadError, StoreError
from mullama.machine import memory
from mullama.models import quantizing
from mullama.models.files import gguf
from mullama.models.quantizing import Source, quantize_variant, source_of, variant_key
from mullama.models.store.entry import Entry
from mullama.models.store.store import Store

Fake = Callable[[str], None]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "home"))
    return Store()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "Some Model-F16.gguf"
    path.write_bytes(make_gguf())
    return path


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """``fake(code)``: what the child does; ``source``, ``target``, ``say(line)`` and ``end(**result)`` are there."""
    script = tmp_path / "child.py"
    head = textwrap.dedent("""
        import json, os, shutil, signal, sys, time
        source, target, ftype, threads = sys.argv[1:5]
        def say(line): print(line, file=sys.stderr, flush=True)
        def end(**result): print(json.dumps(result), flush=True)
    """)

    def write(code: str) -> None:
        script.write_text(head + textwrap.dedent(code))

    def start(module: str, arguments: list[str]) -> object:
        import subprocess

        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, str(script), *arguments], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )

    monkeypatch.setattr(child, "start", start)
    monkeypatch.setattr(quantizing, "check_type", _check_type)
    write("shutil.copy(source, target); end(ok=True, size=1)")
    return write


def _check_type(name: str) -> str:
    if name.upper() not in ("Q8_0", "Q4_0", "IQ2_XS"):
        raise InvalidRequest(f"'{name}' is not a quantisation type; there are Q8_0", param="type")
    return name.upper()


def entry(**fields: object) -> Entry:
    plain = {
        "key": "smollm2:135m", "source": "pypi", "locations": ("x",), "filename": "SmolLM2.Q4_1.gguf",
        "sha256": "0" * 64, "size": 1, "license": None, "pulled_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Entry(**{**plain, **fields})  # type: ignore[arg-type]


def left_over(store: Store) -> list[str]:
    return [
        path.name for folder in (store.tmp, store.blobs, store.refs) if folder.exists() for path in folder.iterdir()
    ]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "smollm2:135m"),
        ({"key": "my-model"}, "my-model"),
        (
            {"key": "hf:owner/Qwen2.5-7B-GGUF:Q4_K_M", "source": "hf", "filename": "Qwen2.5-7B-Q4_K_M.gguf"},
            "qwen2.5-7b",
        ),
        ({"key": "pypi:x", "filename": "SmolLM2.Q4_1.gguf"}, "smollm2"),
        ({"key": "plain-q8_0", "source": "made", "variant_of": "sha256:ab"}, "plain"),
        ({"key": "smollm2:135m-q8_0", "source": "made", "variant_of": "smollm2:135m"}, "smollm2:135m"),
    ],
)
def test_names_of_variants(store: Store, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], name: str) -> None:
    monkeypatch.setattr(store, "checked_path", lambda entry: Path("x"))
    source = source_of(store, entry(**fields))
    assert source.name == name
    assert variant_key(source, "Q8_0") == f"{name}-q8_0"
    assert source.key == (fields.get("variant_of") or fields.get("key", "smollm2:135m"))


def test_progress_counts_the_bytes_of_tensors(store: Store, model: Path, fake: Fake) -> None:
    header = gguf.check(model)
    first, *others = header.tensors
    fake(f"""
        say("llama_model_loader: loaded")
        say("[   1/ {len(header.tensors)}] {first.name:<36} - [ 1, 1], type = f32, size = 1 MiB")
        say("[   2/ {len(header.tensors)}] {others[0].name:<36} - [ 1, 1], type = f32, converting to q8_0 .. ")
        shutil.copy(source, target)
        end(ok=True, size=1)
    """)
    seen: list[tuple[str, int, int | None]] = []
    made = quantize_variant(store, model, "q8_0", lambda *step: seen.append(step))
    total = sum(tensor.size or 0 for tensor in header.tensors)
    assert [step for step in seen if step[0] == "quantising"] == [
        ("quantising", 0, total), ("quantising", first.size, total),
    ]  # fmt: skip
    assert (made.key, made.quant, made.filename) == ("some-model-q8_0", "Q8_0", "Some Model-Q8_0.gguf")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('end(ok=False, reason=source + ": tensor x\\nis bad")', "cannot be quantised to Q8_0: tensor x is bad"),
        ('say("GGML_ASSERT(y) failed"); os.kill(os.getpid(), signal.SIGABRT)', "crashed (SIGABRT): GGML_ASSERT(y)"),
        ("sys.exit(3)", "the process ended with status 3"),
        (
            'say("=== "); say("Missing importance matrix"); say("====="); end(ok=False, reason="=====")',
            "Missing importance",
        ),
        ("end(ok=True, size=1)", "cannot be read"),
        ('open(target, "w").write("nonsense" * 9); end(ok=True)', "not a GGUF file"),
        ('print("not json")', "status 0"),
    ],
)
def test_failures(store: Store, model: Path, fake: Fake, code: str, reason: str) -> None:
    fake(code)
    with pytest.raises(ModelLoadError) as caught:
        quantize_variant(store, model, "Q8_0")
    assert reason in caught.value.message and "\n" not in caught.value.message
    assert left_over(store) == []


def test_a_full_disk(store: Store, model: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake('end(ok=False, reason="basic_ios::clear: iostream error")')
    free = iter([1 << 40, 10])
    monkeypatch.setattr(quantizing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": next(free)})())
    with pytest.raises(StoreError, match="the disk is full"):
        quantize_variant(store, model, "Q8_0")
    assert left_over(store) == []


def test_cancelling_a_child_that_says_nothing(store: Store, model: Path, fake: Fake) -> None:
    fake("time.sleep(600)")
    asked = iter([False, False, True])
    with pytest.raises(LoadCancelled):
        quantize_variant(store, model, "Q8_0", cancel=lambda: next(asked))
    assert left_over(store) == []


def test_waiting_for_another_can_be_cancelled(store: Store, model: Path) -> None:
    key = "some-model-q8_0"
    store.make_folders()
    seen: list[str] = []
    with store.lock(f"quantize-{quantizing.hash_key(key)}"), pytest.raises(LoadCancelled):
        # Of another store object, as of another process: the same lock.
        quantize_variant(
            Store(store.root), model, "Q8_0", lambda what, done, total: seen.append(what), cancel=lambda: bool(seen)
        )
    assert seen == ["waiting for another process that makes the same"]


def test_a_name_that_is_taken(store: Store, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(make_gguf({"general.name": "another"}))
    quantize_variant(store, other, "Q8_0", key="mine")
    for key in ("mine", "smollm2:135m"):
        with pytest.raises(StoreError, match="is another model; choose a name"):
            quantize_variant(store, model, "Q8_0", key=key)
    with pytest.raises(ConfigError):
        quantize_variant(store, model, "Q8_0", key="../mine")


def test_a_variant_older_than_its_base_is_made_again(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("base", "base", "base", model, "base.gguf")
    monkeypatch.setattr(quantizing, "source_of", lambda store, model: source)
    made = quantize_variant(store, model, "Q8_0")
    assert quantize_variant(store, model, "Q8_0") == made
    source = Source("base", "base", "base", model, "base.gguf", since="2999-01-01T00:00:00+00:00")
    seen: list[str] = []
    quantize_variant(store, model, "Q8_0", lambda what, done, total: seen.append(what))
    assert "hashing" in seen


# -- the commands


def test_the_command(store: Store, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(model), "q8_0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["quant"], found["made"]) == ("some-model-q8_0", "Q8_0", True)
    assert Path(found["path"]).exists()
    assert main(["quantize", "some-model-q8_0", "Q4_0", "--name", "small"]) == 0
    assert "small is ready: Q4_0, " in capsys.readouterr().out
    assert main(["show", "some-model-q8_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quant"] == "Q8_0"


def test_the_command_fails_in_one_line(store: Store, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(model), "Q9"]) == 1
    assert "'Q9' is not a quantisation type" in capsys.readouterr().err
    assert main(["quantize", "smollm2:135m", "Q8_0"]) == 1
    assert "is not in the store" in capsys.readouterr().err
    assert main(["quantize", str(model), "IQ2_XS"]) == 1
    assert "--imatrix" in capsys.readouterr().err


HYPER = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64, "llama.context_length": 2048,
    "llama.attention.head_count": 2, "llama.feed_forward_length": 128,
}  # fmt: skip


def test_fit(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf(HYPER))
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 30)
    assert main(["fit", str(path)]) == 0
    out = capsys.readouterr().out
    assert "with 8 x 2048 tokens fits" in out and "KV, full" in out and "q4_0" in out
    assert main(["fit", str(path), "--json", "--ctx", "1000", "--parallel", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["free"], found["estimate"]["n_ctx"]) == (True, 1 << 30, 1024)
    assert [row["kv_type"] for row in found["largest"]] == ["f16", "q8_0", "q4_0"]
    assert found["estimate"]["kv"] == {"full": 2 * 1024 * 2 * 128 * 2}
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    assert main(["fit", str(path)]) == 1
    out = capsys.readouterr().out
    assert "with 8 x 2048 tokens does not fit: " in out and "1.0 MB are free" in out
    assert out.endswith("\nlower --ctx-size or --parallel, choose a smaller --kv-type-k and --kv-type-v, "
                        "or a smaller quantisation\n")  # fmt: skip
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    assert main(["fit", str(path)]) == 0
    assert "does not say" in capsys.readouterr().out


def test_show_with_a_context(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf(HYPER))
    assert main(["show", str(path), "--ctx", "512", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["kv"] == {"full": 2 * 512 * 128 * 2} and memory["total"] > memory["kv_total"]
    assert main(["show", str(path), "--ctx", "512"]) == 0
    assert "memory of one request of 512 tokens" in capsys.readouterr().out


def test_a_child_yields_to_other_sessions_too() -> None:
    """Its nice value alone would count among the processes of its own session only.

    A kernel may share no cores among sessions, and a process of no session of its own says nothing in that file.
    """
    code = (
        "import os; from pathlib import Path; from mullama import child; child.become_child(15); "
        "child.yield_to_other_sessions(15); group = Path('/proc/self/autogroup'); "
        "print(os.nice(0), group.read_text() if group.exists() else '')"
    )
    group = Path("/proc/self/autogroup")
    mine = group.read_text().split()[-1:] if group.exists() else []
    for own_session in (True, False):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=own_session, timeout=60)
        assert done.returncode == 0, done.stderr
        nice, *said = done.stdout.split()
        assert nice == str(min(os.nice(0) + 15, 19))
        assert said[-1:] in ([["15"], []] if own_session else [mine])
    assert (group.read_text().split()[-1:] if group.exists() else []) == mine
