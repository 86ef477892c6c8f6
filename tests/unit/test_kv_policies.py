"""Eviction policies: what each gives up first, by name and from a user's file, and what a broken one costs."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from docs_support import ROOT, table
from hypothesis import given
from hypothesis import strategies as st
from kv_support import leaves, put_path

from mullama.errors import InvalidRequest, PluginError
from mullama.kv.eviction import cost as cost_module
from mullama.kv.eviction.cost import Cost
from mullama.kv.eviction.guarded import GuardedPolicy
from mullama.kv.eviction.lru import Lru
from mullama.kv.eviction.policy import Entry, EvictionPolicy
from mullama.kv.eviction.registry import BUILTINS, GROUP, KV_POLICIES, create, names_code
from mullama.kv.eviction.turns import Turns
from mullama.kv.index.tree import PrefixTree, pack
from mullama.kv.tiers.host_tier import HostTier
from mullama.plugins.parameters import Param, Policy

MS = 1_000_000
PAGE = ROOT / "docs" / "kv-eviction.md"

by_policy = pytest.mark.parametrize("name", BUILTINS)


@dataclass
class Stretch:
    """An entry as a policy sees it."""

    start: int = 0
    n_tokens: int = 100
    n_bytes: int = 1000
    created_ns: int = 0
    used_ns: int = 0
    hits: int = 0
    cost_ns: float = 0.0
    n_served: int = 0

    @property
    def end(self) -> int:
        return self.start + self.n_tokens


def order(policy: EvictionPolicy, entries: Mapping[str, Stretch], now_ns: int = 10**12) -> str:
    """The names of the entries, the first to go first."""
    scores = {name: policy.score(entry, now_ns) for name, entry in entries.items()}
    return "".join(sorted(scores, key=scores.__getitem__))


# -- every policy ---------------------------------------------------------------------------------------------------

stretches = st.builds(
    Stretch,
    start=st.integers(0, 10**6),
    n_tokens=st.integers(1, 10**6),
    n_bytes=st.integers(0, 2**40),
    created_ns=st.integers(0, 2**61),
    used_ns=st.integers(0, 2**61),
    hits=st.integers(0, 10**6),
    cost_ns=st.floats(0, 1e15),
)
calls_st = st.lists(st.tuples(stretches, st.integers(0, 2**61), st.booleans()), max_size=12)


def played(policy: EvictionPolicy, calls: Sequence[tuple[Stretch, int, bool]]) -> list[float]:
    scores = []
    for entry, now_ns, goes in calls:
        score = policy.score(entry, now_ns)
        scores.append(score)
        if goes:
            policy.evicted(entry, score)
    return scores


@by_policy
@given(calls=calls_st)
def test_every_policy_is_total_and_deterministic(name: str, calls: list[tuple[Stretch, int, bool]]) -> None:
    """Any entry has a finite score; the same questions get the same answers; the entry is only read."""
    before = [repr(entry) for entry, _, _ in calls]
    scores = played(create(name), calls)
    assert all(type(score) is float and math.isfinite(score) for score in scores)
    assert played(create(name), calls) == scores
    assert [repr(entry) for entry, _, _ in calls] == before


# -- what goes first ------------------------------------------------------------------------------------------------


def test_lru_goes_by_the_last_use() -> None:
    entries = {"a": Stretch(used_ns=3, hits=0), "b": Stretch(used_ns=1, hits=9), "c": Stretch(used_ns=2, created_ns=9)}
    assert order(create("lru"), entries) == "bca"


def test_fifo_goes_by_the_first_day() -> None:
    entries = {"a": Stretch(created_ns=3), "b": Stretch(created_ns=1, used_ns=9, hits=9), "c": Stretch(created_ns=2)}
    assert order(create("fifo"), entries) == "bca"


def test_lfu_counts_and_time_breaks_ties() -> None:
    entries = {
        "a": Stretch(hits=1, used_ns=9 * MS),
        "b": Stretch(hits=0, used_ns=99 * MS),
        "c": Stretch(hits=1, used_ns=8 * MS),
        "d": Stretch(hits=0, used_ns=98 * MS),
    }
    assert order(create("lfu"), entries) == "dbca"


@given(
    hits=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    used_ms=st.tuples(st.integers(0, 2**41), st.integers(0, 2**41)),
)
def test_lfu_is_the_order_of_pairs(hits: tuple[int, int], used_ms: tuple[int, int]) -> None:
    """At any time a clock can show (2**41 ms: the year 2039), apart by 10 ms or more."""
    one, other = (Stretch(hits=h, used_ns=10 * MS * u) for h, u in zip(hits, used_ms, strict=True))
    policy = create("lfu")
    pairs = ((one.hits, one.used_ns), (other.hits, other.used_ns))
    scores = policy.score(one, 0), policy.score(other, 0)
    assert (scores[0] < scores[1], scores[0] == scores[1]) == (pairs[0] < pairs[1], pairs[0] == pairs[1])


def test_turns_give_time_to_what_went_on_before() -> None:
    """Minutes in proportion to the share of the prompt that has served."""
    minute = 60 * 10**9
    entries = {
        "a": Stretch(used_ns=4 * minute, start=0),
        "b": Stretch(used_ns=0, start=300, n_served=300),  # three quarters of five minutes
        "c": Stretch(used_ns=0, start=300, n_served=400, hits=1),  # all of them
        "d": Stretch(used_ns=2 * minute, start=300, n_served=100),
    }
    assert order(create("turns"), entries) == "dbac"
    assert order(create("turns", {"minutes": 0}), entries) == "bcda"
    assert create("turns").score(entries["b"], 1) == 3.75 * minute


def test_what_served_is_known_to_the_tree() -> None:
    tree = PrefixTree()
    tier = HostTier(tree, 10**6, create("turns"))
    put_path(tree, tier, list(range(100)), 1)
    (first,) = tree.nodes()
    assert first.n_served == 0
    tier.touch([first], 2)
    put_path(tree, tier, list(range(150)), 2)
    put_path(tree, tier, list(range(160)), 2)  # its answer, a stretch of its own
    assert [node.n_served for node in sorted(tree.nodes(), key=lambda node: node.end)] == [100, 100, 100]


def test_cost_weighs_computing_against_bytes_and_hits() -> None:
    entries = {
        "a": Stretch(cost_ns=4e6, n_bytes=1000),
        "b": Stretch(cost_ns=1e6, n_bytes=1000),
        "c": Stretch(cost_ns=4e6, n_bytes=2000),
        "d": Stretch(cost_ns=1e6, n_bytes=1000, hits=2),
    }
    policy = create("cost")
    assert order(policy, entries) == "bcda"
    assert policy.score(entries["d"], 1) == 3 * 1e6 / 1000


def test_cost_where_nothing_was_measured() -> None:
    """token_us for each token, and for the attention of each to those before it."""
    policy = create("cost", {"token_us": 500, "attention": 0.2})
    first = Stretch(start=0, n_tokens=100, n_bytes=1)
    later = Stretch(start=3000, n_tokens=100, n_bytes=1)
    whole = sum(500_000 * (1 + 0.2 * before / 1000) for before in range(3000, 3100))
    assert policy.score(later, 1) == pytest.approx(whole)
    assert policy.score(first, 1) == pytest.approx(100 * 500_000 * (1 + 0.2 * 49.5 / 1000))
    # Two parts cost what the whole costs.
    parts = Stretch(start=3000, n_tokens=37, n_bytes=1), Stretch(start=3037, n_tokens=63, n_bytes=1)
    assert sum(policy.score(part, 1) for part in parts) == pytest.approx(whole)
    assert policy.score(Stretch(n_bytes=0), 1) > 0  # KV that is all checkpoint elsewhere


def test_cost_forgets_what_was_popular() -> None:
    """Whatever is not used falls behind: the inflation rises with what goes."""
    policy = create("cost")
    popular = Stretch(cost_ns=1e6, hits=5, used_ns=0)  # worth 6,000
    old = policy.score(popular, 0)
    for now in range(1, 10):
        newcomer = Stretch(cost_ns=1e6, used_ns=now)
        score = policy.score(newcomer, now)
        if score > old:
            break
        policy.evicted(newcomer, score)
    assert now == 7  # six have gone, each 1,000 above the one before; this is the seventh, and worth 7,000
    assert policy.score(popular, 10) == old  # not used since, so as it was
    popular.used_ns = 10
    assert policy.score(popular, 10) == old + 6000


def test_a_late_question_does_not_make_young() -> None:
    """A trunk is asked for when its branches have gone; what counts is when it was last used."""
    policy = create("cost")
    trunk, branch = Stretch(cost_ns=1e6, used_ns=5), Stretch(cost_ns=1e6, used_ns=5)
    first = policy.score(branch, 5)
    for now in (10, 20, 30):
        filler = Stretch(cost_ns=1e6, used_ns=now)
        policy.evicted(filler, policy.score(filler, now))
    assert policy.score(trunk, 40) == first
    assert policy.score(Stretch(cost_ns=1e6, used_ns=10), 40) == first + 1000  # at that very moment: what went had gone
    assert policy.score(Stretch(cost_ns=1e6, used_ns=29), 40) == first + 2000


def test_the_inflation_never_falls() -> None:
    """What was pinned goes late, with the score of old times."""
    policy = create("cost")
    dear, cheap = Stretch(cost_ns=9e6, used_ns=1), Stretch(cost_ns=1e6, used_ns=1)
    scores = policy.score(dear, 1), policy.score(cheap, 1)
    policy.evicted(dear, scores[0])
    policy.score(cheap, 2)
    policy.evicted(cheap, scores[1])
    assert policy.score(Stretch(cost_ns=1e6, used_ns=3), 3) == 9000 + 1000


def test_the_history_of_cost_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "_HISTORY", 4)
    policy = Cost()
    for now in range(1, 100):
        filler = Stretch(cost_ns=1e6, used_ns=now)
        policy.evicted(filler, policy.score(filler, now))
    assert len(policy._since) == len(policy._levels) < 8
    assert policy.score(Stretch(cost_ns=1e6, used_ns=99), 100) == 100_000
    assert policy.score(Stretch(cost_ns=1e6, used_ns=98), 100) == 99_000
    assert policy.score(Stretch(cost_ns=1e6, used_ns=1), 100) == 1000  # forgotten: older than all that is known


class GreedyDual:
    """GreedyDual-Size with frequency as published: a value for each page, set when it is used."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.inflation = 0.0
        self.values: dict[int, float] = {}
        self.uses: dict[int, int] = {}
        self.numbers: dict[int, int] = {}  # for ties: the one that was valued first
        self.sizes: dict[int, int] = {}

    def use(self, page: int, size: int, number: int) -> None:
        while page not in self.values and sum(self.sizes.values()) + size > self.budget:
            victim = min(self.values, key=lambda one: (self.values[one], self.numbers[one]))
            self.inflation = max(self.inflation, self.values.pop(victim))
            for known in (self.uses, self.numbers, self.sizes):
                known.pop(victim)
        self.uses[page] = self.uses.get(page, 0) + 1
        self.sizes[page] = size
        self.numbers[page] = number
        self.values[page] = self.inflation + self.uses[page] * (page % 4 + 1) * 1e6 / size


