"""Ways of computing on this machine: each is right, the choice decides which one computes, a wrong one is not used."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import shaped
from core_support import Driver, greedy

from mullama import faults
from mullama._core import Model
from mullama._core.kernels import products as kernels
from mullama._core.kernels.quantization import quantize
from mullama.engine.engine import Engine
from mullama.errors import ModelLoadError
from mullama.installation.instructions import library_folder
from mullama.machine import kernels as charge
from mullama.machine import trial_child, trials, ways
from mullama.machine.remembered import Remembered
from mullama.machine.trials import LAYOUTS, ROUGH, TOLERANCE, WAYS, Found, Task
from mullama.machine.way_choice import choose
from mullama.models.files import gguf
from mullama.models.files.gguf import TENSOR_TYPES
from mullama.models.files.matrices import NEVER_WEIGHTS, matrices
from mullama.types import Request

Q4_0, Q8_0, Q4_K = 2, 8, 12
KINDS = [kind for kind, (name, _, _) in TENSOR_TYPES.items() if name not in NEVER_WEIGHTS]
#: What a first look is worth: a type of each family. The rest with MULLAMA_LONG=1.
FEW = [0, 1, 2, 3, 8, 10, 12, 14, 20, 21, 23, 30, 39]
TRIED = KINDS if os.environ.get("MULLAMA_LONG") else FEW
EXACT = {"plain", "tiles"}


def task(kind: int, shapes: tuple[tuple[int, int], ...] = ()) -> Task:
    name, block, block_bytes = TENSOR_TYPES[kind]
    return Task(kind, name, tuple(reversed(WAYS)), block, block_bytes, shapes)


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, str], Found]:
    """What a real child finds of every way and type, with dirty memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_PERTURB_", "165")
        patch.delenv(faults.TRIAL_VARIABLE, raising=False)
        verdicts, _ = trials.run([task(kind) for kind in TRIED], 2)
    return {(each.type, each.way): each for each in verdicts}


@pytest.fixture
def free() -> Iterator[None]:
    """The tables that a test fills hold for the process: they are emptied behind it."""
    yield
    for kind in KINDS:
        for log2 in range(kernels.N_CLASSES):
            kernels.set_kernel(kind, log2, "auto")
        for layout in kernels.layouts():
            kernels.allow_layout(kind, layout, True)
    kernels.set_attention(True)


def has(found: dict[tuple[int, str], Found], kind: int, *names: str) -> list[str]:
    return [way for way in names if found[kind, way].may_be_used]


# -- proofs


def test_the_types_of_files_are_llama_cpp_s() -> None:
    (library,) = library_folder().glob("*ggml-base*")
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    header = Path(__file__).parents[2] / "vendor" / "llama.cpp" / "ggml" / "include" / "ggml.h"
    (count,) = re.findall(r"GGML_TYPE_COUNT\s*=\s*(\d+)", header.read_text(encoding="utf-8"))
    kinds = [kind for kind in range(int(count)) if ggml.ggml_blck_size(kind) > 0]
    found = {kind: ggml.ggml_type_name(kind).decode().upper() for kind in kinds}
    assert {kind: name for kind, (name, _, _) in TENSOR_TYPES.items()} == found


@pytest.mark.parametrize("kind", TRIED, ids=lambda kind: TENSOR_TYPES[kind][0])
def test_every_way_is_right(found: dict[tuple[int, str], Found], kind: int) -> None:
    """On this machine, with memory that nobody wrote full of what is no number, and with one thread and several."""
    of = [found[kind, way] for way in WAYS]
    assert [each.fault for each in of if each.fault] == []
    assert found[kind, "plain"].is_there
    for each in of:
        if each.is_there:
            # AMX keeps columns of F16 that the plain products round.
            limit = ROUGH.get(kind, TOLERANCE / 50) if each.way == "amx" else TOLERANCE / 50
            assert each.error <= limit and (each.is_exact or each.way not in EXACT)
            assert each.is_steady or each.way not in EXACT
            assert not each.is_exact or each.error == 0.0


def test_the_build_is_told_by_its_libraries(tmp_path: Path) -> None:
    import hashlib

    from mullama.machine.remembered import _build

    assert _build() != hashlib.sha256().hexdigest(), "no library that computes was found"


