"""How far two models are apart (divergence.pyx), and what a swap's report says of it (engine/weights/comparing.py)."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from weights_support import requests, run, say

from mullama._core import Context, Divergence, Model
from mullama._core.testing import gate
from mullama.engine.engine import Engine
from mullama.engine.weights import comparing
from mullama.errors import InvalidRequest
from mullama.types import MemoryLeft

TEXT = list(b"the sun and the others are all here and so am I, and then some more")


@pytest.fixture
def pair(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., tuple[Context, Context]]]:
    """Contexts of two models: ``pair(a, b, n_ctx=…)``, each named by what ``tiny_model`` takes."""
    made: list[Context | Model] = []

    def make(a: Path | Model, b: Path | Model, **sizes: int) -> tuple[Context, Context]:
        contexts = []
        for which in (a, b):
            model = which
            if not isinstance(model, Model):
                model = Model(model)
                made.append(model)
            contexts.append(Context(model, n_slots=1, **{"n_ctx": 256, "n_batch": 32} | sizes))
            made.append(contexts[-1])
        return contexts[0], contexts[1]

    yield make
    for one in sorted(made, key=lambda one: isinstance(one, Model)):
        one.close()


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "lfm2"])
def test_a_model_is_not_apart_from_itself(
    pair: Callable[..., tuple[Context, Context]], tiny_model: Callable[..., Path], arch: str
) -> None:
    apart = Divergence(*pair(tiny_model(arch), tiny_model(arch)))
    for carry in (False, True):
        found = apart.measure(TEXT, 12, carry=carry)
        assert found is not None
        values, n_same = found
        assert len(values) == n_same == 12
        assert max(values) < 1e-6


def test_the_divergence_is_that_of_the_distributions() -> None:
    rng = random.Random(3)
    for spread in (0.1, 3.0, 40.0):
        p, q = ([rng.gauss(0, spread) for _ in range(300)] for _ in range(2))
        p[7] = -math.inf  # a token that is never chosen counts for nothing
        expected = sum(
            math.exp(x) * (x - y) for x, y in zip(log_softmax(p), log_softmax(q), strict=True) if x > -math.inf
        )
        same = max(range(300), key=p.__getitem__) == max(range(300), key=q.__getitem__)
        assert gate.kl(p, q) == (pytest.approx(expected, rel=1e-5), same)
        assert gate.kl(p, p) == (pytest.approx(0, abs=1e-9), True)
    for bad in (math.nan, math.inf):
        assert gate.kl([1.0, bad], [1.0, 2.0]) is None
    assert gate.kl([1.0, 2.0], [-math.inf, -math.inf]) is None


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - total for x in row]


def test_the_tail_is_the_latest_tokens_however_the_rest_is_computed(
    pair: Callable[..., tuple[Context, Context]], tiny_model: Callable[..., Path], other: Path
) -> None:
    long = Divergence(*pair(tiny_model(), other)).measure(TEXT, 40)
    short = Divergence(*pair(tiny_model(), other, n_batch=64)).measure(TEXT, 7)
    assert long is not None and short is not None
    assert short[0] == pytest.approx(long[0][-7:], rel=1e-3, abs=1e-5)
    assert min(long[0]) > 0
    alike = [Divergence(*pair(tiny_model(), other)).measure(TEXT[:2], 1, carry=carry) for carry in (False, True)]
    assert alike[0] == alike[1]  # there is nothing to carry


def test_carried_kv_is_the_old_models(
    pair: Callable[..., tuple[Context, Context]], tiny_model: Callable[..., Path], other: Path
) -> None:
    """It changes what the new model says, and an order of two models matters."""
    ab, ba = Divergence(*pair(tiny_model(), other)), Divergence(*pair(other, tiny_model()))
    own, carried, back = ab.measure(TEXT, 8), ab.measure(TEXT, 8, carry=True), ba.measure(TEXT, 8)
    assert own is not None and carried is not None and back is not None
    assert own[0] != pytest.approx(carried[0], rel=1e-4)
    assert own[0] != pytest.approx(back[0], rel=1e-4)
    assert ab.measure(TEXT, 8) == own  # nothing is left behind


def test_what_cannot_be_compared(pair: Callable[..., tuple[Context, Context]], tiny_model: Callable[..., Path]) -> None:
    apart = Divergence(*pair(tiny_model(), tiny_model()))
    for tokens, n_tail in (
        ([], 1),
        ([5], 1),
        ([5] * 257, 4),
        ([5, 6], 2),
        ([5, 6], 0),
        ([5, -1, 6], 1),
        ([5, 1 << 20], 1),
    ):
        with pytest.raises(InvalidRequest):
            apart.measure(tokens, n_tail)
    asked: list[int] = []
    assert apart.measure(TEXT, 4, goes_on=lambda: bool(asked.append(1)) or len(asked) < 3) is None
    assert len(asked) == 3
    with pytest.raises(InvalidRequest, match="different vocabularies"):
        Divergence(*pair(tiny_model(), tiny_model("llama", turned=True)))
    contexts = pair(tiny_model(), tiny_model())
    contexts[1].close()
    with pytest.raises(RuntimeError, match="closed"):
        Divergence(*contexts)


@pytest.mark.parametrize(("kv", "is_carried"), [("carry", True), ("recompute", False)])
def test_a_swap_tells_it(make_engine: Callable[..., Engine], other: Path, kv: str, is_carried: bool) -> None:
    engine = make_engine()
    phases: list[str] = []
    reports = []
    run(
        engine,
        requests(),
        lambda: reports.append(engine.weights.swap(other, kv=kv, kl=True, on_phase=phases.append).to_dict()),
    )
    (report,) = reports
    detail = report["kl_detail"]
    assert report["kl"] == (detail["carried"] if is_carried else detail["recomputed"]) > 0
    assert (detail["carried"] is not None) is is_carried
    assert detail.items() >= {"of": "requests", "texts": 3}.items()
    assert 0 <= detail["same_top"] <= 1
    assert 3 * 10 < detail["tokens"] <= 3 * comparing.TAIL
    assert phases[-1] == "comparing"
    assert engine.weights.swap(engine.info.path, kv=kv).to_dict()["kl"] is None


def test_twins_are_not_apart_also_where_nothing_ran(make_engine: Callable[..., Engine], twin: Path) -> None:
    report = make_engine().weights.swap(twin, kl=True).to_dict()
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    assert report["kl_detail"].items() >= {"of": "sample", "texts": 1, "same_top": 1.0}.items()
    engine = make_engine()
    say(engine, TEXT, 5)  # cached now
    report = engine.weights.swap(twin, kl=True).to_dict()
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    assert report["kl_detail"]["of"] == "requests"


def test_a_closed_engine_ends_a_comparison(
    make_engine: Callable[..., Engine], other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are freed when it has ended, not before."""
    comparing_now, go_on = threading.Event(), threading.Event()

    def hold(tokens: list[int]) -> list[int]:
        comparing_now.set()
        assert go_on.wait(30)
        return TEXT

    engine = make_engine()
    monkeypatch.setattr(comparing, "window", hold)
    reports = []
    thread = threading.Thread(target=lambda: reports.append(engine.weights.swap(other, kl=True)))
    thread.start()
    assert comparing_now.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    go_on.set()
    thread.join()
    closing.join()
    assert reports[0].to_dict()["kl"] is None
    assert reports[0].weights_to == other.stem


