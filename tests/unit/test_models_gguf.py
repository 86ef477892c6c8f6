"""The GGUF reader: what it reads, and that no damage makes it do anything but refuse in one line."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_support import METADATA, TENSORS, gguf_string, make_gguf

from mullama.errors import ModelLoadError
from mullama.models.files import gguf

VENDORED = Path(__file__).parents[2] / "vendor" / "llama.cpp" / "gguf-py" / "gguf" / "constants.py"
GOOD = make_gguf()


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


def test_reads_everything_of_a_sound_file(write: Any) -> None:
    header = gguf.check(write(GOOD))
    assert (header.version, header.file_size) == (3, len(GOOD))
    assert header.get("{arch}.context_length") == 2048
    assert header.get("llama.rope.freq_base") == 10000.0
    assert header.get("tokenizer.ggml.add_bos_token") is True
    assert header.get("tokenizer.chat_template") == METADATA["tokenizer.chat_template"]
    assert header.get("tokenizer.ggml.tokens") == gguf.Summary("string", 5, ("<s>", "</s>", "a"))
    assert header.get("tokenizer.ggml.token_type") == gguf.Summary("i32", 5, (3, 3, 1))
    assert [(t.name, t.shape, t.type, t.size) for t in header.tensors] == [
        ("token_embd.weight", (32, 5), "Q8_0", 170),
        ("output_norm.weight", (32,), "F32", 128),
    ]
    assert header.n_params == 192
    assert header.data_start % 32 == 0


def test_version_2_and_another_alignment(write: Any) -> None:
    header = gguf.check(write(make_gguf({**METADATA, "general.alignment": 128}, version=2, alignment=128)))
    assert header.version == 2
    assert header.data_start % 128 == 0


def test_a_type_of_the_future_is_not_an_error(write: Any) -> None:
    header = gguf.check(write(make_gguf(tensors=[("x", (7,), 99, 64)])))
    assert (header.tensors[0].size, header.tensors[0].type) == (None, "type 99")


def test_a_very_long_text_is_counted_and_not_kept(write: Any) -> None:
    header = gguf.check(write(make_gguf({"tokenizer.huggingface.json": "x" * (2 << 20)})))
    assert header.get("tokenizer.huggingface.json") == gguf.Summary("string", 2 << 20)


def _with(tensors: Any = None, **metadata: Any) -> bytes:
    return make_gguf({**METADATA, **metadata}, tensors)


def _place(offset: int) -> bytes:
    """The end of an F32 tensor's record."""
    return struct.pack("<IQ", 0, offset)


def _claims(n_tensors: int, n_keys: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys) + GOOD[24:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (b"GGUF", "too short"),
        (b"PK\x03\x04" + GOOD[4:], "not a GGUF file"),
        (GOOD[:4] + struct.pack("<I", 1) + GOOD[8:], "version 1 is not supported"),
        (GOOD[:4] + struct.pack(">I", 3) + GOOD[8:], "big-endian"),
        (GOOD[:200], "truncated"),
        (GOOD[:-40], "the tensor 'output_norm.weight' ends 40 bytes behind the file"),
        (_claims(1 << 40, 1), "claims 1099511627776 tensors"),
        (_claims(1, 1 << 63), "metadata keys"),
        (make_gguf({"a" * 70000: 1}), "a text of 70000 bytes"),
        (_with(**{"general.alignment": 24}), "not a power of two"),
        (_with(**{"general.alignment": "32"}), "not a power of two"),
        (_with([TENSORS[0], TENSORS[0]]), "two tensors are called"),
        (_with([("x", (1, 1, 1, 1, 1), 0, 4)]), "5 dimensions"),
        (_with([("x", (33,), 8, 34)]), "no multiple of 32"),
        (_with([("x", (1 << 40, 1 << 40), 0, 4)]), "impossible shape"),
        (_with([("x" * 64, (1,), 0, 4)]), "a text of 64 bytes"),
        (_with([("x", (1,), 0, 4), ("y", (1,), 0, 4)]).replace(_place(32), _place(33)), "not aligned"),
        (make_gguf({"": 1}), "empty"),
        (GOOD.replace(gguf_string("general.license"), gguf_string("general.license")[:-1] + b"?").replace(
            struct.pack("<I", 8) + gguf_string("mit"), struct.pack("<I", 77) + gguf_string("mit")), "unknown type 77"),
    ],
)  # fmt: skip
def test_damage_is_named_in_one_line(write: Any, data: bytes, message: str) -> None:
    path = write(data)
    with pytest.raises(ModelLoadError) as raised:
        gguf.check(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2Jcleared", "x" * 60000, "\u2028"])
def test_a_name_of_the_file_cannot_break_the_message(write: Any, name: str) -> None:
    """Found by the property tests: a damaged key went into the message as it was."""
    key = gguf_string(name)
    unknown = make_gguf({name: 1}).replace(key + struct.pack("<I", 4), key + struct.pack("<I", 77))
    for data in (unknown, make_gguf(tensors=[(name[:60], (33,), 8, 34)])):
        with pytest.raises(ModelLoadError) as raised:
            gguf.check(write(data))
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 400


def test_a_duplicate_key_is_refused(write: Any) -> None:
    data = make_gguf({"aaaa": 1, "aaab": 2}).replace(b"aaab", b"aaaa")
    with pytest.raises(ModelLoadError, match="'aaaa' is there twice"):
        gguf.check(write(data))


def test_files_that_are_no_regular_readable_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="No such file"):
        gguf.check(tmp_path / "absent.gguf")
    with pytest.raises(ModelLoadError, match="not a regular file"):
        gguf.check(tmp_path)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        gguf.check("nul\0byte")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelLoadError, match="not a regular file"):
        gguf.check(tmp_path / "pipe.gguf")