@pytest.mark.parametrize("kind", TRIED, ids=lambda kind: TENSOR_TYPES[kind][0])
def test_repacked_weights_take_columns_that_lie_apart(found: dict[tuple[int, str], Found], kind: int) -> None:
    """Four columns were read as one piece, whatever lay between them (vendor/patches/0016)."""
    layouts = [LAYOUTS[way] for way in has(found, kind, *LAYOUTS)]
    if not layouts:
        pytest.skip("no layout of its own for this type here")
    plain = kernels.Products(kind, 512, 64)
    for layout in layouts:
        tried = kernels.Products(kind, 512, 64, layout)
        counted = [m for m in (1, 3, 4, 5, 8, 9, 16) if tried.can(m, "strided")]
        assert counted
        for m in counted:
            for threads in (1, 2):
                is_finite, _, error = tried.check(plain, m, "strided", threads)
                assert is_finite and error <= ROUGH.get(kind, TOLERANCE), (layout, m, threads)


# -- the table


def computed(products: kernels.Products, m: int) -> set[str]:
    """Which ways one product with so many columns went."""
    before = kernels.counts()
    products.time(m, 1, 1, 1)
    return {way for way, count in kernels.counts().items() if count > before[way]}


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q4_K], ids=lambda kind: TENSOR_TYPES[kind][0])
def test_what_is_chosen_computes(found: dict[tuple[int, str], Found], kind: int) -> None:
    products = kernels.Products(kind, 512, 128)
    taken = set()
    for way in has(found, kind, "plain", "sgemm", "tiles", "tiled"):
        for log2 in range(kernels.N_CLASSES):
            kernels.set_kernel(kind, log2, way)
        went = [computed(products, m) for m in (1, 8, 33, 128)]
        assert all(each <= {way, "plain"} for each in went), "what a way cannot compute goes the plain way"
        assert {way} in went
        taken.add(way)
    assert taken >= {"plain"}


@pytest.mark.usefixtures("free")
def test_a_choice_for_one_number_of_columns_leaves_the_others_alone(found: dict[tuple[int, str], Found]) -> None:
    others = has(found, Q8_0, "tiles", "sgemm")
    if not others:
        pytest.skip("there is one way only here")
    products, plain_of = kernels.Products(Q8_0, 512, 128), kernels.Products(Q4_0, 512, 128)
    untouched = computed(plain_of, 8)
    for log2 in range(kernels.N_CLASSES):
        kernels.set_kernel(Q8_0, log2, others[0])
    before = {m: computed(products, m) for m in (7, 8, 15, 16)}
    assert all(each == {others[0]} for each in before.values())
    kernels.set_kernel(Q8_0, 3, "plain")
    assert {m: computed(products, m) for m in (7, 8, 15, 16)} == {**before, 8: {"plain"}, 15: {"plain"}}
    assert computed(plain_of, 8) == untouched, "and other types"
    kernels.set_kernel(Q8_0, 3, others[0])
    assert computed(products, 8) == {others[0]}


@pytest.mark.usefixtures("free")
def test_what_nobody_knows_changes_nothing() -> None:
    products = kernels.Products(Q8_0, 64, 64)
    before = [computed(products, m) for m in (1, 8)]
    for name in ("amx", "repack", "none such", ""):
        with pytest.raises(ValueError):
            kernels.set_kernel(Q8_0, 0, name)
    for kind, log2 in ((9999, 0), (-1, 0), (Q8_0, -1), (Q8_0, kernels.N_CLASSES), (Q8_0, 1 << 30)):
        kernels.set_kernel(kind, log2, "plain")
    assert [computed(products, m) for m in (1, 8)] == before
    assert not kernels.allow_layout(Q8_0, "none such", False) and not kernels.allow_layout(9999, "AMX", False)
    assert not kernels.allow_layout(-1, "AMX", False) and kernels.allow_layout(Q8_0, "AMX", True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((Q8_0, 33, 4), "rows of this length"),
        ((Q8_0, 0, 4), "rows of this length"),
        ((Q8_0, 64, 0), "rows of this length"),
        ((Q4_K, 64, 64), "rows of this length"),
        ((9999, 64, 64), "rows of this length"),
        ((-1, 64, 64), "rows of this length"),
        ((4, 64, 64), "rows of this length"),
        ((9, 64, 64), "of this type"),
        ((15, 256, 64), "of this type"),
        ((26, 64, 64), "of this type"),
        ((Q8_0, 64, 64, "none such"), "no layout named none such"),
        ((Q8_0, 64, 64, "", 0), "of this type"),
        ((Q8_0, 64, 64, "", -1), "of this type"),
    ],
    ids=str,
)
def test_products_that_cannot_be_are_refused(arguments: tuple[object, ...], reason: str) -> None:
    """And do not end the process."""
    with pytest.raises(ValueError, match=reason):
        kernels.Products(*arguments)


