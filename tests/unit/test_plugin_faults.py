"""What a user's code does wrong costs it its job, and nobody else anything: odd plans, exits, what cannot be shown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mullama.engine.planning.planner import Planner
from mullama.engine.planning.policy_host import PolicyHost
from mullama.errors import PluginError
from mullama.kv.eviction import registry as kv_registry
from mullama.plugins.groups import MAX_PARAMS, PluginGroup, publish
from mullama.scheduling import EngineState, Plan, SeqView, check_plan, create, own_plan, registry
from mullama.simulation.shadow_policy import ShadowPolicy
from mullama.types import Preempt, SeqState

NOT_WHOLE: list[Any] = [-1, 10**30, "x", None, float("inf"), float("nan"), 1.0, True, 1j, [1], 1 << 63]
EXITS = [SystemExit, KeyboardInterrupt, GeneratorExit, RecursionError, MemoryError]


def now() -> EngineState:
    return EngineState(now_ns=time.monotonic_ns(), step=1, free_slots=1, max_prefill=512, n_slots=2)


def views() -> dict[int, SeqView]:
    decodes = SeqView(1, SeqState.DECODE, 5, 0, 10, 1)
    waits = SeqView(2, SeqState.WAITING, 5, 5, 10, 2)
    return {1: decodes, 2: waits}


class Odd(dict[int, int]):
    """A mapping that does what it was told when somebody looks at it."""

    def __init__(self, does: Callable[[], Any]) -> None:
        super().__init__({1: 1})
        self._does = does

    def keys(self) -> Any:
        return self._does()

    items = __iter__ = keys


class Mine:
    """A user's policy: ``plan`` answers what it was given, or does what it was told."""

    name = "mine"

    def __init__(self, answer: Any = None, does: Callable[[], Any] | None = None) -> None:
        self.answer = answer
        self.does = does
        self.threads: set[str] = set()

    def add(self, seq: SeqView) -> None:
        self.threads.add(threading.current_thread().name)

    def remove(self, seq_id: int) -> None: ...

    def plan(self, state: EngineState) -> Any:
        self.threads.add(threading.current_thread().name)
        return self.does() if self.does is not None else self.answer

    def params(self) -> Mapping[str, Any]:
        self.threads.add(threading.current_thread().name)
        return {}


@pytest.fixture
def host() -> Iterator[Callable[[Any], PolicyHost]]:
    hosts: list[PolicyHost] = []

    def make(policy: Any) -> PolicyHost:
        one = PolicyHost(policy, "./mine.py:Mine", own_thread=True, timeout_ms=30_000)
        one.views = views()
        for view in one.views.values():
            one.arrived(view)
        hosts.append(one)
        return one

    yield make
    for one in hosts:
        one.close()


def raises(error: type[BaseException]) -> Callable[[], Any]:
    def does() -> Any:
        raise error("now")

    return does


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["repeat", "until_ns"])
@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_odd_numbers_are_refused(field: str, value: Any, host: Callable[[Any], PolicyHost]) -> None:
    plan = Plan({1: 1}, **{field: value})
    with pytest.raises(PluginError, match="whole number"):
        check_plan(plan, views(), now())
    one = host(Mine(plan))
    found = one.plan(now())
    assert found.tokens and one.name == "fcfs", "others go on"
    assert one.fallback is not None and "whole number" in one.fallback["reason"]


@pytest.mark.parametrize(
    "plan",
    [
        *(Plan({1: value}) for value in NOT_WHOLE if value is not True),
        *({1: True}, {True: 1}, {"1": 1}, {1.0: 1}, {None: 1}, {(1,): 1}),
        *(Plan(tokens) for tokens in (None, 5, [1], "ab", [(1, 1, 1)], {"1": 1}, {True: 1})),
        *(Plan({}, preempt=preempt) for preempt in (None, {1: "x"}, {1: None}, {1: []}, {"1": "swap"}, {1: Odd}, 7)),
    ],
    ids=repr,
)
def test_odd_plans_are_refused(plan: Any, host: Callable[[Any], PolicyHost]) -> None:
    one = host(Mine(plan))
    assert one.plan(now()).tokens
    assert one.fallback is not None and one.name == "fcfs"


def test_what_can_be_carried_out_is_taken_over_as_plain_data() -> None:
    plan = own_plan(Plan({1: 1}, repeat=(1 << 31) - 1, preempt={2: "swap"}, until_ns=(1 << 63) - 1))  # type: ignore[dict-item]
    assert plan == Plan({1: 1}, (1 << 31) - 1, {2: Preempt.SWAP}, (1 << 63) - 1)
    assert type(plan.tokens) is dict and type(plan.preempt[2]) is Preempt
    check_plan(Plan({1: 1}, (1 << 31) - 1, until_ns=(1 << 63) - 1), views(), now())


def test_a_plan_that_changes_afterwards_changes_nothing(host: Callable[[Any], PolicyHost]) -> None:
    kept = Plan({1: 1})
    one = host(Mine(kept))
    found = one.plan(now())
    kept.tokens[99] = 7
    kept.repeat = -1
    assert found == Plan({1: 1}) and one.fallback is None


@pytest.mark.parametrize("error", EXITS)
def test_whatever_a_policy_raises_costs_it_its_job(
    error: type[BaseException], host: Callable[[Any], PolicyHost]
) -> None:
    for policy in (
        Mine(does=raises(error)),
        Mine(Plan(Odd(raises(error)))),
        Mine(Plan({}, preempt=Odd(raises(error)))),  # type: ignore[arg-type]
    ):
        one = host(policy)
        assert one.plan(now()).tokens
        assert one.fallback is not None
        assert one.fallback["reason"].startswith(f"plan() raised {error.__name__}: now")


