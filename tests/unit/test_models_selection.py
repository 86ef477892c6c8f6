"""Which of several files is meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama.errors import ReferenceNotFound
from mullama.models.selection import PREFERRED, Candidate, choose, quant_of


def pick(names: list[str], **wish: object) -> list[str]:
    return [file.path for file in choose([Candidate(name) for name in names], where="it", **wish)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "quant"),
    [
        ("qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf", "Q4_K_M"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("Llama-3.2-3B-Instruct-IQ4_XS.gguf", "IQ4_XS"),
        ("model-f16.gguf", "F16"),
        ("qwen-fp16.gguf", "F16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("x-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Q8_0/model-00001-of-00002.gguf", "Q8_0"),
        ("q8_0-made-of-Q4_0.gguf", "Q4_0"),
        ("model.gguf", None),
        ("seq4_0.gguf", None),
    ],
)
def test_what_a_name_says(path: str, quant: str | None) -> None:
    assert quant_of(path) == quant


REPO = [
    "m-Q8_0.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-f16.gguf",
    "mmproj-m-Q4_K_M.gguf",
    "imatrix.gguf",
    "README.md",
]


@pytest.mark.parametrize(
    ("names", "wish", "expected"),
    [
        (REPO, {}, ["m-Q4_K_M.gguf"]),
        (REPO, {"quant": "q8_0"}, ["m-Q8_0.gguf"]),
        (REPO, {"quant": "FP16"}, ["m-f16.gguf"]),
        (REPO, {"filename": "m-Q4_K_S.gguf"}, ["m-Q4_K_S.gguf"]),
        (["m-Q8_0.gguf", "m-f16.gguf"], {}, ["m-Q8_0.gguf"]),
        (["m-f16.gguf", "m-Q5_K_M.gguf"], {}, ["m-Q5_K_M.gguf"]),
        (["b.gguf", "a.gguf"], {}, ["a.gguf"]),
        (["m-Q4_K_M-00002-of-00002.gguf", "m-Q4_K_M-00001-of-00002.gguf"], {},
         ["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf"]),
        (["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf", "m-Q4_K_M.gguf"], {}, ["m-Q4_K_M.gguf"]),
        (["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf"],
         {"filename": "m-Q4_K_M-00001-of-00002.gguf"},
         ["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf"]),
        (["Q4_0/m-00001-of-00001.gguf", "Q8_0/m.gguf"], {"quant": "Q8_0"}, ["Q8_0/m.gguf"]),
        (["m-Q4_K_M.gguf", "m-Q4_K_M-v2-long.gguf"], {"quant": "Q4_K_M"}, ["m-Q4_K_M.gguf"]),
        (["m-custom_mix.gguf", "m-Q8_0.gguf"], {"quant": "custom_mix"}, ["m-custom_mix.gguf"]),
        (["only-Q2_K.gguf"], {"needs_quant": True}, ["only-Q2_K.gguf"]),
    ],
)  # fmt: skip
def test_the_choice(names: list[str], wish: dict[str, object], expected: list[str]) -> None:
    assert pick(names, **wish) == expected


@pytest.mark.parametrize(
    ("names", "wish", "says"),
    [
        ([], {}, "it holds no .gguf model"),
        (["mmproj-Q8_0.gguf"], {}, "no .gguf model"),
        (REPO, {"quant": "Q4_K"}, r"no model in Q4_K; there are m-Q4_K_M\.gguf"),
        (REPO, {"filename": "x.gguf"}, "no file 'x.gguf'; there are"),
        (REPO, {"needs_quant": True}, "more than one .gguf model; choose one with --quant"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], {"quant": "Q8_0"}, r"more than one model in Q8_0; there are a-Q8_0\.gguf, b"),
        (["m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf"], {}, "only 2 of 3 parts"),
        (["a/x.gguf", "b/x.gguf"], {"filename": "x.gguf"}, "more than one file 'x.gguf'"),
    ],
)
def test_no_choice_lists_what_is_there(names: list[str], wish: dict[str, object], says: str) -> None:
    with pytest.raises(ReferenceNotFound, match=says):
        pick(names, **wish)


@given(st.lists(st.sampled_from(PREFERRED), min_size=1, unique=True))
def test_the_most_wanted_there_is(quants: list[str]) -> None:
    names = [f"m-{quant}.gguf" for quant in quants]
    assert pick(names) == [f"m-{min(quants, key=PREFERRED.index)}.gguf"]


@given(st.permutations(REPO))
def test_the_order_of_a_listing_means_nothing(names: list[str]) -> None:
    assert pick(names) == ["m-Q4_K_M.gguf"]
