"""One file under two names: its weights lie in memory once, and whatever becomes of one engine, the other goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
from core_support import Driver, greedy
from kv_engine_support import ask

from mullama._core import Model
from mullama.config import ServeConfig
from mullama.engine.engine import Engine
from mullama.engine.memory import fits
from mullama.engine.weights import sharing
from mullama.engine.weights.load import load_model
from mullama.errors import LoadCancelled, MemoryTooSmall, ModelLoadError
from mullama.types import LoraUse, Request

TEXT = "all that we have to do here and there"


def answer(engine: Engine, *uses: LoraUse) -> str:
    return ask(engine, Request("r", list(TEXT.encode()), greedy(12), lora=uses))[0].text


def load(path: Path, **options: Any) -> Model:
    return load_model(path, ServeConfig(**options), None)


@pytest.fixture
def file(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """The tiny model in a file of this test's own, which nobody else has loaded."""
    return Path(shutil.copy(tiny_model(), tmp_path / "own.gguf"))


# -- models


def test_twins_have_lives_of_their_own(file: Path, make_core: Callable[..., Driver]) -> None:
    first = Model(file)
    second = first.twin(chat_template="{{ messages[0].content }}!")
    assert (first.n_twins, second.n_twins) == (2, 2)
    driver = make_core(second)
    expected = driver.generate("HELLO", greedy(5)).tokens
    with pytest.raises(RuntimeError, match="still uses"):
        second.close()
    first.close()
    first.close()
    assert (first.n_twins, first.is_open, second.n_twins, second.is_open) == (0, False, 1, True)
    with pytest.raises(ModelLoadError, match="closed"):
        first.twin()
    assert driver.generate("HELLO", greedy(5)).tokens == expected
    assert second.render_chat(json.dumps([{"role": "user", "content": "hi"}]).encode()) == "hi!"
    assert second.facts() == Model(file).facts()
    driver.close()
    second.close()


def test_a_template_that_does_not_parse_leaves_no_twin(file: Path) -> None:
    model = Model(file)
    with pytest.raises(ModelLoadError, match="does not parse"):
        model.twin(chat_template="{% nonsense %}")
    assert model.n_twins == 1
    model.close()


def test_a_file_is_loaded_once_by_whatever_path(file: Path, tmp_path: Path) -> None:
    (tmp_path / "soft.gguf").symlink_to(file)
    (tmp_path / "hard.gguf").hardlink_to(file)
    models = [load(path) for path in (file, tmp_path / "soft.gguf", tmp_path / "hard.gguf")]
    assert [model.n_twins for model in models] == [3, 3, 3]
    models[2].close()
    models.append(load(file))
    assert models[3].n_twins == 3, "also when the last one has gone"
    for model in models:
        model.close()
    assert not sharing.is_loaded(file, ServeConfig())


@pytest.mark.parametrize(
    "options", [{"mmap": False}, {"split_mode": "none"}, {"gpu_layers": "0"}, {"deterministic": True}]
)
def test_what_is_to_lie_elsewhere_is_loaded_anew(file: Path, options: dict[str, Any]) -> None:
    first, second = load(file), load(file, **options)
    assert (first.n_twins, second.n_twins) == (1, 1)
    first.close()
    second.close()


def test_a_file_that_has_changed_is_loaded_anew(file: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    first = load(file)
    Path(shutil.copy(tiny_model("llama", seed=8), tmp_path / "new.gguf")).replace(file)
    second = load(file)
    assert (first.n_twins, second.n_twins) == (1, 1)
    assert not sharing.is_loaded(tmp_path / "nosuch.gguf", ServeConfig())
    first.close()
    second.close()


def test_a_load_that_shares_can_be_cancelled_too(file: Path) -> None:
    first = load(file)
    with pytest.raises(LoadCancelled):
        load_model(file, ServeConfig(), lambda fraction: False)
    assert first.n_twins == 1
    first.close()


# -- engines


def test_two_engines_share_and_report_a_part_each(make_engine: Callable[..., Engine], file: Path) -> None:
    first = make_engine(file)
    alone = first.memory_report_sync()["weights"]
    second = make_engine(file)
    weights = [engine.memory_report_sync()["weights"] for engine in (first, second)]
    assert [one["shared_by"] for one in (alone, *weights)] == [1, 2, 2]
    for one in weights:
        assert abs(one["allocated_bytes"] * 2 - alone["allocated_bytes"]) <= 2 * len(alone["buffers"])
    assert answer(first) == answer(second)
    first.close()
    assert second.memory_report_sync()["weights"]["allocated_bytes"] == alone["allocated_bytes"]
    assert answer(second)


def test_a_swap_of_one_leaves_the_other_its_weights(
    make_engine: Callable[..., Engine], file: Path, other: Path
) -> None:
    first, second = make_engine(file), make_engine(file)
    before = answer(second)
    first.weights.swap(other)
    assert first.model.n_twins == second.model.n_twins == 1
    assert answer(second) == before
    first.weights.swap(file)
    assert first.model.n_twins == 2, "and back onto those that are there"
    second.close()
    assert answer(first) == before


def test_a_sleep_of_one_leaves_the_other_awake(make_engine: Callable[..., Engine], file: Path) -> None:
    first, second = make_engine(file), make_engine(file)
    before = answer(first)
    first.weights.sleep()
    assert second.model.n_twins == 1
    assert answer(second) == before
    first.weights.wake()
    assert second.model.n_twins == 2
    second.close()
    assert answer(first) == before


def test_adapters_belong_to_an_engine(make_engine: Callable[..., Engine], file: Path, tmp_path: Path) -> None:
    first, second = make_engine(file), make_engine(file)
    plain = answer(first)
    first.weights.load_lora(str(adapters.build(tmp_path / "a.gguf", file, seed=1)), "a")
    changed = answer(first, LoraUse("a"))
    assert changed != plain
    assert answer(second) == plain and second.weights.loras() == []
    second.close()
    assert answer(first, LoraUse("a")) == changed


def test_what_is_loaded_already_needs_no_memory_again(
    make_engine: Callable[..., Engine], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(ctx_size=512, parallel=2, batch_size=64)
    needs = fits.expected(file, config, n_ctx=512, n_parallel=2)
    assert needs is not None
    monkeypatch.setattr(fits, "free_memory", lambda config: needs.total - needs.weights // 2)
    with pytest.raises(MemoryTooSmall):
        fits.check(file, config, "m", 512, 2)
    with pytest.raises(MemoryTooSmall):
        fits.sizes_for(file, config, "m")
    first = load(file, ctx_size=512)
    fits.check(file, config, "m", 512, 2)
    assert fits.sizes_for(file, config, "m") is not None
    first.close()
    with pytest.raises(MemoryTooSmall):
        fits.check(file, config, "m", 512, 2)