def test_columns_that_cannot_be_are_refused() -> None:
    products = kernels.Products(Q8_0, 64, 64)
    for m in (0, -1):
        with pytest.raises(ValueError, match="a column"):
            products.can(m)
        with pytest.raises(ValueError, match="a column"):
            products.time(m, 1, 1, 1)
    with pytest.raises(ValueError, match="a matrix"):
        products.time(1, 1, 0, 1)
    with pytest.raises(ValueError, match="different shapes"):
        products.check(kernels.Products(Q8_0, 64, 32), 2)
    with pytest.raises(KeyError):
        products.can(1, "upside down")


# -- layouts of loaded models


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``wide("Q4_0")``: a small random model whose rows are wide enough for every type."""
    folder = tmp_path_factory.mktemp("wide")
    source = shaped.build(folder / "source.gguf", shaped.Shape(kind="Q8_0"), random=True)

    def get(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        if not path.exists():
            quantize(source, path, kind)
        return path

    return get


@pytest.mark.usefixtures("free")
def test_weights_lie_where_they_may(wide: Callable[[str], Path], found: dict[tuple[int, str], Found]) -> None:
    path = wide("Q4_0")
    sizes: dict[str, int] = {}
    for tensor in gguf.check(path).tensors:
        sizes[tensor.type] = sizes.get(tensor.type, 0) + (tensor.size or 0)
    seen = {}
    for may in (True, False):
        for layout in kernels.layouts():
            kernels.allow_layout(Q4_0, layout, may)
        model = Model(path, mmap=False)
        seen[may] = kernels.weights_by_layout(model)
        model.close()
        by: dict[str, int] = {}
        for (name, _), size in seen[may].items():
            by[name] = by.get(name, 0) + size
        assert by == sizes
    own = set(kernels.layouts())
    assert not any(name == "Q4_0" and buffer in own for name, buffer in seen[False])  # AMX takes the output's type too
    if has(found, Q4_0, *LAYOUTS):
        assert any(name == "Q4_0" and buffer in own for name, buffer in seen[True])


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M"])
def test_reference_computations_are_equal_to_the_bit_alone_and_together(
    wide: Callable[[str], Path], make_core: Callable[..., Driver], kind: str
) -> None:
    """``--deterministic``: weights that were repacked were computed in another order of sums beside others."""
    model = Model(wide(kind), repack=False)
    try:
        assert not any(buffer in kernels.layouts() for _, buffer in kernels.weights_by_layout(model))
        prompts = [list(range(40 + 7 * i, 60 + 7 * i + i)) for i in range(4)]
        alone = []
        for prompt in prompts:
            driver = make_core(model, reference=True)
            alone.append(driver.generate(prompt, greedy(24)).tokens)
            driver.close()
        for threads, chunk in ((1, 64), (2, 9)):
            driver = make_core(model, reference=True, n_threads=threads)
            handles = [driver.open(prompt, greedy(24), slot=i) for i, prompt in enumerate(prompts)]
            driver.finish_all(chunk=chunk)
            assert [driver.outputs[handle].tokens for handle in handles] == alone
            driver.close()
        assert len({tuple(tokens) for tokens in alone}) > 1, "a model that answers all alike shows nothing"
    finally:
        model.close()


# -- faults


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: None) -> Path:
    """A process that computes nothing yet, on a machine that has tried nothing. Returns the home."""
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(charge, "_in_charge", {})
    monkeypatch.setattr(charge, "_named", "auto")
    return tmp_path / "home"


def answer(engine: Engine) -> str:
    generation = engine.submit_sync(Request("a", list(range(40, 64)), greedy(16)))
    text = "".join(delta.text for delta in generation)
    assert generation.finish is not None and generation.finish.profile.completion_tokens == 16
    return text


#: A hang costs the patience with it, so that one is enough at first; the rest with MULLAMA_LONG=1.
FAULTS = [
    pytest.param(way, fault, id=f"{way}-{fault}")
    for way in WAYS
    for fault in ("crash", "differ", "hang")
    if fault != "hang" or way == "sgemm" or os.environ.get("MULLAMA_LONG")
]
PATIENCE_S = 6.0


@pytest.mark.parametrize(("way", "fault"), FAULTS)
def test_a_way_that_fails_is_not_used_and_the_rest_answers_as_before(
    wide: Callable[[str], Path], make_engine: Callable[..., Engine], unknown: Path, monkeypatch: pytest.MonkeyPatch,
    found: dict[tuple[int, str], Found], way: str, fault: str,
) -> None:  # fmt: skip
    kind = {"tiled": "Q4_K_M", "amx": "Q4_0", "repack": "Q4_0"}.get(way, "Q8_0")
    if not has(found, {"Q4_K_M": Q4_K, "Q4_0": Q4_0, "Q8_0": Q8_0}[kind], way):
        pytest.skip("this machine does not have it")
    monkeypatch.setenv(faults.TRIAL_VARIABLE, f"{way}={fault}")
    if fault == "hang":
        run = trials.run
        monkeypatch.setattr(trials, "run", lambda *args, **more: run(*args, **more, patience_s=PATIENCE_S))
    before = kernels.counts()
    engine = make_engine(wide(kind))
    text = answer(engine)
    went = {name for name, count in kernels.counts().items() if count > before[name]}
    # Attention multiplies as well, by types of its own, which nobody chose for.
    assert way == "plain" or way not in went
    report = {of["type"]: of for of in ways.ways_report()}
    reasons = {"crash": "SIGILL", "differ": "wrong results", "hang": "hung"}
    verdicts = [each["verdict"] for of in report.values() for each in of["ways"] if each["way"] == way]
    assert verdicts and all(reasons[fault] in verdict for verdict in verdicts)
    if way != "plain":
        assert all(way not in of["chosen"].values() for of in report.values())
    with pytest.raises(ModelLoadError, match=rf"kernels {way} cannot be used .*{reasons[fault]}"):
        charge.prepare(matrices(gguf.check(wide(kind))), named=way)
    engine.close()
    if way in EXACT - {"plain"}:
        monkeypatch.delenv(faults.TRIAL_VARIABLE)
        monkeypatch.setattr(charge, "_in_charge", {})
        whole = make_engine(wide(kind))
        assert way in {each["way"] for of in ways.ways_report() for each in of["ways"]}
        assert answer(whole) == text


@pytest.mark.parametrize("fault", ["crash", "differ"])
def test_attention_that_fails_is_not_used(
    make_engine: Callable[..., Engine], unknown: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv(faults.TRIAL_VARIABLE, f"attention={fault}")
    assert answer(make_engine())
    assert not kernels.has_attention()
    (of,) = [of for of in ways.ways_report() if of["type"] == "attention"]
    assert of["chosen"] == {"1": "plain"}
    verdicts = {each["way"]: each["verdict"] for each in of["ways"]}
    assert verdicts["plain"] == "right" and verdicts["attention"] != "right"


@pytest.mark.parametrize("named", WAYS)
def test_a_named_way_computes(
    wide: Callable[[str], Path], make_engine: Callable[..., Engine], unknown: Path,
    found: dict[tuple[int, str], Found], named: str,
) -> None:  # fmt: skip
    kind = {"tiled": "Q4_K_M", "repack": "Q4_0", "amx": "Q4_0"}.get(named, "Q8_0")
    is_there = bool(has(found, {"Q4_K_M": Q4_K, "Q4_0": Q4_0, "Q8_0": Q8_0}[kind], named))
    engine = make_engine(wide(kind), kernels=named)
    before = kernels.counts()
    assert answer(engine)
    went = {name for name, count in kernels.counts().items() if count > before[name]}
    assert went <= {named, "plain"} and (named in went) == is_there
    told = {way for of in engine.info.kernels.values() for way in of["columns"].values()}
    assert told <= {named, "plain"} and (named in told) == is_there


def test_a_slow_way_is_not_chosen(monkeypatch: pytest.MonkeyPatch, free: None) -> None:
    """Ten times as slow as it is, none is the fastest. What times are is not asked: the machine may be busy."""
    of = task(Q8_0, ((512, 256),))
    verdicts = {each.way: each for each in trials.run([task(Q8_0)], 1)[0] if each.may_be_used}
    in_file = [way for way in verdicts if way not in LAYOUTS]
    if len(in_file) < 2:
        pytest.skip("there is one way only here")
    for way in in_file:
        if way == "plain":
            continue
        monkeypatch.setenv(faults.TRIAL_VARIABLE, f"{way}=slow")
        times, _ = trial_child._times(Task(**{**_fields(of), "ways": tuple(verdicts), "is_timing": True}))
        timed = [
            Found(Q8_0, name, is_exact=True, is_steady=True, times={"512x256": by}) for name, by in times.items() if by
        ]
        assert way in {each.way for each in timed}
        chosen = choose(timed, "512x256")
        assert way != chosen.by_columns[0] and not Remembered(Path("/nowhere")).read()


def _fields(of: Task) -> dict[str, object]:
    return {name: getattr(of, name) for name in Task.__dataclass_fields__}
