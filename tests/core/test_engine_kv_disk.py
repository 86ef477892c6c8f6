"""The disk tier through an Engine: found again after a restart and a kill, never believed when it is damaged."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kv_engine_support import EXACT, KINDS, ask, events, history, one, request, tokens

from mullama.engine.engine import Engine
from mullama.errors import InvalidRequest, ModelBusy, MullamaError, StoreError
from mullama.kv.events import KvEventKind, KvTier

Make = Callable[..., Engine]
Tiny = Callable[..., Path]
HOST = {"kv_host_bytes": 1 << 26}


@pytest.fixture
def open_disk(make_engine: Make, tiny_model: Tiny, tmp_path: Path) -> Make:
    """``open_disk(arch, **options)``: an Engine with a disk tier in the test's folder."""

    def get(arch: str = "llama", **options: Any) -> Engine:
        settings = {"parallel": 2, "kv_disk_dir": str(tmp_path / "kv"), **HOST, **EXACT, **options}
        return make_engine(tiny_model(arch), **settings)

    return get


@pytest.fixture
def cold(make_engine: Make, tiny_model: Tiny) -> Callable[..., str]:
    """What an engine without a disk answers."""

    def get(prompt: list[int], arch: str = "llama", **options: Any) -> str:
        engine = make_engine(tiny_model(arch), parallel=1, **EXACT, **options)
        text = one(engine, prompt).text
        engine.close()
        return text

    return get


def flush(engine: Engine) -> None:
    """Everything that is to be written is, and the engine knows."""
    disk = engine._kv.disk
    assert disk is not None
    disk.written().result()
    engine.call(lambda: None).result()


def records(folder: Path) -> list[Path]:
    return sorted((folder / "kv").glob("*/*.kv"))


