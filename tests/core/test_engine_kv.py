"""The KV cache through an Engine: answers do not change by what is cached, figures add up, prefixes are found."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kv_engine_support import (
    EXACT,
    KINDS,
    LONG,
    Answer,
    Faulty,
    Task,
    ask,
    events,
    exact,
    exported,
    fix_costs,
    history,
    holders,
    near,
    one,
    request,
    same,
    tokens,
    totals_agree,
    workload,
)
from tiny import WINDOW

from mullama import abi
from mullama.config import ServeConfig
from mullama.engine.engine import Engine
from mullama.kv.events import KvEventKind, KvTier
from mullama.kv.tiers.host_tier import MIN_STORED

Make = Callable[..., Engine]
Tiny = Callable[..., Path]
Work = list[Task]


@pytest.fixture(scope="session")
def cold(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Work]:
    """``cold(arch)``: a workload, and what is answered when nothing is cached."""
    found: dict[str, Work] = {}
    pages = str(tmp_path_factory.mktemp("pages"))

    def get(arch: str) -> Work:
        if arch not in found:
            config = ServeConfig(ctx_size=512, parallel=1, threads=1, batch_size=64, page_dir=pages, **EXACT)
            with Engine.load(tiny_model(arch), config=config) as engine:
                found[arch] = workload(engine, 500 if LONG else 64)
        return found[arch]

    return get


def check(engine: Engine, work: Work, together: int, right: Callable[[Task, Answer], bool]) -> list[Answer]:
    """Run a workload: every answer is right, and so are the books after each batch."""
    answers: list[Answer] = []
    for at in range(0, len(work), together):
        batch = work[at : at + together]
        found = ask(engine, *(request(f"r{at + i}", task.prompt) for i, task in enumerate(batch)))
        for task, answer in zip(batch, found, strict=True):
            assert right(task, answer), (task.prompt, answer.profile)
        assert engine.kv.audit() == []
        answers += found
    totals_agree(engine, answers)
    return answers


def equal(task: Task, answer: Answer) -> bool:
    return task.text == answer.text


# -- the same answers, whatever is cached --------------------------------------------------------------------------


@pytest.mark.parametrize(("parallel", "host"), [(2, 0), (3, 60_000), (4, 1 << 30)])
@pytest.mark.parametrize("arch", KINDS)
def test_answers_are_those_of_a_cold_engine(
    make_engine: Make, tiny_model: Tiny, cold: Callable[[str], Work], arch: str, parallel: int, host: int
) -> None:
    for together in (1, 4):
        engine = make_engine(tiny_model(arch), parallel=parallel, kv_host_bytes=host, **EXACT)
        answers = check(engine, cold(arch), together, equal)
        evicted = engine.kv.snapshot()["totals"]["kv_cache_evict"]
        hits = sum(answer.profile.kv_cache_hit > 0 for answer in answers)
        if host < 1 << 30:
            assert evicted > 0
        else:
            assert evicted < len(answers) * MIN_STORED, "only what is too short for host memory"
            assert hits > len(answers) / (3 if arch in ("llama", "gemma3") else 10)


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_tokens": 512, "kv_host_bytes": 0}, {"kv_tokens": 512, "kv_host_bytes": 60_000}],
    ids=["roomy", "small", "small-and-host"],
)
@pytest.mark.parametrize("arch", KINDS)
def test_answers_in_the_unified_layout(
    make_engine: Make, tiny_model: Tiny, cold: Callable[[str], Work], arch: str, options: dict[str, Any]
) -> None:
    """In one buffer a sequence's cells lie in any order, and sums are rounded in that order: the KV is compared."""
    engine = make_engine(tiny_model(arch), parallel=4, **exact("unified"), **options)

    def right(task: Task, answer: Answer) -> bool:
        return near(exported(engine, task.prompt), task.kv) if task.kv else equal(task, answer)

    check(engine, cold(arch), 1, right)
    first = engine.counters()
    ask(engine, *(request(f"again-{i}", task.prompt) for i, task in enumerate(cold(arch)[:20])))
    assert engine.counters()["failed"] == first["failed"] == 0
    assert engine.kv.audit() == []


@pytest.mark.parametrize(
    "options", [{"flash_attn": "off"}, {"kv_type_k": "bf16", "kv_type_v": "bf16"}], ids=["no-flash", "bf16"]
)
def test_answers_with_other_cells(make_engine: Make, options: dict[str, Any]) -> None:
    work = workload(make_engine(parallel=1, **EXACT, **options), 24)
    for together in (1, 4):
        check(make_engine(parallel=3, kv_host_bytes=60_000, **EXACT, **options), work, together, equal)