@given(pages=st.lists(st.integers(0, 9), max_size=60))
def test_cost_is_greedy_dual_where_all_are_leaves(pages: list[int]) -> None:
    """Beside the published rule: pages of different sizes and costs, as paths of their own."""
    reference = GreedyDual(500)
    tree = PrefixTree()
    tier = HostTier(tree, 500, create("cost"), can_cut=False)
    for now, page in enumerate(pages, 1):
        size = 10 * (page + 1)
        reference.use(page, size, now)
        tokens = pack([100 * page + i for i in range(page + 1)])
        found = tree.match(b"", tokens)
        if found.n_host:
            tier.touch(found.nodes, now)
        else:
            tree.insert(b"", tokens, now).cost_ns = (page % 4 + 1) * 1e6
            put_path(tree, tier, [100 * page + i for i in range(page + 1)], now)
        assert {leaf.n_tokens - 1 for leaf in leaves(tree)} == reference.values.keys()


@by_policy
@given(
    requests=st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 70)), min_size=1, max_size=3), max_size=12)
)
def test_a_tier_works_under_every_policy(name: str, requests: list[list[tuple[int, int]]]) -> None:
    tree = PrefixTree()
    tier = HostTier(tree, 1500, create(name))
    for now, parts in enumerate(requests, 1):
        tokens = [kind * 1000 + i for kind, n in parts for i in range(n)]
        tier.touch([node for node in tree.match(b"", pack(tokens)).nodes if node.host is not None], now)
        stored = put_path(tree, tier, tokens, now)
        assert stored == len(tokens) or 10 * len(tokens) > 1500
        assert tree.match(b"", pack(tokens)).n_host == stored