def on_disk(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = engine.kv.snapshot()["tiers"]["disk"]
    return found


# -- found again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", KINDS)
def test_a_restart_finds_it_again(open_disk: Make, arch: str) -> None:
    first = open_disk(arch)
    answer = one(first, tokens(1, 150), name="first")
    past = history(first, "first")
    first.close()
    second = open_disk(arch)
    assert on_disk(second)["tokens"] == len(past)
    again = one(second, tokens(1, 150))
    assert (again.profile.kv_cache_source, again.profile.kv_cache_hit) == ("disk", 149)
    assert again.text == answer.text
    second.close()
    third = open_disk(arch)
    going_on = one(third, [*past, 70, 71])
    assert (going_on.profile.kv_cache_source, going_on.profile.kv_cache_hit) == ("disk", len(past))
    third.kv.drop()
    warm = going_on.text
    third.close()
    assert warm == one(open_disk(arch, kv_disk_dir=""), [*past, 70, 71]).text


def test_what_was_read_is_in_host_memory_then(open_disk: Make) -> None:
    first = open_disk()
    one(first, tokens(1, 150))
    first.close()
    second = open_disk(parallel=1)
    assert one(second, tokens(1, 150)).profile.kv_cache_source == "disk"
    one(second, tokens(2, 150))
    assert one(second, tokens(1, 150)).profile.kv_cache_source == "host"


@pytest.mark.parametrize("arch", ["gemma3", "mamba", "lfm2"])
def test_the_checkpoint_at_a_branch_survives(open_disk: Make, arch: str) -> None:
    """It comes later than the stretch that it cuts, which is on disk already."""
    trunk = tokens(1, 150)
    first = open_disk(arch)
    one(first, [*trunk, 97, *tokens(2, 60)])
    flush(first)
    one(first, [*trunk, 98, *tokens(3, 60)])
    first.close()
    second = open_disk(arch)
    third = one(second, [*trunk, 99, *tokens(4, 60)]).profile
    assert (third.kv_cache_source, third.kv_cache_hit) == ("disk", 150)


def test_without_host_memory(open_disk: Make) -> None:
    first = open_disk(kv_host_bytes=0)
    one(first, tokens(1, 150))
    first.close()
    second = open_disk(kv_host_bytes=0)
    assert one(second, tokens(1, 150)).profile.kv_cache_source == "disk"


def test_salts_are_apart_on_disk(open_disk: Make) -> None:
    first = open_disk()
    one(first, tokens(1, 100), cache_salt="x")
    first.close()
    second = open_disk()
    hits = [one(second, tokens(1, 100), cache_salt=salt).profile.kv_cache_hit for salt in ("", "y", "x")]
    assert hits == [0, 0, 99]


def test_save_and_load(open_disk: Make, tmp_path: Path) -> None:
    import asyncio

    first = open_disk()
    one(first, tokens(1, 100))
    saved = asyncio.run(first.kv.asave(tokens(1, 100)))
    assert saved["tokens"] == 100 and saved["bytes"] >= 100 * 256
    flush(first)
    assert records(tmp_path)
    first.close()
    second = open_disk()
    assert asyncio.run(second.kv.aload(tokens(1, 100)))["tokens"] == 100
    assert second.kv.snapshot()["tiers"]["host"]["tokens"] >= 100
    assert one(second, tokens(1, 100)).profile.kv_cache_source == "host"


# -- who may use it ------------------------------------------------------------------------------------------------


def test_a_folder_has_one_owner(open_disk: Make, tmp_path: Path) -> None:
    first = open_disk()
    pages = set((tmp_path / "pages").iterdir())
    with pytest.raises(StoreError, match=f"used by process {os.getpid()}"):
        open_disk()
    assert set((tmp_path / "pages").iterdir()) == pages, "the one that failed left nothing"
    one(first, tokens(1, 100))
    first.close()
    assert one(open_disk(), tokens(1, 100)).profile.kv_cache_hit == 99


def test_others_kv_is_not_taken(open_disk: Make, cold: Callable[..., str], tmp_path: Path) -> None:
    """Another model, other types, a changed model file: each has a part of the folder."""
    first = open_disk()
    one(first, tokens(1, 100))
    first.close()
    others: list[dict[str, Any]] = [
        {"arch": "gemma3"},
        {"kv_type_k": "bf16"},
        {"flash_attn": "off"},
    ]
    for options in others:
        engine = open_disk(**options)
        answer = one(engine, tokens(1, 100))
        assert answer.profile.kv_cache_hit == 0
        assert answer.text == cold(tokens(1, 100), **options)
        engine.close()
    assert len(list((tmp_path / "kv").glob("*/lock"))) == 1 + len(others)
    assert one(open_disk(), tokens(1, 100)).profile.kv_cache_hit == 99


def test_kv_that_was_rotated_otherwise_is_not_taken(open_disk: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of quantised cells look alike with and without llama.cpp's rotation."""
    first = open_disk()
    one(first, tokens(1, 100))
    first.close()
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    second = open_disk()
    assert one(second, tokens(1, 100)).profile.kv_cache_hit == 0
    second.close()
    monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE")
    assert one(open_disk(), tokens(1, 100)).profile.kv_cache_hit == 99


def test_an_exact_engine_takes_exact_kv_only(open_disk: Make) -> None:
    """What the fast kernels computed is rounded in another way."""
    first = open_disk(deterministic=False)
    one(first, tokens(1, 200))
    first.close()
    assert one(open_disk(), tokens(1, 200)).profile.kv_cache_hit == 0


# -- damaged -------------------------------------------------------------------------------------------------------


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "rows": lambda data: _flip(data, len(data) - 100),
    "header": lambda data: _flip(data, 200),
    "prelude": lambda data: _flip(data, 40),
    "torn": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "foreign": lambda data: b"\0" * len(data),
}


@pytest.mark.parametrize("arch", ["llama", "mamba"])
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_computed_instead(open_disk: Make, tmp_path: Path, arch: str, how: str) -> None:
    first = open_disk(arch)
    text = one(first, tokens(1, 150)).text
    first.close()
    for file in records(tmp_path):
        file.write_bytes(DAMAGE[how](file.read_bytes()))
    second = open_disk(arch)
    again = one(second, tokens(1, 150))
    assert (again.text, again.profile.kv_cache_hit) == (text, 0)
    if how != "rows":
        assert sum(on_disk(second)["refused"].values()) > 0
    second.close()  # which writes it anew
    assert one(open_disk(arch), tokens(1, 150)).profile.kv_cache_hit == 149


@pytest.mark.parametrize("what", ["damaged", "deleted", "moved"])
def test_files_that_change_while_it_runs(open_disk: Make, tmp_path: Path, what: str) -> None:
    first = open_disk()
    texts = [one(first, tokens(seed, 150)).text for seed in (1, 2)]
    first.close()
    second = open_disk()
    files = records(tmp_path)
    if what == "damaged":
        for file in files:
            file.write_bytes(DAMAGE["rows"](file.read_bytes()))
    elif what == "deleted":
        for file in files:
            file.unlink()
    else:  # each takes another one's place
        contents = [file.read_bytes() for file in files]
        for file, content in zip(files, contents[1:] + contents[:1], strict=True):
            file.write_bytes(content)
    answers = [one(second, tokens(seed, 150)) for seed in (1, 2)]
    assert [answer.text for answer in answers] == texts
    assert [answer.profile.kv_cache_hit for answer in answers] == [0, 0]
    assert second.kv.audit() == []


# -- faults --------------------------------------------------------------------------------------------------------


def test_a_disk_that_fails_disturbs_nobody(open_disk: Make, tmp_path: Path) -> None:
    engine = open_disk(parallel=1)
    disk = engine._kv.disk
    assert disk is not None

    def fail(*_: Any, **__: Any) -> Any:
        raise StoreError("on purpose")

    disk.store.put = fail  # type: ignore[method-assign]
    text = one(engine, tokens(1, 100)).text
    flush(engine)
    assert records(tmp_path) == []
    del disk.store.put
    one(engine, tokens(2, 100))
    disk.store.remove = fail  # type: ignore[method-assign]
    # A stretch that is cut while it is written is written twice.
    hold = threading.Event()
    put = disk.store.put
    disk.store.put = lambda *a, **k: (hold.wait(10), put(*a, **k))[1]  # type: ignore[method-assign]
    one(engine, tokens(3, 100))
    one(engine, [*tokens(3, 100)[:50], *tokens(4, 50)])
    one(engine, tokens(5, 100))
    hold.set()
    flush(engine)
    assert engine.is_ready() and one(engine, tokens(1, 100)).text == text
    disk.drop(next(node for node in disk._tree.nodes() if node.disk is not None))
    assert engine.is_ready()


def test_what_is_dropped_does_not_come_back(open_disk: Make, tmp_path: Path) -> None:
    """Also when it was on its way to disk."""
    import asyncio

    engine = open_disk()
    disk = engine._kv.disk
    assert disk is not None
    hold = threading.Event()
    put = disk.store.put
    disk.store.put = lambda *a, **k: (hold.wait(10), put(*a, **k))[1]  # type: ignore[method-assign]
    one(engine, tokens(1, 100))
    asyncio.run(engine.kv.adrop(tokens(1, 100)))
    hold.set()
    flush(engine)
    assert one(engine, tokens(1, 100)).profile.kv_cache_hit == 0
    flush(engine)
    asyncio.run(engine.kv.adrop())
    assert records(tmp_path) == [] and on_disk(engine)["bytes_used"] == 0


def test_a_small_budget_is_kept(open_disk: Make, tmp_path: Path) -> None:
    """Twice as much as fits; what was evicted is told."""
    first = open_disk(kv_disk_bytes=1 << 20, kv_host_bytes=60_000, parallel=4)
    prompts = [tokens(seed // 4, 250) + tokens(100 + seed, 230) for seed in range(32)]
    texts = [answer.text for at in range(0, 32, 16) for answer in ask(first, *map(_request, prompts[at : at + 16]))]
    flush(first)
    assert 0 < on_disk(first)["bytes_used"] <= 1 << 20
    assert sum(file.stat().st_size for file in records(tmp_path)) <= 1 << 20
    assert any(event.tier is KvTier.DISK for event in events(first) if event.kind is KvEventKind.EVICTED)
    first.close()
    second = open_disk(kv_disk_bytes=1 << 20, kv_host_bytes=60_000, parallel=4)
    answers = [one(second, prompt) for prompt in prompts[::3]]
    assert [answer.text for answer in answers] == texts[::3]
    flush(second)
    assert on_disk(second)["bytes_used"] <= 1 << 20


def _request(prompt: list[int]) -> Any:
    return request("r", prompt)


SERVER = """
import sys
sys.path[:0] = {path!r}
from kv_engine_support import EXACT, one, tokens
from mullama.config import ServeConfig
from mullama.engine.engine import Engine
config = ServeConfig(ctx_size=512, parallel=2, threads=1, batch_size=64, page_dir={pages!r}, kv_disk_dir={folder!r},
                     kv_host_bytes=1 << 26, **EXACT)
engine = Engine.load({model!r}, config=config)
for seed in range(3):
    print(one(engine, tokens(seed, 150)).text.encode().hex(), flush=True)
engine._kv.disk.written().result()
print("written", flush=True)
for seed in range(3, 1 << 20):
    one(engine, tokens(seed, 150))
"""


def test_killed_in_the_middle(open_disk: Make, tiny_model: Tiny, tmp_path: Path) -> None:
    code = SERVER.format(
        path=[str(Path(__file__).parent), str(Path(__file__).parents[1])],
        pages=str(tmp_path / "pages"),
        folder=str(tmp_path / "kv"),
        model=str(tiny_model()),
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line == "written\n":
                break
        process.send_signal(signal.SIGKILL)  # while it computes, and writes
    assert len(lines) == 4, lines
    texts = [bytes.fromhex(line).decode() for line in lines[:3]]
    engine = open_disk()
    answers = [one(engine, tokens(seed, 150)) for seed in range(3)]
    assert [answer.text for answer in answers] == texts
    assert [(answer.profile.kv_cache_source, answer.profile.kv_cache_hit) for answer in answers] == [("disk", 149)] * 3


def test_saving_while_the_weights_change_says_when_to_come_back(
    open_disk: Make, tiny_model: Tiny, tmp_path: Path
) -> None:
    """The disk tier is away for a moment then: that is not the same as there being none."""
    other = shutil.copy(tiny_model("llama"), tmp_path / "twin.gguf")
    engine = open_disk()
    prompt = tokens(1, 40)
    one(engine, prompt)
    stop = threading.Event()
    answers: list[Any] = []

    def asks() -> None:
        while not stop.is_set():
            for action in (engine.kv.asave, engine.kv.aload):
                try:
                    answers.append(asyncio.run(action(prompt)))
                except MullamaError as error:
                    answers.append(error)

    thread = threading.Thread(target=asks)
    thread.start()
    try:
        for label in ("twin", "again", "twin"):
            engine.weights.swap(other, label=label)
    finally:
        stop.set()
        thread.join()
    refused = [answer for answer in answers if isinstance(answer, MullamaError)]
    assert len(refused) < len(answers)
    assert all(isinstance(error, ModelBusy) and error.retry_after == 1 for error in refused), refused
    with engine._parts.weights.held():
        away, engine._kv.tiers.disk = engine._kv.disk, None
        for action in (engine.kv.asave, engine.kv.aload):
            with pytest.raises(ModelBusy, match="handed to other weights in this moment") as caught:
                asyncio.run(action(prompt))
            assert caught.value.retry_after == 1
        engine._kv.tiers.disk = away
    assert asyncio.run(engine.kv.asave(prompt))["tokens"] >= 0


def test_without_a_disk_tier_the_option_is_named(make_engine: Make) -> None:
    engine = make_engine()
    for _ in range(2):
        for action in (engine.kv.asave, engine.kv.aload):
            with pytest.raises(InvalidRequest, match="--kv-disk-dir"):
                asyncio.run(action(tokens(1, 40)))