def test_two_engines_are_compared(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], other: Path
) -> None:
    one, two, foreign = make_engine(), make_engine(other), make_engine(tiny_model("llama", turned=True))
    say(one, TEXT, 5)
    found = one.weights.compare(two.weights, one.weights.texts_for(two.weights))
    assert found["kl"] > 0
    assert found["kl_detail"].items() >= {"carried": None, "of": "requests", "texts": 1}.items()
    with pytest.raises(InvalidRequest, match="the vocabulary of"):
        one.weights.texts_for(foreign.weights)
    two.close()
    assert one.weights.compare(two.weights, [TEXT]) == {"kl": None, "kl_detail": None}


def test_what_is_refused_leaves_the_old_weights(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], other: Path
) -> None:
    engine = make_engine()
    before = engine.info.weights
    with pytest.raises(InvalidRequest, match="the vocabulary of") as caught:
        engine.weights.swap(tiny_model("llama", turned=True), kl=True)
    assert caught.value.param == "kl"
    with pytest.raises(InvalidRequest, match="does not hold both") as caught:
        engine.weights.swap(other, memory_left=MemoryLeft(beside=0, alone=1 << 40), kl=True)
    assert caught.value.param == "kl"
    assert engine.info.weights == before
    assert say(engine, TEXT)
