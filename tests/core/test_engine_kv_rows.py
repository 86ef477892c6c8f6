"""Keys and values out of the KV cache as arrays, and back into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_engine_support import EXACT, one, request, same, submit, tokens

from mullama.engine.engine import Engine
from mullama.errors import InvalidRequest, ModelBusy

Make = Callable[..., Engine]
Tiny = Callable[..., Path]
HEADS, HEAD = 2, 16  # of the tiny models' keys and values


def arrays(found: dict[str, Any]) -> list[Any]:
    return [layer[part] for layer in found["layers"] for part in ("k", "v")]


def test_an_export_says_what_its_rows_are(make_engine: Make) -> None:
    engine = make_engine()
    prompt = tokens(1, 40)
    one(engine, prompt)
    found = engine.kv.export(0)
    assert found["tokens"][:40] == prompt
    assert found["rope"] == {"type": "norm", "dims": HEAD, "freq_base": 10000.0, "scaling": None}
    for layer in found["layers"]:
        assert layer["heads"] == HEADS and layer["k_has_rope"] is True
        assert layer["k"].shape == layer["v"].shape == (len(found["tokens"]), HEADS * HEAD)
    assert engine.kv.export(3) == {"tokens": [], "layers": [], "rope": found["rope"]}


def test_keys_have_the_rotation_and_values_do_not(make_engine: Make) -> None:
    """The same token at two places: in the first layer its value is the same, its key is turned by the angle between.

    There key and value are made of the token alone.
    """
    engine = make_engine(kv_type_k="f32", kv_type_v="f32", **EXACT)
    one(engine, [65, 66, 67, 65, 68])
    found = engine.kv.read([65, 66, 67, 65])
    first = found["layers"][0]
    assert first["k"].dtype == np.float32
    assert np.allclose(first["v"][0], first["v"][3], atol=1e-6)
    assert not np.allclose(first["k"][0], first["k"][3], atol=1e-3)
    rope = found["rope"]
    angle = 3 * rope["freq_base"] ** (-np.arange(0, rope["dims"], 2) / rope["dims"])
    pairs = first["k"][0].reshape(HEADS, HEAD // 2, 2)
    turned = np.stack(
        [pairs[..., 0] * np.cos(angle) - pairs[..., 1] * np.sin(angle),
         pairs[..., 0] * np.sin(angle) + pairs[..., 1] * np.cos(angle)], -1,
    )  # fmt: skip
    assert np.allclose(turned.reshape(-1), first["k"][3], atol=1e-4)


def test_what_was_read_is_written_back_bit_by_bit(make_engine: Make) -> None:
    """Under another salt nothing is cached: the answer is computed on what was written, and is the same."""
    engine = make_engine(**EXACT)
    prompt = tokens(2, 90)
    cold = one(engine, prompt)
    found = engine.kv.read(prompt)
    assert found["tokens"] == prompt
    assert engine.kv.write(prompt, found["layers"], cache_salt="copy") == {"slot": 0, "tokens": 90}
    again = one(engine, prompt, cache_salt="copy")
    assert (again.text, again.profile.kv_cache_hit) == (cold.text, 89)
    assert same(arrays(engine.kv.read(prompt[:89], cache_salt="copy")), [one[:89] for one in arrays(found)])
    assert engine.kv.audit() == []


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_cells_of_any_type_go_round(make_engine: Make, kind: str) -> None:
    """Cells of a type that NumPy has not come as bytes."""
    engine = make_engine(kv_type_k=kind, kv_type_v=kind, flash_attn="on")
    prompt = tokens(3, 50)
    one(engine, prompt)
    found = engine.kv.read(prompt)
    engine.kv.write(prompt, found["layers"], cache_salt="copy")
    assert same(arrays(engine.kv.read(prompt, cache_salt="copy")), arrays(found))
    assert found["layers"][0]["heads"] == (HEADS if kind == "f32" else None)


def test_what_is_written_changes_the_answer_of_its_salt_alone(make_engine: Make) -> None:
    engine = make_engine(**EXACT)
    prompt = tokens(4, 80)
    plain = one(engine, prompt).text
    found = engine.kv.read(prompt)
    changed = []
    for layer in found["layers"]:
        values = layer["v"].reshape(80, HEADS, HEAD).copy()
        values[:, 0] = -values[:, 0]
        changed.append({"layer": layer["layer"], "v": values})
    engine.kv.write(prompt, changed, cache_salt="turned")  # keys are those that are cached without a salt
    turned = one(engine, prompt, cache_salt="turned")
    assert turned.profile.kv_cache_hit == 79
    assert turned.text != plain
    back = engine.kv.read(prompt[:79], cache_salt="turned")
    for layer, before in zip(back["layers"], found["layers"], strict=True):
        assert np.array_equal(layer["k"], before["k"][:79])
        assert np.array_equal(layer["v"][:, :HEAD], -before["v"][:79, :HEAD])
        assert np.array_equal(layer["v"][:, HEAD:], before["v"][:79, HEAD:])
    assert one(engine, prompt).text == plain
    assert engine.kv.audit() == []


def test_one_layer_can_be_written_over_what_is_there(make_engine: Make) -> None:
    """Under the same salt: what was computed of the same beginning is forgotten, in host memory as well."""
    engine = make_engine(parallel=2, **EXACT)
    prompt = tokens(5, 64)
    plain = one(engine, prompt).text
    one(engine, [*prompt[:50], *tokens(6, 30)])
    (layer,) = (one for one in engine.kv.read(prompt)["layers"] if one["layer"] == 0)
    engine.kv.write(prompt, [{"layer": 0, "k": layer["k"], "v": np.zeros_like(layer["v"])}])
    assert not engine.kv.read(prompt)["layers"][0]["v"].any()
    paths = [node for node in engine.kv.tree()["nodes"] if node["parent"] is None]
    assert [(node["end"], node["tiers"]) for node in paths] == [(64, ["device"])], "nothing else begins like it"
    again = one(engine, prompt)
    assert (again.profile.kv_cache_hit, again.text != plain) == (63, True)
    assert engine.kv.audit() == []


def test_host_memory_is_read_as_well(make_engine: Make) -> None:
    engine = make_engine(parallel=1)
    prompt = tokens(7, 60)
    one(engine, prompt)
    found = engine.kv.read(prompt)
    one(engine, tokens(8, 60))  # it takes the only slot
    assert engine.kv.snapshot()["tiers"]["host"]["tokens"] >= 60
    assert same(arrays(engine.kv.read(prompt)), arrays(found))
    assert engine.kv.read(tokens(9, 5))["tokens"] == []


def test_what_does_not_fit_is_told(make_engine: Make, tiny_model: Tiny) -> None:
    engine = make_engine()
    prompt = tokens(10, 20)
    one(engine, prompt)
    layers = engine.kv.read(prompt)["layers"]
    for wrong, reason in (
        ([], "nothing is to be written"),
        ([{"layer": 99, "k": layers[0]["k"]}], "each is a dict with 'layer', one of 0, 1"),
        ([5], "each is a dict with 'layer'"),
        ([{"layer": 0, "k": layers[0]["k"][:5]}], r"layer 0, k: its shape is \(5, 32\); \(20, 32\) is needed"),
        ([{"layer": 0, "k": layers[0]["k"].astype(int)}], "layer 0, k: numbers .float16. are needed, not int64"),
        ([{"layer": 0, "v": layers[0]["v"] * np.float16("inf")}], "layer 0, v: it holds numbers that are not finite"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            engine.kv.write(prompt, wrong)
    with pytest.raises(InvalidRequest, match="some are left out, and what they hold of these tokens"):
        engine.kv.write(tokens(11, 20), layers[:1])
    for ids, reason in (([], "a prefix has 1 to 512 tokens, not 0"), ([10**6], "tokens must be whole numbers"),
                        ([65] * 600, "not 600"), (["a"], "tokens must be")):  # fmt: skip
        with pytest.raises(InvalidRequest, match=reason):
            engine.kv.write(ids, layers)
    assert engine.kv.read(prompt)["tokens"] == prompt, "nothing was forgotten"
    assert engine.kv.audit() == []


def test_running_requests_are_not_disturbed(make_engine: Make) -> None:
    engine = make_engine(parallel=1)
    prompt = tokens(12, 20)
    one(engine, prompt)
    layers = engine.kv.read(prompt)["layers"]
    (running,) = submit(engine, request("busy", prompt, n=400))
    next(running)
    with pytest.raises(ModelBusy, match="a running request begins with the same token"):
        engine.kv.write(prompt, layers)
    with pytest.raises(ModelBusy, match="every slot has a running request"):
        engine.kv.write(prompt, layers, cache_salt="own")
    running.cancel()


@pytest.mark.parametrize("arch", ["gemma3", "mamba", "lfm2"])
def test_windows_and_states_cannot_be_written(make_engine: Make, tiny_model: Tiny, arch: str) -> None:
    engine = make_engine(path=tiny_model(arch))
    with pytest.raises(InvalidRequest, match="full attention in every layer"):
        engine.kv.write([65, 66], [])


def test_the_tree_can_be_read(make_engine: Make) -> None:
    engine = make_engine()
    text = "THE STORY BEGINS. " * 8
    one(engine, list(text.encode()))
    assert "text" not in engine.kv.tree()["nodes"][0]
    node = max(engine.kv.tree(text=True)["nodes"], key=lambda one: one["tokens"])
    begin, _, end = node["text"].partition(" … ")
    assert begin == text[:32] and end and node["tokens"] > 64
    one(engine, list(b"short"), n=1)
    assert "short" in [node["text"] for node in engine.kv.tree(text=True)["nodes"]]