# -- the same KV ---------------------------------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {},
    {"kv_layout": "unified"},
    {"flash_attn": "off"},
    {"kv_type_k": "bf16", "kv_type_v": "bf16"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(options.values()) or "default")
def test_reused_kv_is_its_source_bit_by_bit(make_engine: Make, options: dict[str, Any]) -> None:
    """Copied, restored, and put together of both; by the fast kernels."""
    engine = make_engine(parallel=2, kv_host_bytes=1 << 26, **options)
    source = tokens(1, 200)
    one(engine, source)
    truth, half = exported(engine, source), exported(engine, source[:100])
    shorter = [*source[:100], *tokens(2, 5)]
    assert one(engine, shorter).profile.kv_cache_hit == 100
    assert same(exported(engine, shorter[:100]), half)
    for seed in (3, 4):  # both slots are needed for others
        one(engine, tokens(seed, 100))
    restored = one(engine, [*source, *tokens(5, 5)]).profile
    assert (restored.kv_cache_source, restored.kv_cache_hit) == ("host", 200)
    assert same(exported(engine, source), truth)


def test_a_slot_and_host_memory_together(make_engine: Make) -> None:
    engine = make_engine(parallel=1, kv_host_bytes=1 << 26)
    fix_costs(engine, restore_byte=1.0)
    source = tokens(1, 200)
    one(engine, source)
    truth = exported(engine, source)
    assert one(engine, [*source[:90], *tokens(2, 5)]).profile.kv_cache_source == "in_place"
    both = one(engine, [*source, 66]).profile
    assert (both.kv_cache_source, both.kv_cache_hit) == ("in_place", 200), "90 in the slot, the others from host memory"
    assert same(exported(engine, source), truth)


# -- where a prefix comes from -------------------------------------------------------------------------------------


def test_in_place(make_engine: Make) -> None:
    engine = make_engine(parallel=2)
    one(engine, tokens(1, 100), name="first")
    said = history(engine, "first")
    assert len(said) == 100 + 8 - 1
    second = one(engine, [*said, 70, 71]).profile
    assert (second.kv_cache_source, second.kv_cache_hit) == ("in_place", 107)
    assert second.kv_miss_reason is not None and second.kv_miss_reason.endswith("the cached one ends there")


def test_a_copy_leaves_its_source_alone(make_engine: Make) -> None:
    """Without host memory 200 tokens would be lost for 40: with an empty slot it is copied."""
    engine = make_engine(parallel=2, kv_host_bytes=0, **EXACT)
    fix_costs(engine)
    first = one(engine, tokens(1, 240))
    copy = one(engine, tokens(1, 240)[:40] + tokens(2, 20)).profile
    assert (copy.kv_cache_source, copy.kv_cache_hit) == ("copy", 40)
    assert len(holders(engine)) == 2
    again = one(engine, tokens(1, 240))
    assert (again.profile.kv_cache_hit, again.text) == (239, first.text)


@pytest.mark.parametrize(("shared", "state"), [(128, abi.PREFILL), (299, abi.DECODE)])
def test_a_copy_of_a_running_sequence(make_engine: Make, shared: int, state: int) -> None:
    engine = make_engine(parallel=2, **EXACT)
    prompts = [tokens(1, 300), tokens(1, 300)[:shared] + tokens(2, 20)]
    expected = []
    for prompt in prompts:
        engine.kv.drop()
        expected.append(one(engine, prompt, 40).text)
    engine.kv.drop()
    states: list[int] = []
    cells = engine._kv.cells

    def copy(src: int, dst: int, n: int) -> bool:
        states.append(engine._core.states()[src])
        return cells.copy(src, dst, n)

    engine._kv.cells = Faulty(cells, copy=copy)  # type: ignore[assignment]
    answers = ask(engine, *(request(f"r{i}", prompt, 40) for i, prompt in enumerate(prompts)))
    assert [answer.text for answer in answers] == expected
    assert states == [state]
    assert (answers[1].profile.kv_cache_source, answers[1].profile.kv_cache_hit) == ("copy", shared)


@pytest.mark.parametrize("arch", KINDS)
def test_from_host_memory(make_engine: Make, tiny_model: Tiny, arch: str) -> None:
    engine = make_engine(tiny_model(arch), parallel=2, kv_host_bytes=1 << 26, **EXACT)
    first = one(engine, tokens(1, 120))
    for seed in (2, 3, 4):
        one(engine, tokens(seed, 60))
    again = one(engine, tokens(1, 120))
    assert (again.profile.kv_cache_source, again.profile.kv_cache_hit, again.text) == ("host", 119, first.text)


