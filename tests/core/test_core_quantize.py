"""Quantising through llama.cpp in a child: what comes of it, and that nothing stays when it fails or is stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shaped
import tiny

from mullama._core import Model
from mullama.errors import InvalidRequest, LoadCancelled, ModelLoadError, StoreError
from mullama.models.child.probe import check_model
from mullama.models.files import gguf
from mullama.models.quantizing import find_variant, quantize_variant, source_of
from mullama.models.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in F16 whose rows are wide enough for the types of 256 values."""
    path = tmp_path_factory.mktemp("shaped") / "Plain-F16.gguf"
    return shaped.build(path, shaped.Shape(kind="F16"), random=True)


def left_over(store: Store) -> list[str]:
    return [
        path.name for folder in (store.tmp, store.blobs, store.refs) if folder.exists() for path in folder.iterdir()
    ]


def test_the_result_is_a_variant(store: Store, plain: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    made = quantize_variant(store, plain, "q8_0", lambda what, done, total: seen.append((what, done, total)))
    assert made.key == "plain-q8_0" and made.quant == "Q8_0" and made.filename == "Plain-Q8_0.gguf"
    source = source_of(store, plain)
    assert made.variant_of == source.key and find_variant(store, source, "Q8_0") == made
    header, base = gguf.check(store.path_of(made)), gguf.check(plain)
    assert header.get("general.file_type") == 7
    assert {tensor.type for tensor in header.tensors} == {"Q8_0", "F32"}
    kept = {key: value for key, value in header.metadata.items() if key in base.metadata}
    assert kept.keys() == base.metadata.keys() - {"general.file_type"} or kept.keys() == base.metadata.keys()
    for key in base.metadata.keys() - {"general.file_type", "general.quantization_version"}:
        assert header.metadata[key] == base.metadata[key]
    done = [done for what, done, _ in seen if what == "quantising"]
    total = {total for what, _, total in seen if what == "quantising"}
    assert len(done) == len(base.tensors) and done == sorted(done)
    assert total == {sum(tensor.size or 0 for tensor in base.tensors)}
    assert check_model(store.path_of(made), root=store.root).ok
    Model(store.path_of(made)).close()


def test_a_second_time_it_is_there(store: Store, plain: Path) -> None:
    made = quantize_variant(store, plain, "Q4_0")
    seen: list[str] = []
    assert quantize_variant(store, plain, "q4_0", lambda what, done, total: seen.append(what)) == made
    assert seen == []


def test_a_changed_file_is_another_model(store: Store, plain: Path, tmp_path: Path) -> None:
    copy = tmp_path / "Plain-F16.gguf"
    copy.write_bytes(plain.read_bytes())
    made = quantize_variant(store, copy, "Q8_0")
    data = bytearray(copy.read_bytes())
    data[-100] ^= 1
    copy.write_bytes(data)
    with pytest.raises(StoreError, match="another model"):
        quantize_variant(store, copy, "Q8_0")
    again = quantize_variant(store, copy, "Q8_0", key="other")
    assert again.key == "other" and again.variant_of != made.variant_of


def test_a_variant_of_a_variant_belongs_to_the_base(store: Store, plain: Path) -> None:
    first = quantize_variant(store, plain, "Q8_0")
    second = quantize_variant(store, first, "Q4_0")
    assert second.variant_of == first.variant_of and second.key == "plain-q4_0"


def test_what_came_beside_the_weights_comes_along(store: Store, plain: Path) -> None:
    first = quantize_variant(store, plain, "Q8_0")
    beside = {
        "defaults": {"temperature": 0.2, "stop": ["END"]},
        "template": "{{ .Prompt }}",
        "system": "Be brief.",
        "license": "Some licence",
        "license_text": "Do as you like.",
    }
    with store.store_lock():
        source = store.write_entry(dataclasses.replace(first, key="base", quant="F16", variant_of=None, **beside))  # type: ignore[arg-type]
    made = quantize_variant(store, source, "Q4_0")
    assert made.variant_of == "base" and made.quant == "Q4_0"
    assert {name: getattr(made, name) for name in beside} == beside
    again = quantize_variant(store, made, "Q5_0")
    assert {name: getattr(again, name) for name in beside} == beside


def test_requantising_is_said_once(
    store: Store, tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[str] = []
    quantize_variant(store, tiny_model(), "Q4_0", lambda what, done, total: steps.append(what))
    assert [record.getMessage().count("Q8_0 already") for record in caplog.records] == [1]
    said = "making Q4_0 out of Q8_0, which loses more than out of F16"
    assert steps.count(said) == 1 and steps.index(said) < steps.index("quantising"), "before it is made"


def test_from_plain_nothing_is_said(store: Store, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps: list[str] = []
    quantize_variant(store, plain, "Q8_0", lambda what, done, total: steps.append(what))
    assert caplog.records == []
    assert "making Q8_0" in steps
    again: list[str] = []
    quantize_variant(store, plain, "Q8_0", lambda what, done, total: again.append(what))
    assert "making Q8_0" not in again, "it is there"


def test_an_unknown_type(store: Store, plain: Path) -> None:
    with pytest.raises(InvalidRequest, match="'Q9_9' is not a quantisation type; there are F32"):
        quantize_variant(store, plain, "Q9_9")
    assert left_over(store) == []


def test_a_damaged_source(store: Store, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(plain.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwert"))
    with pytest.raises(ModelLoadError) as caught:
        quantize_variant(store, path, "Q4_K_M")
    assert caught.value.message.startswith(str(path)) and "qwert" in caught.value.message
    assert left_over(store) == []


def test_a_source_that_crashes_llama_cpp(store: Store, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    import damage

    case = next(case for case in damage.crashers(tiny_model(), "llama") if "expert_count" in case.name)
    path = case.write(tmp_path / "crashes.gguf")
    with pytest.raises(ModelLoadError, match="crashed"):
        quantize_variant(store, path, "Q4_0")
    assert left_over(store) == []


def test_cancelling_leaves_nothing(store: Store, plain: Path) -> None:
    started = threading.Event()

    def progress(what: str, done: int, total: int | None) -> None:
        started.set()

    with pytest.raises(LoadCancelled):
        quantize_variant(store, plain, "Q4_K_M", progress, started.is_set)
    assert left_over(store) == []
    assert quantize_variant(store, plain, "Q4_K_M").quant == "Q4_K_M"


def test_ctrl_c_leaves_nothing(store: Store, plain: Path) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_variant(store, plain, "Q8_0", progress)
    assert left_over(store) == []


def test_ctrl_c_at_the_command(store: Store, tmp_path: Path) -> None:
    """And ``kill -9``: the child ends with the command, and the next one clears what it left."""
    big = shaped.build(tmp_path / "big.gguf", shaped.Shape(n_layer=8, n_embd=1024, n_ff=4096, kind="F16"))
    env = {**os.environ, "MULLAMA_HOME": str(store.root)}
    command = [sys.executable, "-m", "mullama", "quantize", str(big), "Q4_K_M", "--threads", "1"]
    for signal_, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        # A shell that runs this in the background has SIGINT ignored, which a child inherits.
        process = subprocess.Popen(
            command, env=env, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        assert process.stderr is not None
        assert any("quantising" in line for line in iter(process.stderr.readline, ""))
        process.send_signal(signal_)
        process.stderr.read()
        assert process.wait(timeout=60) == status
        process.stderr.close()
        if signal_ == signal.SIGINT:
            assert left_over(store) == []
    deadline = time.monotonic() + 20
    while not _no_child_of(store) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _no_child_of(store)
    assert left_over(store) != []
    quantize_variant(store, shaped.build(tmp_path / "small.gguf", shaped.Shape(kind="F16")), "Q8_0")
    assert [path for path in store.tmp.iterdir() if path.name.startswith("work-")] == []


def _no_child_of(store: Store) -> bool:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if str(store.root).encode() in (folder / "cmdline").read_bytes():
                    return False
    return True


def test_a_full_disk_is_refused_beforehand(store: Store, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(StoreError, match="free"):
        quantize_variant(store, plain, "Q8_0")
    assert left_over(store) == []


def _make(root: Path, path: Path, results: multiprocessing.queues.Queue[tuple[str, float]]) -> None:
    seen: list[str] = []
    made = quantize_variant(Store(root), path, "Q4_K_M", lambda what, done, total: seen.append(what))
    results.put((made.pulled_at, "quantising" in seen))


def test_two_processes_do_the_work_once(store: Store, plain: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_make, args=(store.root, plain, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert len({when for when, _ in found}) == 1
    assert sum(worked for _, worked in found) == 1


# -- importance matrices


def write_imatrix(path: Path, entries: dict[str, np.ndarray], counts: float = 4.0) -> Path:
    w = tiny._writer.GGUFWriter(str(path), "")
    w.add_type("imatrix")
    for name, values in entries.items():
        w.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(values * counts, dtype=np.float32).reshape(1, -1))
        w.add_tensor(f"{name}.counts", np.full((1, 1), counts, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def write_dat(path: Path, entries: dict[str, np.ndarray]) -> Path:
    out = struct.pack("<i", len(entries))
    for name, values in entries.items():
        encoded = name.encode()
        out += struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", 2, len(values))
        out += (values * 2).astype("<f4").tobytes()
    path.write_bytes(out)
    return path


def importances(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        tensor.name: rng.uniform(0.01, 2.0, tensor.shape[0])
        for tensor in gguf.check(path).tensors
        if len(tensor.shape) == 2 and tensor.name != "token_embd.weight"
    }


def test_an_importance_matrix_changes_the_result(store: Store, plain: Path, tmp_path: Path) -> None:
    without = quantize_variant(store, plain, "Q4_K_M", key="without")
    entries = importances(plain)
    with_gguf = quantize_variant(
        store, plain, "Q4_K_M", key="with", imatrix=write_imatrix(tmp_path / "i.gguf", entries)
    )  # fmt: skip
    with_dat = quantize_variant(store, plain, "Q4_K_M", key="dat", imatrix=write_dat(tmp_path / "i.dat", entries))
    assert with_gguf.sha256 != without.sha256
    assert with_dat.sha256 == with_gguf.sha256, "the two forms say the same"


def test_a_type_that_needs_a_matrix(store: Store, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="IQ2_XS needs an importance matrix"):
        quantize_variant(store, plain, "IQ2_XS")
    made = quantize_variant(store, plain, "IQ2_XS", imatrix=write_dat(tmp_path / "i.dat", importances(plain)))
    assert "IQ2_XS" in {tensor.type for tensor in gguf.check(store.path_of(made)).tensors}


def test_a_wrong_matrix(store: Store, plain: Path, tmp_path: Path) -> None:
    other = {"model.layers.0": np.ones(8)}
    narrow = {name: values[:32] for name, values in importances(plain).items()}
    nan = {name: values * np.nan for name, values in importances(plain).items()}
    cases = {
        write_dat(tmp_path / "other.dat", other): "belongs to another model: no tensor",
        write_imatrix(tmp_path / "narrow.gguf", narrow): "has 32 columns in it and 256 in the model",
        write_dat(tmp_path / "nan.dat", nan): "is not finite",
        tmp_path / "missing.dat": "there is no such importance matrix",
        plain: "not an importance matrix",
    }
    for path, reason in cases.items():
        with pytest.raises(ModelLoadError, match=reason) as caught:
            quantize_variant(store, plain, "Q4_K_M", imatrix=path)
        assert caught.value.message.startswith(str(path))
    assert left_over(store) == []


def test_the_child_ends_with_its_parent(tmp_path: Path, plain: Path) -> None:
    """A server that is killed leaves no process that quantises on."""
    code = (
        "import sys, time\n"
        "from mullama import child\n"
        "process = child.start('mullama.models.child.probe_child', [sys.argv[1], str(8 << 30), '60', '5'])\n"
        "import os, signal\n"
        "process.stdout.readline()\n"
        "process.send_signal(signal.SIGSTOP)\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(plain)], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