# -- by name --------------------------------------------------------------------------------------------------------


def test_every_builtin_is_made_by_its_name() -> None:
    assert list(BUILTINS) == ["lru", "lfu", "fifo", "cost", "turns"] == GROUP.names()
    for name in BUILTINS:
        policy = create(name)
        assert isinstance(policy, Policy) and policy.name == name
        assert dict(policy.params()) == {param.name: param.default for param in policy.PARAMS}
        assert GROUP.is_builtin(name) and not names_code(name)


def test_every_builtin_says_what_it_does_and_where_it_comes_from() -> None:
    found = GROUP.describe_all()
    assert [policy["name"] for policy in found] == list(BUILTINS)
    for policy in found:
        assert policy["builtin"] and policy["summary"].endswith(".") and policy["source"]
        assert all(param["help"] and param["range"] for param in policy["params"])


def test_parameters_are_checked() -> None:
    assert create("cost", {"attention": "0.5"}).params() == {"token_us": 1000.0, "attention": 0.5}
    with pytest.raises(InvalidRequest, match="cost has no parameter 'speed'; its parameters are token_us, attention"):
        create("cost", {"speed": 5})
    with pytest.raises(InvalidRequest, match="lru has no parameter 'speed'; it has no parameters"):
        create("lru", {"speed": 5})
    with pytest.raises(InvalidRequest, match="attention must be a number from 0 to 1,000, not -1"):
        create("cost", {"attention": -1})


