"""Products in tiles (vendor/patches/0006) are equal to the bit to those one row by one column."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.installation.instructions import library_folder

BLOCK = 32  # values
Q4_1, Q5_0, Q8_0 = 3, 6, 8  # enum ggml_type
Q4_K, Q5_K, Q6_K = 12, 13, 14
SUPER = 256  # values of a block of a K-type
K_TYPES = {
    Q4_K: np.dtype([("scales", "<f2", 2), ("quants", "i1", 12 + 128)]),
    Q5_K: np.dtype([("scales", "<f2", 2), ("quants", "i1", 12 + 32 + 128)]),
    Q6_K: np.dtype([("quants", "i1", 128 + 64 + 16), ("scales", "<f2", 1)]),
}
Q8_K = np.dtype([("d", "<f4"), ("quants", "i1", SUPER), ("sums", "<i2", SUPER // 16)])


def _library() -> ctypes.CDLL:
    folder = library_folder()
    found = sorted(folder.glob("*ggml-cpu*"))
    assert found, f"no CPU backend in {folder}"
    library = ctypes.CDLL(str(found[0]))
    library.ggml_cpu_init()  # the table of half floats that vec_dot reads
    return library


LIBRARY = _library()
HAS = LIBRARY.ggml_exact_tiles_has
HAS.restype = ctypes.c_bool
ROW = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
)

needs_tiles = pytest.mark.skipif(not HAS(Q4_1, BLOCK), reason="this machine has no tiles")


def _blocks(rng: np.random.Generator, rows: int, n: int, halves: int, quants: int) -> np.ndarray:
    """Rows of blocks: so many half floats, then so many bytes of quants. Like llama.cpp, never the byte -128."""
    made = np.empty((rows, n // BLOCK), np.dtype([("scales", "<f2", halves), ("quants", "i1", quants)]))
    made["scales"] = rng.normal(0, 0.1, made["scales"].shape)
    made["quants"] = rng.integers(-127, 128, made["quants"].shape)
    return made


def _weights(rng: np.random.Generator, kind: int, rows: int, n: int) -> np.ndarray:
    if kind in K_TYPES:  # every bit pattern of scales and values is one that can occur
        made = np.empty((rows, n // SUPER), K_TYPES[kind])
        made["scales"] = rng.normal(0, 0.1, made["scales"].shape)
        made["quants"] = rng.integers(-128, 128, made["quants"].shape)
        return made
    halves, quants = {Q4_1: (2, 16), Q5_0: (1, 4 + 16), Q8_0: (1, 32)}[kind]
    return _blocks(rng, rows, n, halves, quants)


def _columns(rng: np.random.Generator, kind: int, columns: int, n: int) -> np.ndarray:
    if kind in K_TYPES:
        made = np.empty((columns, n // SUPER), Q8_K)
        made["d"] = rng.normal(0, 0.1, made["d"].shape)
        made["quants"] = rng.integers(-127, 128, made["quants"].shape)
        made["sums"] = made["quants"].reshape(*made.shape, SUPER // 16, 16).sum(axis=-1)
        return made
    return _blocks(rng, columns, n, 2 if kind == Q4_1 else 1, 32)  # Q8_1 or Q8_0


def _products(kind: int, weights: np.ndarray, columns: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The same products by tiles, and one at a time: (columns, rows)."""
    rows = len(weights)
    names = {Q4_1: "ggml_vec_dot_q4_1_q8_1", Q5_0: "ggml_vec_dot_q5_0_q8_0", Q8_0: "ggml_vec_dot_q8_0_q8_0"}
    names |= {Q4_K: "ggml_vec_dot_q4_K_q8_K", Q5_K: "ggml_vec_dot_q5_K_q8_K", Q6_K: "ggml_vec_dot_q6_K_q8_K"}
    vec_dot = getattr(LIBRARY, names[kind])
    vec_dot.argtypes, vec_dot.restype = (*ROW, ctypes.c_int), None
    mul = LIBRARY.ggml_exact_tiles_mul
    mul.argtypes, mul.restype = (ctypes.c_int, *ROW, ctypes.c_int, ctypes.c_int), None

    stride = rows + 3  # a matrix of which the tile is a part: what lies beside it stays as it was
    tiled = np.full((len(columns), stride), 7.0, np.float32)
    single = tiled.copy()
    x, bx, y, by = weights.ctypes.data, weights.strides[0], columns.ctypes.data, columns.strides[0]
    mul(kind, n, tiled.ctypes.data, stride, x, bx, y, by, rows, len(columns))
    for c in range(len(columns)):
        for r in range(rows):
            vec_dot(n, single[c, r:].ctypes.data, 0, x + r * bx, 0, y + c * by, 0, 1)
    return tiled, single


@needs_tiles
@pytest.mark.parametrize("kind", [Q4_1, Q5_0, Q8_0], ids=["q4_1", "q5_0", "q8_0"])
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 21), columns=st.integers(1, 11), blocks=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_equal_to_the_bit(kind: int, rows: int, columns: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = blocks * BLOCK
    tiled, single = _products(kind, _weights(rng, kind, rows, n), _columns(rng, kind, columns, n), n)
    assert tiled.tobytes() == single.tobytes()
    assert np.isfinite(tiled).all()


@pytest.mark.skipif(not HAS(Q4_K, SUPER), reason="this machine has no tiles of K-types")
@pytest.mark.parametrize("kind", list(K_TYPES), ids=["q4_K", "q5_K", "q6_K"])
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 19), blocks=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_k_types_are_equal_to_the_bit(kind: int, rows: int, columns: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = blocks * SUPER
    tiled, single = _products(kind, _weights(rng, kind, rows, n), _columns(rng, kind, columns, n), n)
    assert tiled.tobytes() == single.tobytes()
    assert np.isfinite(tiled).all()


@pytest.mark.skipif(not HAS(Q4_K, SUPER), reason="this machine has no tiles of K-types")
@pytest.mark.parametrize("kind", list(K_TYPES), ids=["q4_K", "q5_K", "q6_K"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_of_a_k_type(kind: int, poison: float) -> None:
    rng = np.random.default_rng(1)
    weights = _weights(rng, kind, 9, 4 * SUPER)
    weights["scales"][3, 2] = poison
    tiled, single = _products(kind, weights, _columns(rng, kind, 5, 4 * SUPER), 4 * SUPER)
    assert not np.isfinite(tiled[:, 3]).any()
    np.testing.assert_array_equal(tiled[np.isfinite(tiled)], single[np.isfinite(single)])


@needs_tiles
@pytest.mark.parametrize("kind", [Q4_1, Q5_0, Q8_0], ids=["q4_1", "q5_0", "q8_0"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(kind: int, poison: float) -> None:
    rng = np.random.default_rng(1)
    n = 4 * BLOCK
    weights = _weights(rng, kind, 9, n)
    weights["scales"][3, 2] = poison
    tiled, single = _products(kind, weights, _columns(rng, kind, 5, n), n)
    assert not np.isfinite(tiled[:, 3]).any()
    assert np.array_equal(np.isfinite(tiled), np.isfinite(single))
    np.testing.assert_array_equal(tiled[np.isfinite(tiled)], single[np.isfinite(single)])


@needs_tiles
def test_says_what_it_can() -> None:
    assert HAS(Q4_1, 576) and HAS(Q5_0, 576) and HAS(Q8_0, 576) and HAS(Q8_0, 1024 * BLOCK)
    assert not HAS(Q8_0, 1025 * BLOCK)  # what a tile keeps on the stack is bounded
    assert not HAS(Q4_1, 33) and not HAS(2, 576) and not HAS(0, 576)