def test_a_huge_count_of_texts_costs_no_time(write: Any) -> None:
    count = 1 << 25
    array = gguf_string("tokens") + struct.pack("<IIQ", 9, 8, count)
    path = write(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + array)
    with path.open("r+b") as file:
        file.truncate(count * 8 + 4096)  # sparse: every text is empty
    start = time.perf_counter()
    with pytest.raises(ModelLoadError, match=f"claims {count} texts"):
        gguf.check(path)
    assert time.perf_counter() - start < 1.0


FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _refuses_or_reads(path: Path, data: bytes) -> None:
    """The property: a Header or ModelLoadError, quickly and in little memory."""
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        gguf.check(path)
    except ModelLoadError as error:
        assert str(error).isprintable()
    assert time.perf_counter() - start < 2.0


@FUZZ
@given(end=st.integers(0, len(GOOD) - 1))
def test_no_truncation_passes(tmp_path: Path, end: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(GOOD[:end])
    # The last tensor ends where the file does, so that every cut takes something away.
    with pytest.raises(ModelLoadError):
        gguf.check(path)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_bytes_are_refused_or_harmless(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, byte in damage:
        data[at] = byte
    _refuses_or_reads(tmp_path / "damaged.gguf", bytes(data))


@FUZZ
@given(at=st.integers(0, len(GOOD) - 9), value=st.one_of(st.integers(0, 2**64 - 1), st.just(2**63), st.just(2**64 - 1)))
def test_damaged_lengths_are_refused_or_harmless(tmp_path: Path, at: int, value: int) -> None:
    _refuses_or_reads(tmp_path / "damaged.gguf", GOOD[:at] + struct.pack("<Q", value) + GOOD[at + 8 :])


@FUZZ
@given(tail=st.binary(max_size=400))
def test_random_bytes_behind_the_magic(tmp_path: Path, tail: bytes) -> None:
    _refuses_or_reads(tmp_path / "random.gguf", b"GGUF" + struct.pack("<I", 3) + tail)


def test_a_damaged_length_allocates_nothing_of_that_size(tmp_path: Path) -> None:
    """A text that claims nearly the whole of a large (sparse) file is passed over, not read."""
    path = tmp_path / "sparse.gguf"
    size = 256 << 20
    key = gguf_string("general.name") + struct.pack("<IQ", 8, size - 4096)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key)
    os.truncate(path, size)
    tracemalloc.start()
    try:
        header = gguf.check(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert header.get("general.name") == gguf.Summary("string", size - 4096)
    assert peak < 1 << 20


@pytest.mark.skipif(not VENDORED.exists(), reason="llama.cpp is not unpacked here")
def test_the_tensor_types_are_those_of_the_vendored_llama_cpp() -> None:
    spec = importlib.util.spec_from_file_location("gguf_constants", VENDORED)
    assert spec is not None and spec.loader is not None
    constants = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = constants  # its dataclasses look themselves up
    spec.loader.exec_module(constants)
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in constants.GGML_QUANT_SIZES.items()}
    assert theirs == gguf.TENSOR_TYPES


def test_a_50k_vocabulary_is_passed_over_quickly(write: Any) -> None:
    tokens = [f"token{n}" for n in range(50_000)]
    path = write(make_gguf({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": tokens}))
    best = min(_seconds(path) for _ in range(5))
    assert best < 0.05  # about 8 ms on a quiet 2-core machine; room for a busy one


def _seconds(path: Path) -> float:
    start = time.perf_counter()
    gguf.check(path)
    return time.perf_counter() - start


@pytest.mark.parametrize("number", ["one", 1.5, [1, 2]])
def test_a_part_whose_number_is_none_is_refused(write: Any, number: Any) -> None:
    """Found by fuzzing."""
    with pytest.raises(ModelLoadError, match=r"^m: damaged GGUF header: split.no is '"):
        gguf.check(write(make_gguf({**METADATA, "split.count": 2, "split.no": number})), label="m")
