"""What the header says a model will take is what llama.cpp then allocates."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shaped
from shaped import Shape

from mullama._core import Context, Model
from mullama.errors import MemoryTooSmall
from mullama.models.files.estimate import Estimate, check_fits, estimate

LONG = pytest.mark.skipif(not os.environ.get("MULLAMA_LONG"), reason="takes a gigabyte; set MULLAMA_LONG=1")

#: Settings of a context as ``estimate`` takes them.
SIZES: list[dict[str, Any]] = [
    {"n_ctx": 512},
    {"n_ctx": 4096, "n_parallel": 8},
    {"n_ctx": 1000, "n_parallel": 3, "n_batch": 64},
    {"n_ctx": 2048, "n_parallel": 4, "flash_attn": "off"},
    {"n_ctx": 2048, "n_parallel": 4, "kv_layout": "unified", "kv_tokens": 4096},
]


def allocated(model: Model, sizes: dict[str, Any]) -> dict[str, Any]:
    """What ``Context.memory`` counts with these settings."""
    options = {"n_parallel": 1, **sizes}
    cells = options.get("kv_tokens") if options.pop("kv_layout", "streams") == "unified" else 0
    options.pop("kv_tokens", None)
    context = Context(model, n_slots=options.pop("n_parallel"), unified_cells=cells or 0, **options)
    memory = context.memory()
    context.close()
    return memory


def compare(path: Path, sizes: dict[str, Any], tolerance: float, model: Model | None = None) -> Estimate:
    own = model or Model(path)
    real = allocated(own, sizes)
    if model is None:
        own.close()
    found = estimate(path, **sizes)
    assert found.weights == pytest.approx(sum(real["weights"].values()), rel=0.001, abs=4096)
    assert found.kv_total == pytest.approx(sum(real["kv"].values()), rel=0.001, abs=4096)
    assert found.output == pytest.approx(real["output"], rel=0.01, abs=4096)
    total = sum(sum(real[part].values()) for part in ("weights", "kv", "compute")) + real["output"]
    assert found.total == pytest.approx(total, rel=tolerance), (found, real)
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "lfm2"])
def test_tiny_models(tiny_model: Callable[..., Path], arch: str, sizes: dict[str, Any]) -> None:
    """Their buffers are all compute buffers, of an unusual shape, so only roughly."""
    compare(tiny_model(arch), sizes, 0.25)


SHAPES = [
    Shape(n_layer=4, n_embd=512, n_ff=1536),
    Shape(n_layer=4, n_embd=512, n_ff=1536, kind="Q4_0"),
    Shape(n_layer=4, n_embd=512, n_ff=1536, kind="Q4_0", is_tied=True),
    Shape(n_layer=4, n_embd=512, n_ff=1536, kind="Q4_0", embd_kind="Q8_0", is_tied=True),
    Shape(n_layer=4, n_embd=512, n_ff=1536, kind="Q4_K"),
    Shape(n_layer=4, n_embd=512, n_ff=1536, kind="Q6_K", n_head=16, head=32, n_head_kv=16),
    Shape(arch="qwen2", n_layer=4, n_embd=256, n_ff=1024, head=64, n_vocab=32000, is_tied=True),
    Shape(arch="gemma3", n_layer=8, n_embd=320, n_ff=1024, n_head=2, n_head_kv=1, head=128, window=256, is_tied=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_models_of_many_shapes(tmp_path: Path, shape: Shape) -> None:
    path = shaped.build(tmp_path / "model.gguf", shape)
    model = Model(path)
    for sizes in SIZES:
        compare(path, sizes, 0.1, model)
    model.close()


@pytest.mark.parametrize(
    "sizes", [*SIZES, {"n_ctx": 8192, "n_parallel": 2, "type_k": "q8_0", "type_v": "q8_0"}], ids=str
)
def test_smollm2(real_model: Model, smollm2: Path, sizes: dict[str, Any]) -> None:
    compare(smollm2, sizes, 0.02, real_model)


def test_gemma3(gemma3: Path) -> None:
    """A window, a large vocabulary, and weights of which some are repacked."""
    model = Model(gemma3)
    for sizes in SIZES:
        found = compare(gemma3, sizes, 0.02, model)
        assert set(found.kv) == {"full", "window"}
    model.close()


@LONG
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_model_of_a_billion_and_a_half(tmp_path: Path, kind: str) -> None:
    from dataclasses import replace

    path = shaped.build(tmp_path / "model.gguf", replace(shaped.QWEN_1_5B, kind=kind, embd_kind="Q8_0"), random=True)
    model = Model(path)
    for n_ctx in (4096, 32768):
        compare(path, {"n_ctx": n_ctx, "n_parallel": 2}, 0.1, model)
    model.close()


def test_what_is_said_not_to_fit_is_not_tried(tiny_model: Callable[..., Path]) -> None:
    found = estimate(tiny_model(), n_ctx=4096, n_parallel=4)
    check_fits(found, found.total, "tiny")
    check_fits(found, None, "tiny")
    with pytest.raises(MemoryTooSmall, match=r"tiny with 4 x 4096 tokens does not fit: .* are free; lower --ctx-size"):
        check_fits(found, found.total - 1, "tiny")