@pytest.mark.parametrize("spec", ["nonsense", "", "LRU", "mullama.kv.eviction.lru"])
def test_an_unknown_name_gets_the_valid_ones(spec: str) -> None:
    with pytest.raises(
        InvalidRequest, match=r"no KV policy '.*'; there are lru, lfu, fifo, cost, turns, and FILE"
    ) as error:
        create(spec)
    assert (error.value.status, error.value.param) == (400, "kv_policy")
    assert not GROUP.is_builtin(spec)


# -- a user's -------------------------------------------------------------------------------------------------------

MINE = '''
class Longest:
    """Long stretches go first.

    More of it.
    """

    def __init__(self, least: int = 3):
        self.least = least

    def score(self, entry, now_ns):
        return -max(entry.n_tokens, self.least)
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_a_class_with_score_alone(mine: Path) -> None:
    policy = create("./mine.py:Longest", {"least": "50"})
    assert (policy.name, policy.params()) == ("Longest", {"least": 50})
    policy.evicted(Stretch(), 1.0)
    assert policy.score(Stretch(n_tokens=7), 1) == -50
    assert not GROUP.is_builtin("./mine.py:Longest") and names_code("./mine.py:Longest")
    assert GROUP.describe("./mine.py:Longest")["summary"] == "Long stretches go first."
    tree = PrefixTree()
    tier = HostTier(tree, 1000, policy, can_cut=False)
    for first, n_tokens in ((0, 30), (100, 60), (200, 40)):
        put_path(tree, tier, list(range(first, first + n_tokens)), first)
    assert sorted(leaf.n_tokens for leaf in leaves(tree)) == [30, 40]


def test_a_class_with_everything_is_used_as_it_is(mine: Path) -> None:
    more = "    name = 'my own'\n    def params(self):\n        return {'x': 1}\n    def evicted(self, entry, score):\n"
    mine.write_text(MINE + more + "        self.last = score\n")
    policy = create(f"{mine}:Longest")
    assert (type(policy).__name__, policy.name, policy.params()) == ("Longest", "my own", {"x": 1})
    policy.evicted(Stretch(), 7.0)
    assert vars(policy)["last"] == 7.0


def test_declared_parameters_without_evicted(mine: Path) -> None:
    mine.write_text(
        "from mullama.plugins.parameters import Param, Policy\n"
        "class Mine(Policy):\n"
        "    PARAMS = (Param('knob', 1, 'turns', 0),)\n"
        "    def score(self, entry, now_ns): return self.knob\n"
    )
    policy = create("./mine.py:Mine", {"knob": "5"})
    assert (policy.name, policy.params(), policy.score(Stretch(), 0)) == ("Mine", {"knob": 5}, 5)
    policy.evicted(Stretch(), 5)
    with pytest.raises(InvalidRequest, match="knob must be a whole number, 0 or more"):
        create("./mine.py:Mine", {"knob": -1})


def test_a_subclass_of_a_builtin(mine: Path) -> None:
    mine.write_text(
        "from mullama.kv.eviction.cost import Cost\n"
        "class Mine(Cost):\n"
        "    def score(self, entry, now_ns): return super().score(entry, now_ns) + (entry.start == 0)\n"
    )
    policy = create("./mine.py:Mine", {"attention": 0})
    assert isinstance(policy, Cost) and policy.params()["attention"] == 0


def test_a_module(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine.parent))
    assert create("mine:Longest").params() == {"least": 3}
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("spec", "error", "reason"),
    [
        ("./none.py:Mine", InvalidRequest, "cannot read the KV policy file none.py: No such file"),
        ("./mine.py:Nobody", InvalidRequest, "has no 'Nobody' to use as KV policy; its classes are Longest"),
        ("./mine.py:MORE", PluginError, "is a str, a class is needed"),
        ("./mine.py:Empty", PluginError, "the KV policy './mine.py:Empty' has no method score; score is needed"),
        ("./mine.py:Odd", InvalidRequest, "the KV policy './mine.py:Odd' refuses its parameters: odd"),
        ("./mine.py:Bad", PluginError, "cannot make the KV policy './mine.py:Bad': ZeroDivisionError"),
        ("./mine.py:Wants", InvalidRequest, "the KV policy './mine.py:Wants' needs a value for x"),
    ],
)
def test_what_cannot_be_found_or_used(mine: Path, spec: str, error: type[Exception], reason: str) -> None:
    has_score = "    def score(self, entry, now_ns): return 0\n    def __init__(self"
    extra = (
        f"class Odd:\n{has_score}): raise ValueError('odd')\n"
        f"class Bad:\n{has_score}): 1 / 0\n"
        f"class Wants:\n{has_score}, x): pass\n"
    )
    mine.write_text(MINE + ("MORE = ''\nclass Empty: pass\n" + extra if "Nobody" not in spec else ""))
    with pytest.raises(error, match=re.escape(reason)):
        create(spec)


def test_wrong_parameters_of_a_file(mine: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"KV policy '\./mine\.py:Longest': least must be a whole number"):
        create("./mine.py:Longest", {"least": "many"})
    with pytest.raises(InvalidRequest, match="has no parameter 'most'; its parameters are least"):
        create("./mine.py:Longest", {"most": 1})


def test_an_installed_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "third_party_kv.py").write_text(MINE)
    info = tmp_path / "third_party_kv-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third_party_kv\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[mullama.kv_policies]\nlongest = third_party_kv:Longest\nlru = third_party_kv:Longest\n"
        "broken = third_party_kv:Nobody\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(KV_POLICIES, "_loaded", {})
    assert GROUP.names() == [*BUILTINS, "broken", "longest"]
    assert create("longest", {"least": 9}).params() == {"least": 9}
    assert not GROUP.is_builtin("longest")
    assert isinstance(create("lru"), Lru)
    assert "Nobody" in GROUP.describe_all()[-2]["error"]


# -- a broken one ---------------------------------------------------------------------------------------------------


class Faulty:
    """Good for ``good`` questions, then ``how`` says what comes back."""

    name = "faulty"

    def __init__(self, how: Callable[[], object], good: int = 0) -> None:
        self.how = how
        self.left = good

    def score(self, entry: Entry, now_ns: int) -> Any:
        self.left -= 1
        return 5 if self.left >= 0 else self.how()

    def evicted(self, entry: Entry, score: float) -> None:
        self.how()

    def params(self) -> Mapping[str, Any]:
        return {"x": 1}


def fails() -> object:
    raise KeyError("who?")


def exits() -> object:
    sys.exit(3)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text either")


def unspeakable() -> object:
    raise Unspeakable


class Nasty:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (fails, "score() raised KeyError: 'who?'"),
        (exits, "score() raised SystemExit: 3"),
        (unspeakable, "score() raised Unspeakable: something ("),
        (lambda: None, "score() returned None, not a finite number"),
        (lambda: "1", "score() returned '1', not a finite number"),
        (lambda: math.nan, "score() returned nan, not a finite number"),
        (lambda: -math.inf, "score() returned -inf, not a finite number"),
        (lambda: 1j, "score() returned 1j, not a finite number"),
        (lambda: 10**400, "score() raised OverflowError"),
        (lambda: (1, 2), "score() returned (1, 2), not a finite number"),
        (lambda: Nasty(), "score() returned something (Nasty), not a finite number"),
        (lambda: "x" * 10_000, f"score() returned '{'x' * 116}..., not a finite number"),
    ],
)
def test_what_costs_a_policy_its_job(
    how: Callable[[], object], reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1234.5678)
    guarded = GuardedPolicy(Faulty(how, good=1), "./mine.py:Faulty")
    told: list[object] = []
    guarded.on_fallback = lambda: told.append(guarded.fallback)
    assert guarded.score(Stretch(used_ns=8), 9) == 5.0
    assert (guarded.name, guarded.spec, guarded.fallback) == ("faulty", "./mine.py:Faulty", None)
    assert guarded.score(Stretch(used_ns=8), 9) == 8.0  # lru's answer to the same question
    assert guarded.fallback is not None
    assert guarded.fallback["reason"].startswith(reason)
    assert {**guarded.fallback, "reason": ""} == {"from": "./mine.py:Faulty", "reason": "", "unix_time": 1234.568}
    assert (guarded.name, guarded.spec, dict(guarded.params())) == ("lru", "lru", {})
    assert guarded.score(Stretch(used_ns=7), 9) == 7.0
    guarded.evicted(Stretch(), 7.0)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(f"KV policy './mine.py:Faulty' is replaced by lru: {reason}")
    assert told == [guarded.fallback]


def test_evicted_that_raises() -> None:
    guarded = GuardedPolicy(Faulty(fails, good=9), "mine")
    guarded.evicted(Stretch(), 1.0)
    assert guarded.fallback is not None
    assert re.fullmatch(r"evicted\(\) raised KeyError: 'who\?' \(.*\.py, line \d+\)", guarded.fallback["reason"])
    assert isinstance(guarded.policy, Lru)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_is_no_exception_costs_it_its_job_as_well(error: type[BaseException]) -> None:
    def how() -> object:
        raise error("now")

    for what in ("score", "evicted"):
        guarded = GuardedPolicy(Faulty(how), "mine")
        if what == "score":
            assert guarded.score(Stretch(used_ns=8), 9) == 8.0
        else:
            guarded.evicted(Stretch(), 1.0)
        assert guarded.fallback is not None
        assert guarded.fallback["reason"].startswith(f"{what}() raised {error.__name__}: now")


def test_one_that_holds_everybody_up_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    takes = 0.04

    def how() -> object:
        nonlocal now
        now += takes
        return 5.0

    guarded = GuardedPolicy(Faulty(how), "mine")
    for seconds in (0.04, 0.06, 0.06, 0.04, 0.06, 0.06):  # never three slow ones in a row
        takes = seconds
        assert guarded.score(Stretch(used_ns=8), 9) == 5.0
    assert guarded.fallback is None
    assert guarded.score(Stretch(used_ns=8), 9) == 8.0
    assert guarded.fallback is not None
    assert guarded.fallback["reason"] == "score() took 0.060 s, and everybody waits for it"
    guarded, takes = GuardedPolicy(Faulty(how), "mine"), 1.5
    guarded.evicted(Stretch(), 1.0)
    assert guarded.fallback is not None
    assert guarded.fallback["reason"] == "evicted() took 1.500 s, and everybody waits for it"


def test_what_it_says_of_itself_is_asked_once() -> None:
    asked = 0

    class Counts(Faulty):
        def params(self) -> Mapping[str, Any]:
            nonlocal asked
            asked += 1
            return {"x": asked}

    guarded = GuardedPolicy(Counts(lambda: 5.0), "mine")
    assert [guarded.params() for _ in range(3)] == [{"x": 1}] * 3
    assert (asked, guarded.name) == (1, "faulty")


@pytest.mark.parametrize("score", [True, 7, 7.5, Fraction(1, 2)])
def test_any_number_will_do(score: Any) -> None:
    guarded = GuardedPolicy(Faulty(lambda: score), "mine")
    assert guarded.score(Stretch(), 1) == float(score)
    assert guarded.fallback is None


def test_a_good_policy_is_asked_and_told(mine: Path) -> None:
    guarded = GuardedPolicy(create("cost"), "cost")
    assert guarded.score(Stretch(cost_ns=1e6), 5) == 1000
    guarded.evicted(Stretch(cost_ns=1e6), 1000)
    assert guarded.score(Stretch(cost_ns=1e6, used_ns=6), 6) == 2000
    assert guarded.params() == {"token_us": 1000.0, "attention": 0.1}
    assert (guarded.name, guarded.fallback) == ("cost", None)


# -- the page -------------------------------------------------------------------------------------------------------


def shown(param: Param) -> str:
    return f"{param.default:g}" if isinstance(param.default, float) else str(param.default).lower()


def test_the_page_names_every_policy_and_its_source() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    for name in BUILTINS:
        assert f"### {name} " in text
        authors = re.findall(r"([A-Z][a-z]+)(?: et al\.,|, [A-Z]| and )", GROUP.describe(name)["source"])
        assert authors, name
        assert [author for author in authors if author not in text] == [], name


def test_the_page_has_the_parameters_of_the_code() -> None:
    assert [name for name in BUILTINS if GROUP.describe(name)["params"]] == ["cost", "turns"]
    for policy in (Cost, Turns):
        rows = [[f"`{param.name}`", shown(param), param.range, param.help] for param in policy.PARAMS]
        assert table(PAGE, policy.name) == rows


def test_the_page_lists_what_an_entry_shows() -> None:
    fields = {name for name in vars(Entry) if not name.startswith("_")} | Entry.__annotations__.keys()
    said = [row[0].strip("`") for row in table(PAGE, "What a policy sees")]
    assert sorted(said) == sorted(fields)