# -- chats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["streams", "unified"])
@pytest.mark.parametrize("arch", KINDS)
def test_a_chat_goes_on_where_it_ended(make_engine: Make, tiny_model: Tiny, arch: str, layout: str) -> None:
    """Also when others needed its slot meanwhile."""
    engine = make_engine(tiny_model(arch), parallel=2, kv_host_bytes=1 << 26, **exact(layout))
    asked, past = [tokens(1, 60)], []
    said: list[str] = []
    for turn in range(4):
        answer = one(engine, asked[-1], name=f"turn-{turn}")
        said.append(answer.text)
        assert answer.profile.kv_cache_hit == len(past), f"turn {turn}"
        past, before = history(engine, f"turn-{turn}"), len(past)
        asked.append(past + tokens(10 + turn, 20))
        for other in range(turn):  # none, one, or more than there are slots
            one(engine, tokens(100 + 10 * turn + other, 60))
    again = one(engine, asked[-2])
    assert again.text == said[-1], "regenerated"
    # Too near to where its history ends for a checkpoint of its own.
    assert again.profile.kv_cache_hit == (len(asked[-2]) - 1 if arch == "llama" else before)
    engine.kv.drop()
    assert [one(engine, prompt).text for prompt in asked[:4]] == said


@pytest.mark.parametrize("arch", KINDS)
def test_the_third_branch_profits_from_the_second(make_engine: Make, tiny_model: Tiny, arch: str) -> None:
    engine = make_engine(tiny_model(arch), parallel=2, kv_host_bytes=1 << 26, **EXACT)
    trunk = tokens(1, 300)
    branches = {seed: [*trunk, 97 + seed, *tokens(seed, 60)] for seed in (2, 3, 4, 7)}
    one(engine, branches[2])
    one(engine, branches[3])
    third = one(engine, branches[4])
    assert third.profile.kv_cache_hit == 300
    for seed in (5, 6):
        one(engine, tokens(seed, 60))
    fourth = one(engine, branches[7])
    assert (fourth.profile.kv_cache_source, fourth.profile.kv_cache_hit) == ("host", 300)
    for seed, branch in ((4, third), (7, fourth)):
        engine.kv.drop()
        assert one(engine, branches[seed]).text == branch.text


def test_a_window_is_not_cut_where_it_would_be_wrong(make_engine: Make, tiny_model: Tiny) -> None:
    """Without host memory there are no checkpoints: what cannot be cut is computed."""
    engine = make_engine(tiny_model("gemma3"), parallel=1, ctx_size=1024, kv_host_bytes=0, **EXACT)
    prompt = tokens(1, 900)
    for cut in (898, 880, 900 - WINDOW, 600, 300, 30):
        engine.kv.drop()
        expected = one(engine, [*prompt[:cut], 70, 71]).text
        engine.kv.drop()
        one(engine, prompt)
        found = one(engine, [*prompt[:cut], 70, 71])
        assert (found.text, found.profile.kv_cache_hit in (0, cut)) == (expected, True), cut


def in_host_memory(engine: Engine) -> int:
    """Bytes; a look wakes the engine, which falls asleep again."""
    return engine.call(lambda: engine._kv.host.used).result()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_goes_next_is_in_host_memory_before_its_turn(make_engine: Make) -> None:
    engine = make_engine(parallel=2, kv_host_bytes=1 << 26, **EXACT)
    token_bytes = engine._kv.cells.token_bytes
    first = one(engine, tokens(1, 40))
    assert in_host_memory(engine) == 0, "a slot is free: nobody has to go"
    one(engine, tokens(2, 40))
    until(lambda: in_host_memory(engine) > 0)
    assert in_host_memory(engine) == 47 * token_bytes, "the prompt and the answer of the first, but for its last token"
    assert len(holders(engine)) == 2, "both slots still retain what they did"
    before = len(events(engine))
    third = one(engine, tokens(3, 40))
    assert third.profile.kv_cache_evict == 0
    tiers = [event.tier for event in events(engine)[before:] if event.kind is KvEventKind.STORED]
    assert tiers[0] is KvTier.DEVICE, "what went for it was there already; what goes next followed"
    again = one(engine, tokens(1, 40))
    assert (again.profile.kv_cache_source, again.text) == ("host", first.text)


@pytest.mark.parametrize("options", [{"kv_host_bytes": 4000}, {"kv_host_bytes": 0}, {"parallel": 3}])
def test_nothing_is_copied_ahead_that_would_push_something_out(make_engine: Make, options: dict[str, Any]) -> None:
    engine = make_engine(**{"parallel": 2, "kv_host_bytes": 1 << 26, **options})
    for seed in (1, 2):
        one(engine, tokens(seed, 40))
    engine.call(lambda: None).result()
    assert engine.call(lambda: engine._kv.store_ahead([False] * engine.info.n_parallel, 1 << 20)).result() == 0
    assert engine.counters()["kv_store_bytes"] == 0