@pytest.mark.parametrize("error", EXITS)
def test_a_shadow_that_raises_is_off(error: type[BaseException]) -> None:
    if error is KeyboardInterrupt:
        return  # on the main thread, where this test runs, that is Ctrl-C
    shadow = ShadowPolicy(Mine(does=raises(error)), "mine")
    shadow.observe(now(), Plan({1: 1}), views().values())
    assert shadow.off is not None and shadow.off.startswith(f"plan() raised {error.__name__}: now")


def test_no_word_of_an_exception_runs_on_the_engine_thread(host: Callable[[Any], PolicyHost]) -> None:
    threads: set[str] = set()

    class Sly(Exception):
        def __str__(self) -> str:
            threads.add(threading.current_thread().name)
            return "sly"

    one = host(Mine(does=raises(Sly)))
    one.plan(now())
    assert one.fallback is not None and one.fallback["reason"].startswith("plan() raised Sly: sly")
    assert threads == {"mullama-planner-./mine.py:Mine"}


# -- views ------------------------------------------------------------------------------------------------------------


def test_views_read_what_was_published(host: Callable[[Any], PolicyHost]) -> None:
    policy = Mine(Plan({1: 1}))
    one = host(policy)
    policy.threads.clear()
    for _ in range(3):
        assert (one.plan(now()), one.name, one.params()) == (Plan({1: 1}), "mine", {})
    assert policy.threads == {"mullama-planner-./mine.py:Mine"}, "no other thread runs its code"


def test_parameters_that_a_policy_changes_are_published_by_its_own_thread(
    host: Callable[[Any], PolicyHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mullama.engine.planning.planner.PUBLISH_S", 0.0)

    class Learns(Mine):
        n = 0

        def params(self) -> Mapping[str, Any]:
            self.n += 1
            return {"n": self.n}

    one = host(Learns(Plan({1: 1})))
    assert one.params() == {"n": 1}
    deadline = time.monotonic() + 30
    while one.params() == {"n": 1} and time.monotonic() < deadline:
        one.plan(now())
    assert one.params()["n"] > 1


BAD_PARAMS: list[Any] = [
    None,
    5,
    "x",
    {1: 2},
    {"x": object()},
    {"x": 1 << 64},
    {"x": "\ud800"},
    {"x": {1, 2}},
    {"x": b"1"},
]


@pytest.mark.parametrize(
    "params", [*BAD_PARAMS, {"x": "y" * MAX_PARAMS}], ids=lambda value: repr(value).partition(" at 0x")[0][:30]
)
def test_parameters_that_cannot_be_shown_are_refused(params: Any) -> None:
    class Bad(Mine):
        def params(self) -> Mapping[str, Any]:
            return params  # type: ignore[no-any-return]

    with pytest.raises(PluginError, match="the scheduler 'mine' cannot be shown"):
        publish(Bad(), "scheduler", "mine")
    one = PolicyHost(create("fcfs"), "fcfs", own_thread=False, timeout_ms=100)
    with pytest.raises(PluginError):
        one.change(Bad(), "mine", own_thread=True)
    assert (one.name, one.fallback) == ("fcfs", None), "the one before stays"


@pytest.mark.parametrize("name", ["", "x" * 121, 5, None, "a\nb", "\ud800", b"mine"])
def test_names_that_cannot_be_shown_are_refused(name: Any) -> None:
    policy = Mine()
    policy.name = name  # type: ignore[misc]
    with pytest.raises(PluginError, match="cannot be shown"):
        publish(policy, "scheduler", "mine")


# -- loading ----------------------------------------------------------------------------------------------------------

FILES = {
    "imported": "import sys\nsys.exit(3)\n",
    "made": "class Mine:\n    def __init__(self):\n        raise SystemExit(3)\n",
    "asked": "class Mine:\n    name = 'mine'\n    def params(self):\n        raise GeneratorExit(3)\n",
}
METHODS = """
    def add(self, seq): ...
    def remove(self, seq_id): ...
    def plan(self, state): ...
    def score(self, entry, now_ns): ...
"""


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("group", [registry, kv_registry], ids=["scheduler", "kv_policy"])
def test_a_file_that_ends_the_process_is_an_error(kind: str, group: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILES[kind] + (METHODS if "class" in FILES[kind] else ""))
    with pytest.raises(PluginError, match=r"(SystemExit|GeneratorExit): 3"):
        publish(group.create(f"{file}:Mine"), "policy", "mine")


def test_a_plugin_that_ends_the_process_when_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exits_at_once.py").write_text("raise SystemExit('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    group = PluginGroup("mullama.tests", "thing", {"exits": "exits_at_once:Thing"})
    with pytest.raises(PluginError, match=r"cannot load the thing 'exits' .*: SystemExit: no licence"):
        group.load("exits")


def test_ctrl_c_is_nobody_s_fault(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        registry.create(f"{file}:Mine")


def test_a_parameter_that_names_code_makes_a_policy_foreign() -> None:
    assert registry.is_foreign("./mine.py:Mine") and registry.is_foreign("srpt", {"predictor": "./mine.py:Mine"})
    assert not registry.is_foreign("srpt", {"predictor": "mean"})


def test_a_planner_that_is_closed_ends(host: Callable[[Any], PolicyHost]) -> None:
    planner = Planner(Mine(Plan()), "one")
    planner.close()
    planner._thread.join(30)
    assert not planner._thread.is_alive()
