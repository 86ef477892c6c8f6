"""Attention of several heads at once (vendor/patches/0010) is equal to the bit to that of one head, cell after cell.

The same numbers are expected on every processor.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mullama.installation.instructions import library_folder

MAX_ROWS = 4
F16 = 1  # enum ggml_type


class Attention(ctypes.Structure):
    """``struct ggml_exact_attention``."""

    _fields_ = (
        ("n_rows", ctypes.c_int),
        ("dk", ctypes.c_int),
        ("dv", ctypes.c_int),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("nbk", ctypes.c_size_t),
        ("nbv", ctypes.c_size_t),
        ("mask", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("q", ctypes.c_void_p * MAX_ROWS),
        ("sum", ctypes.c_void_p * MAX_ROWS),
        ("m", ctypes.c_float * MAX_ROWS),
        ("s", ctypes.c_float * MAX_ROWS),
    )


def _library() -> ctypes.CDLL:
    folder = library_folder()
    found = sorted(folder.glob("*ggml-cpu*"))
    assert found, f"no CPU backend in {folder}"
    library = ctypes.CDLL(str(found[0]))
    library.ggml_cpu_init()  # the table of half floats
    return library


LIBRARY = _library()
HAS = LIBRARY.ggml_exact_attention_has
HAS.restype = ctypes.c_bool
VEC_DOT = LIBRARY.ggml_vec_dot_f16
VEC_DOT.argtypes = (
    ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t,
    ctypes.c_int,
)  # fmt: skip
VEC_DOT.restype = None
EXPF = ctypes.CDLL(ctypes.util.find_library("m")).expf
EXPF.argtypes, EXPF.restype = (ctypes.c_float,), ctypes.c_float

needs_it = pytest.mark.skipif(not HAS(F16, F16, 64, 64), reason="this machine has no such attention")


def fma(a: np.ndarray, b: np.float32, c: np.ndarray) -> np.ndarray:
    """Rounded once: products of these numbers are exact in double precision."""
    return (a.astype(np.float64) * np.float64(b) + c.astype(np.float64)).astype(np.float32)


def dot(k: np.ndarray, q: np.ndarray) -> np.float32:
    """The score of a cell, added up as ggml_vec_dot_f16() does with AVX-512: four sums of 16 lanes each."""
    sums = np.zeros((4, 16), np.float32)
    for at in range(0, len(q), 64):
        product = k[at : at + 64].astype(np.float64) * q[at : at + 64].astype(np.float64)
        sums = (product.reshape(4, 16) + sums).astype(np.float32)
    lanes = (sums[0] + sums[2]) + (sums[1] + sums[3])
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, cells: list[int], scale: float
) -> tuple[np.ndarray, np.float32, np.float32]:
    """What ggml_compute_forward_flash_attn_ext_f16_one_chunk() does for one row: (sum, m, s)."""
    halves = q.astype(np.float16)
    total = np.zeros(v.shape[1], np.float16)
    m, s = np.float32(-np.inf), np.float32(0)
    for cell in cells:
        x = dot(k[cell], halves) * np.float32(scale)
        shrink, weight = np.float32(1), np.float32(1)
        if x > m:
            shrink = np.float32(EXPF(m - x))
            m = x
            total = (total.astype(np.float32) * shrink).astype(np.float16)
        else:
            weight = np.float32(EXPF(x - m))
        total = fma(v[cell], weight, total).astype(np.float16)
        s = fma(np.asarray(s), shrink, np.asarray(weight))[()]
    return total.astype(np.float32), m, s


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, start: int, end: int, scale: float
) -> tuple[np.ndarray, list[float], list[float]]:
    """The same by exact-attention.h, for all rows of q."""
    n_rows = len(q)
    sums = np.full((n_rows, v.shape[1]), 7.0, np.float32)
    call = Attention(
        n_rows=n_rows, dk=q.shape[1], dv=v.shape[1], k=k.ctypes.data, v=v.ctypes.data, nbk=k.strides[0],
        nbv=v.strides[0], mask=None if mask is None else mask.ctypes.data, start=start, end=end, scale=scale,
    )  # fmt: skip
    for r in range(n_rows):
        call.q[r], call.sum[r] = q[r].ctypes.data, sums[r].ctypes.data
    LIBRARY.ggml_exact_attention_rows(ctypes.byref(call))
    return sums, list(call.m)[:n_rows], list(call.s)[:n_rows]


@needs_it
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_rows=st.integers(1, MAX_ROWS),
    dk=st.sampled_from((64, 128, 192, 256)),
    dv=st.sampled_from((64, 128, 256)),
    n_cells=st.integers(1, 80),
    hidden=st.sampled_from((None, 0.0, 0.3, 0.97, 1.0)),
    spread=st.sampled_from((0.01, 1.0, 30.0)),
)
@example(seed=1, n_rows=3, dk=64, dv=64, n_cells=80, hidden=0.0, spread=1.0)
@example(seed=1, n_rows=3, dk=64, dv=64, n_cells=80, hidden=1.0, spread=1.0)
@example(seed=2, n_rows=4, dk=64, dv=64, n_cells=33, hidden=None, spread=30.0)
def test_equal_to_the_bit(
    seed: int, n_rows: int, dk: int, dv: int, n_cells: int, hidden: float | None, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    q = rng.normal(0, spread, (n_rows, dk)).astype(np.float32)
    # As in a cache, a cell of one head lies between those of others.
    k = rng.normal(0, 1, (n_cells, dk + 32)).astype(np.float16)[:, :dk]
    v = rng.normal(0, 1, (n_cells, dv + 16)).astype(np.float16)[:, :dv]
    mask = None if hidden is None else np.where(rng.random(n_cells) < hidden, -np.inf, 0).astype(np.float16)
    start = int(rng.integers(0, n_cells))
    end = int(rng.integers(start, n_cells + 1))
    scale = 1 / math.sqrt(dk)
    cells = [cell for cell in range(start, end) if mask is None or mask[cell] == 0]
    sums, m, s = attend(q, k, v, mask, start, end, scale)
    for r in range(n_rows):
        expected, expected_m, expected_s = reference(q[r], k, v, cells, scale)
        assert sums[r].tobytes() == expected.tobytes()
        assert (np.float32(m[r]), np.float32(s[r])) == (expected_m, expected_s)


@needs_it
def test_scores_that_grow_and_long_stretches_of_hidden_cells() -> None:
    """Every cell has a new largest score, and most of them are hidden."""
    rng = np.random.default_rng(4)
    n_cells = 700
    k = np.abs(rng.normal(0, 1, (n_cells, 64))).astype(np.float16) * np.linspace(0.1, 4, n_cells)[:, None].astype(
        np.float16
    )
    v = rng.normal(0, 100, (n_cells, 64)).astype(np.float16)
    q = np.abs(rng.normal(0, 1, (3, 64))).astype(np.float32)
    mask = np.full(n_cells, -np.inf, np.float16)
    seen = [0, 1, 5, 17, 18, *range(200, 240), 400, *range(500, 520), 699]
    mask[seen] = 0
    sums, m, s = attend(q, k, v, mask, 0, n_cells, 0.125)
    for r in range(3):
        expected, expected_m, expected_s = reference(q[r], k, v, seen, 0.125)
        assert sums[r].tobytes() == expected.tobytes()
        assert (np.float32(m[r]), np.float32(s[r])) == (expected_m, expected_s)


@needs_it
@pytest.mark.parametrize("n", [64, 128, 192, 256])
def test_scores_are_added_up_as_llama_cpp_does(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(50):
        k, q = rng.normal(0, 1, (2, n)).astype(np.float16)
        score = np.zeros(1, np.float32)
        VEC_DOT(n, score.ctypes.data, 0, k.ctypes.data, 0, q.ctypes.data, 0, 1)
        assert score[0] == dot(k, q)


def test_which_shapes_it_takes() -> None:
    taken = HAS(F16, F16, 64, 64)
    assert HAS(F16, F16, 256, 128) is taken
    for wrong in ((0, F16, 64, 64), (F16, 8, 64, 64), (F16, F16, 80, 64), (F16, F16, 64, 320), (F16, F16, 0, 64)):
        assert HAS(*wrong) is False
