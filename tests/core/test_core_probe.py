"""A new file is opened in a child first: what is sound passes, what crashes, hangs or is damaged is refused by name."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import damage
import pytest

from mullama import child
from mullama._core import Model
from mullama.errors import InvalidRequest, ModelLoadError
from mullama.models.child import probe
from mullama.models.child.probe import ProbeResult, Verdicts, check_model
from mullama.models.store.digests import hash_file

LONG = pytest.mark.skipif(not os.environ.get("MULLAMA_LONG"), reason="takes minutes; set MULLAMA_LONG=1")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files for which a child was started."""
    started: list[Path] = []
    real = probe.probe

    def counted(path: Path, **options: object) -> ProbeResult:
        started.append(Path(path))
        return real(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "probe", counted)
    return started


def refused(path: Path, **options: object) -> str:
    with pytest.raises(ModelLoadError) as caught:
        check_model(path, **options)  # type: ignore[arg-type]
    message = caught.value.message
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 700
    assert len(message) > len(str(path)) + 10, "it gives a reason"
    return message[len(str(path)) :]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "lfm2"])
def test_a_sound_file_passes(tiny_model: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    found = check_model(tiny_model(arch), root=tmp_path)
    assert found.ok and found.finite is True and found.template == "ok" and found.wall_ms > 0


def test_a_file_without_a_template(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    assert check_model(tiny_model(chat_template=None), root=tmp_path).template == "none"


def test_a_template_that_refuses_is_no_damage(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_model(chat_template="{{ raise_exception('only haiku') }}")
    found = check_model(path, root=tmp_path)
    assert found.ok and "only haiku" in found.template


def test_a_broken_template_is_no_damage(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Completions work, and a chat gets ChatML."""
    assert check_model(tiny_model(chat_template="{% if %}{{"), root=tmp_path).ok


def test_every_truncated_or_broken_file_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, children: list[Path]
) -> None:
    """All cuts, and every seventh of the broken headers; the long test takes all of them, and a real model's."""
    cases = [case for case in damage.cases(tiny_model()) if case.kind != "weights"]
    header = [case for case in cases if case.kind == "header"]
    chosen = [case for case in cases if case.kind == "truncated"] + header[::7]
    assert len(cases) > 800 and len(chosen) >= 200
    target = tmp_path / "damaged.gguf"
    for case in chosen:
        case.write(target)
        refused(target, root=tmp_path)
    assert children, "some are found by llama.cpp only"


def test_bad_numbers_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Those that llama.cpp takes without a word among them."""
    wrong = ("context_length", "bos_token_id", "eos_token_id", "freq_base", "block_count", "head_count", "epsilon")
    cases = [case for case in damage.cases(tiny_model()) if case.name.split(" is ")[0].endswith(wrong)]
    assert len(cases) > 20
    for case in cases:
        case.write(tmp_path / "damaged.gguf")
        refused(tmp_path / "damaged.gguf", root=tmp_path)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_what_crashes_llama_cpp_crashes_the_child(tiny_model: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    n_crashed = 0
    for number, case in enumerate(damage.crashers(tiny_model(arch), arch)):
        if "is 0" in case.name:
            continue
        reason = refused(case.write(tmp_path / f"{number}.gguf"), root=tmp_path)
        if "it has no vocabulary" not in reason:  # that is seen before
            assert "crashed a test process (SIGABRT)" in reason and "GGML_ASSERT" in reason, case.name
            n_crashed += 1
    assert n_crashed


def test_a_decode_without_end_is_stopped(tiny_model: Callable[..., Path], tmp_path: Path, children: list[Path]) -> None:
    case = next(c for c in damage.crashers(tiny_model("gemma3"), "gemma3") if c.name.endswith("is 0"))
    path = case.write(tmp_path / "hangs.gguf")
    assert "decoding one token hung" in refused(path, root=tmp_path, timeout_s=3)
    # The verdict is remembered.
    assert "decoding one token hung" in refused(path, root=tmp_path, timeout_s=3)
    assert len(children) == 1


@pytest.mark.parametrize("source", [damage.LOOP, damage.EXPLODE], ids=["loops", "explodes"])
def test_a_hostile_template_holds_nobody_up(tiny_model: Callable[..., Path], tmp_path: Path, source: str) -> None:
    """Its work is bounded, so that the file may be used: completions work, and a chat is refused."""
    path = tiny_model(chat_template=source)
    assert check_model(path, root=tmp_path, timeout_s=30).ok
    with pytest.raises(InvalidRequest):
        Model(path, vocab_only=True).render_chat(b'[{"role": "user", "content": "hi"}]')


def test_a_template_with_a_huge_result_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_model(chat_template="{% for i in range(1500) %}" + "0123456789" * 100 + "{% endfor %}")
    assert "makes 1500000 characters" in refused(path, root=tmp_path)


def test_flipped_weights_are_refused_when_the_digest_is_known(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model()
    digest = hash_file(base)
    assert check_model(base, digest=digest, root=tmp_path).ok
    flipped = [case for case in damage.cases(base) if case.kind == "weights"]
    assert len(flipped) >= 20
    for number, case in enumerate(flipped):
        path = case.write(tmp_path / f"{number}.gguf")
        assert "sha256" in refused(path, digest=digest, root=tmp_path)


def test_flipped_weights_load_otherwise(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    finite = []
    for number, case in enumerate(case for case in damage.cases(tiny_model()) if case.kind == "weights"):
        found = check_model(case.write(tmp_path / f"{number}.gguf"), root=tmp_path)
        assert found.ok
        finite.append(found.finite)
    assert True in finite and False in finite, "what is not finite is reported, and the caller decides"


def test_a_second_look_starts_no_child(tiny_model: Callable[..., Path], tmp_path: Path, children: list[Path]) -> None:
    path = Path(shutil.copy(tiny_model(), tmp_path / "model.gguf"))
    first = check_model(path, root=tmp_path)
    assert check_model(path, root=tmp_path) == first
    assert len(children) == 1
    os.utime(path, ns=(1, 1))
    check_model(path, root=tmp_path)
    assert len(children) == 2, "another time of change: another file"
    digest = hash_file(path)
    check_model(path, digest=digest, root=tmp_path)
    other = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    check_model(other, digest=digest, root=tmp_path)
    assert len(children) == 3, "one verdict for all files of a digest"
    Verdicts(tmp_path).forget(path)
    check_model(path, root=tmp_path)
    assert len(children) == 4


def test_a_verdict_of_another_version_does_not_count(
    tiny_model: Callable[..., Path], tmp_path: Path, children: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_model(tiny_model(), root=tmp_path)
    monkeypatch.setattr(probe, "VERSION", "9.9")
    check_model(tiny_model(), root=tmp_path)
    assert len(children) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"file": 1}', "null"])
def test_a_damaged_verdict_does_not_count(tiny_model: Callable[..., Path], tmp_path: Path, text: str) -> None:
    check_model(tiny_model(), root=tmp_path)
    for record in (tmp_path / "verdicts").iterdir():
        record.write_text(text)
    assert check_model(tiny_model(), root=tmp_path).ok
    assert not [part for part in (tmp_path / "verdicts").iterdir() if part.suffix != ".json"]


def test_known_good_files_need_no_child(tiny_model: Callable[..., Path], tmp_path: Path, children: list[Path]) -> None:
    path = tiny_model()
    assert check_model(path, digest=hash_file(path), known_good=True, root=tmp_path).ok
    assert children == []
    check_model(path, known_good=True, root=tmp_path)
    assert len(children) == 1, "without a digest nobody knows that it is that file"


def test_a_store_that_cannot_be_written_to(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "verdicts").write_text("a file where the folder should be")
    assert check_model(tiny_model(), root=tmp_path).ok


def test_too_little_memory_is_a_reason(tiny_model: Callable[..., Path]) -> None:
    found = probe.probe(tiny_model(), memory_limit=30 << 20)
    assert not found.ok and "memory" in found.reason


def test_a_killed_child_is_not_held_against_the_file(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = child.start

    def start(module: str, arguments: list[str], variables: dict[str, str]) -> object:
        process = real(module, arguments, variables)
        process.kill()
        return process

    monkeypatch.setattr(child, "start", start)
    assert "was killed" in refused(tiny_model(), root=tmp_path)
    monkeypatch.setattr(child, "start", real)
    assert check_model(tiny_model(), root=tmp_path).ok


def test_the_child_ignores_the_folder_it_is_started_in(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mullama").mkdir()
    (tmp_path / "mullama" / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert probe.probe(tiny_model()).ok


def _check(path: Path, root: Path) -> bool:
    return check_model(path, root=root).ok


def test_two_processes_at_once(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(_check, [(tiny_model(), tmp_path)] * 4) == [True] * 4


@LONG
def test_every_damaged_copy_of_the_tiny_models(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    for arch in ("llama", "gemma3", "mamba", "lfm2"):
        for case in damage.cases(tiny_model(arch), most_tensors=40):
            path = case.write(tmp_path / "damaged.gguf")
            if case.kind == "weights":
                assert check_model(path, root=tmp_path).ok, case.name
            else:
                refused(path, root=tmp_path)


@LONG
def test_damaged_copies_of_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    cases = damage.cases(smollm2)
    truncated = [case for case in cases if case.kind == "truncated"]
    header = [case for case in cases if case.kind == "header"]
    chosen = [*truncated[::3], *header[::4]]
    assert len(chosen) >= 200
    for case in chosen:
        path = case.write(tmp_path / "damaged.gguf")
        assert refused(path, root=tmp_path), case.name
    for case in [case for case in cases if case.kind == "weights"][::4]:
        assert check_model(case.write(tmp_path / "damaged.gguf"), root=tmp_path).ok


def test_the_damage_is_the_same_every_time(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model()
    assert damage.cases(base) == damage.cases(base)
    layout = damage.layout_of(base)
    data = base.read_bytes()
    assert struct.unpack_from("<QQ", data, 8) == (len(layout.tensors), len(layout.entries))
    assert layout.entry("tokenizer.chat_template").key == "tokenizer.chat_template"
    case = damage.Case("none", "header", base)
    assert case.write(tmp_path / "copy.gguf").read_bytes() == data
    same = layout.entries[3]
    spliced = damage.Case("same", "header", base, splice=(same.start, same.end, data[same.start : same.end]))
    assert spliced.write(tmp_path / "copy.gguf").read_bytes() == data, "a splice of the same bytes changes nothing"
