"""Which of several files is meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama.errors import ReferenceNotFound
from mullama.models.sources.selection import _FULL, _LIKED, Candidate, bits_of, choose, quant_of


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


PREFERRED = (*(quant for liked in _LIKED.values() for quant in liked), *_FULL)


@given(st.lists(st.sampled_from(PREFERRED), min_size=1, unique=True))
def test_the_most_wanted_there_is(quants: list[str]) -> None:
    names = [f"m-{quant}.gguf" for quant in quants]
    assert pick(names) == [f"m-{min(quants, key=PREFERRED.index)}.gguf"]


@given(st.permutations(REPO))
def test_the_order_of_a_listing_means_nothing(names: list[str]) -> None:
    assert pick(names) == ["m-Q4_K_M.gguf"]


def split(stem: str, n: int) -> list[str]:
    return [f"{stem}-{part:05}-of-{n:05}.gguf" for part in range(1, n + 1)]


#: How those who upload most lay their repositories out: what lies there, and what a plain reference means.
LISTINGS = {
    "dynamic types, each large one in a folder": (
        [
            *("m-Q4_K_S.gguf", "m-UD-Q4_K_XL.gguf", "m-UD-IQ1_S.gguf", "m-UD-TQ1_0.gguf", "m-Q8_0.gguf"),
            *("mmproj-BF16.gguf", "mmproj-F16.gguf", "imatrix_unsloth.gguf", *split("BF16/m-BF16", 2)),
        ],
        ["m-UD-Q4_K_XL.gguf"],
    ),
    "the same with Q4_K_M": (["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf", "m-UD-Q2_K_XL.gguf"], ["m-Q4_K_M.gguf"]),
    "a large one, every type in its folder, and the drafter's head": (
        [
            *(*split("BF16/m-BF16", 3), *split("UD-IQ1_M/m-UD-IQ1_M", 2), *split("UD-Q4_K_XL/m-UD-Q4_K_XL", 2)),
            *("MTP/m-Q4_K_M.gguf", "mtp-m-Q4_K_M.gguf"),
        ],
        split("UD-Q4_K_XL/m-UD-Q4_K_XL", 2),
    ),
    "an importance matrix with the model's name": (
        ["org_m-imatrix.gguf", "org_m-IQ2_M.gguf", "org_m-IQ4_XS.gguf", "org_m-Q3_K_XL.gguf", "org_m-bf16.gguf"],
        ["org_m-IQ4_XS.gguf"],
    ),
    "weighted types, with a dot": (
        ["m.i1-IQ1_S.gguf", "m.i1-Q4_K_S.gguf", "m.i1-Q4_K_M.gguf", "m.i1-Q6_K.gguf", "m.imatrix.gguf"],
        ["m.i1-Q4_K_M.gguf"],
    ),
    "models that say imatrix": (
        ["m-Q5_K_M-imatrix.gguf", "m-Q4_K_M-imatrix.gguf", "m-imatrix.gguf"], ["m-Q4_K_M-imatrix.gguf"]
    ),
    "two types by the model's makers": (["m-q4_0.gguf", "mmproj-model-f16-4B.gguf"], ["m-q4_0.gguf"]),
    "a model of four bits from the start": (
        ["m-mxfp4-00001-of-00002.gguf", "m-mxfp4-00002-of-00002.gguf", "m-F16.gguf"], split("m-mxfp4", 2)
    ),
    "by way of a Mac": (
        ["._m-Q4_K_M.gguf", "__MACOSX/._m-Q8_0.gguf", "__MACOSX/m-Q4_0.gguf", "m-Q8_0.gguf", ".cache/m-Q4_K_S.gguf"],
        ["m-Q8_0.gguf"],
    ),
    "adapters beside the model": (
        ["lora/m-Q4_K_M.gguf", "lora-m-Q4_0.gguf", "m-lora-f16.gguf", "m-Q6_K.gguf", "m-f16.gguf"], ["m-Q6_K.gguf"]
    ),
    "a small model to draft with": (
        ["m-draft-Q4_K_M.gguf", "eagle3-m-Q4_0.gguf", "dflash-m-Q4_0.gguf", "m-Q5_K_M.gguf"], ["m-Q5_K_M.gguf"]
    ),
    "types of the past and of forks": (
        ["m-Q4_0_4_4.gguf", "m-Q4_0_8_8.gguf", "m-IQ4_KSS.gguf", "m-IQ3_K_R4.gguf", "m-Q3_K_M.gguf", "m-bf16.gguf"],
        ["m-Q3_K_M.gguf"],
    ),
    "speech": (["OuteTTS-Q8_0.gguf", "OuteTTS-F16.gguf", "WavTokenizer-Large-75-Q4_0.gguf"], ["OuteTTS-Q8_0.gguf"]),
    "full precision and two bits": (["m-bf16.gguf", "m-f32.gguf", "m-IQ2_XXS.gguf"], ["m-IQ2_XXS.gguf"]),
    "full precision alone": (["m-bf16.gguf", "m-f32.gguf"], ["m-bf16.gguf"]),
    "one bit because it was trained so": (["m-Q1_0.gguf", "mmproj-m-Q8_0.gguf"], ["m-Q1_0.gguf"]),
    "a model to draft with, and nothing else": (["m-DRAFT-0.6B-Q8_0.gguf", "m-DRAFT-0.6B-Q4_0.gguf"],
                                               ["m-DRAFT-0.6B-Q4_0.gguf"]),
    "a name that an adapter made": (["m-LoRA-merged-Q8_0.gguf", "m-LoRA-merged-Q4_K_S.gguf"],
                                    ["m-LoRA-merged-Q4_K_S.gguf"]),
    "drafters' words in a model's name": (["MTPLX-Q4_0.gguf", "mtp.gguf"], ["MTPLX-Q4_0.gguf"]),
    "vocabularies": (["ggml-vocab-llama-bpe.gguf", "vocab.gguf", "z.gguf"], ["z.gguf"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTINGS)
def test_a_plain_reference_means_the_best_liked_model(name: str) -> None:
    names, expected = LISTINGS[name]
    assert pick(names) == expected
    assert pick(names[::-1]) == expected


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("q4_k_xl", "m-UD-Q4_K_XL.gguf"),
        ("Q8_0", "m-Q8_0.gguf"),
        ("BF16", "BF16/m-BF16-00001-of-00002.gguf"),
        ("UD-TQ1_0", "m-UD-TQ1_0.gguf"),
    ],
)
def test_a_quantisation_is_never_a_file_that_is_no_model(quant: str, expected: str) -> None:
    names = [*LISTINGS["dynamic types, each large one in a folder"][0], "MTP/m-Q8_0.gguf", "._m-UD-Q4_K_XL.gguf"]
    assert pick(names, quant=quant)[0] == expected


def test_an_importance_matrix_is_known_by_its_size() -> None:
    """It says the type of the model that it was measured with; only its size tells it from a model made with one."""
    files = [Candidate("m-Q8_0-imatrix.gguf", 5_000_000), Candidate("m-Q2_K.gguf", 3_000_000_000)]
    assert [file.path for file in choose(files, where="it")] == ["m-Q2_K.gguf"]
    files[0] = Candidate("m-Q8_0-imatrix.gguf", 8_000_000_000)
    assert [file.path for file in choose(files, where="it")] == ["m-Q8_0-imatrix.gguf"]


@pytest.mark.parametrize(
    "names", [["m-IQ1_S.gguf", "m-BF16.gguf"], ["m-TQ1_0.gguf", "m-UD-IQ1_M.gguf"], ["m.gguf", "m-Q1_0.gguf"]]
)
def test_one_bit_is_not_taken_by_accident(names: list[str]) -> None:
    with pytest.raises(ReferenceNotFound, match="no model of 2 to 8 bits; choose one with --quant; there are m"):
        pick(names)
    one_bit = next(name for name in names if bits_of(quant_of(name) or "") == 1)
    assert pick(names, quant=quant_of(one_bit)) == [one_bit]
    assert pick([one_bit]) == [one_bit], "it is all there is"


@given(st.lists(st.sampled_from((*PREFERRED, "IQ1_S", "UD-IQ1_M", "TQ1_0")), min_size=2, unique=True))
def test_never_full_precision_nor_one_bit_where_there_is_something_else(quants: list[str]) -> None:
    between = [quant for quant in quants if 2 <= (bits_of(quant) or 0) <= 8]
    try:
        (found,) = pick([f"m-{quant}.gguf" for quant in quants])
    except ReferenceNotFound:
        assert not between and any(bits_of(quant) == 1 for quant in quants)
    else:
        assert not between or 2 <= (bits_of(quant_of(found) or "") or 0) <= 8
