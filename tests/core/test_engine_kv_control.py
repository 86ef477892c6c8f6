"""What leaves the KV cache, what must stay, what an operator does to it, and what can be seen of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kv_engine_support import (
    EXACT,
    ask,
    events,
    fix_costs,
    history,
    holders,
    one,
    read,
    request,
    submit,
    tokens,
)

from mullama.engine.engine import Engine
from mullama.errors import InvalidRequest
from mullama.kv.events import KvEventKind, KvTier
from mullama.kv.index.tree import pack

Make = Callable[..., Engine]
Tiny = Callable[..., Path]
TOKEN = 256  # bytes of a token's KV in the tiny llama model


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def test_a_stopped_reply_keeps_the_history_of_its_chat(make_engine: Make) -> None:
    engine = make_engine(parallel=1, ctx_size=1024)
    one(engine, tokens(1, 200))
    (running,) = submit(engine, request("stopped", [*tokens(1, 200), 70, 71], n=700))
    next(running)  # it took the history over in place, and decodes
    running.cancel()
    for _ in running:
        pass
    assert engine.kv.snapshot()["cells_used"] == 0, "its cells are free"
    again = one(engine, [*tokens(1, 200), 72]).profile
    assert (again.kv_cache_source, again.kv_cache_hit) == ("host", 200)


# -- eviction ------------------------------------------------------------------------------------------------------


def test_a_miss_names_the_request_that_needed_the_room(make_engine: Make) -> None:
    engine = make_engine(parallel=1, kv_host_bytes=150 * TOKEN)
    for seed, name in ((1, "alice"), (2, "bob")):
        assert one(engine, tokens(seed, 100), name=name).profile.kv_cache_evict == 0
    carol = one(engine, tokens(3, 100), name="carol").profile
    assert 50 < carol.kv_cache_evict < 107, "bob's 107 tokens pushed some of alice's out"
    left = 107 - carol.kv_cache_evict
    again = one(engine, tokens(1, 100), name="dave").profile
    assert (again.kv_cache_source, again.kv_cache_hit) == ("host", left)
    assert again.kv_miss_reason is not None
    assert again.kv_miss_reason.startswith(f"tokens from {left} on were evicted")
    assert again.kv_miss_reason.endswith("to make room for request carol")
    gone = [event for event in events(engine) if event.kind is KvEventKind.EVICTED and event.gone]
    assert sum(event.end - event.start for event in gone if event.request == "carol") == carol.kv_cache_evict
    totals = engine.kv.snapshot()["totals"]
    assert totals["kv_cache_evict"] == sum(event.end - event.start for event in gone)


def test_without_host_memory_a_slot_is_lost_whole(make_engine: Make) -> None:
    engine = make_engine(parallel=1, kv_host_bytes=0)
    one(engine, tokens(1, 100))
    assert one(engine, tokens(2, 100), name="bob").profile.kv_cache_evict == 107
    reason = one(engine, tokens(1, 100)).profile.kv_miss_reason
    assert reason is not None and reason.endswith("to make room for request bob")


def test_a_miss_does_not_name_another_tenant_s_request(make_engine: Make) -> None:
    engine = make_engine(parallel=1, kv_host_bytes=0)
    prompt = tokens(1, 100)
    reasons = []
    for salt in ("x", "y"):
        one(engine, prompt, cache_salt="x")
        one(engine, tokens(2, 100), name="bob", cache_salt=salt)
        reasons.append(one(engine, prompt, cache_salt="x").profile.kv_miss_reason or "")
    assert reasons[0].endswith("to make room for request bob")
    assert reasons[1].endswith("to make room for another tenant's request") and "bob" not in reasons[1]


def test_a_cache_that_is_shared_by_keys_shows_nobody_s_text(make_engine: Make) -> None:
    """Guessing token by token: each answer says where the prompt left the cached one, none says how that goes on."""
    engine = make_engine(parallel=2)
    secret = [*tokens(1, 40), *b"my secret"]
    one(engine, secret, name="alice", tenant="key-alice", shares_cache=True)
    for n in (40, 42, 45):
        profile = one(engine, [*secret[:n], 97, 97, 97], name="bob", tenant="key-bob", shares_cache=True).profile
        reason = profile.kv_miss_reason
        assert reason is not None and reason.startswith(f"diverges at token {n}: after")
        assert reason.endswith("it goes on with 'aaa', no cached prompt does")
        assert profile.kv_cache_hit == n, "they do share"


def test_of_what_is_longer_than_host_memory_its_beginning_stays(make_engine: Make) -> None:
    engine = make_engine(parallel=1, kv_host_bytes=150 * TOKEN)
    prompt = tokens(1, 300)
    one(engine, prompt, name="long")
    one(engine, tokens(2, 8))  # shorter than what is worth keeping
    again = one(engine, prompt).profile
    assert (again.kv_cache_source, again.kv_cache_hit) == ("host", 128), "whole multiples of 32 of the 150 that fit"
    assert engine.kv.snapshot()["tiers"]["host"]["bytes_used"] <= 150 * TOKEN
    assert engine.kv.audit() == []


def test_a_miss_does_not_name_the_prompt_itself(make_engine: Make) -> None:
    engine = make_engine(parallel=2)
    prompt = tokens(1, 60)
    one(engine, [*prompt, 97, 97])
    reason = one(engine, [*prompt, 98, 98]).profile.kv_miss_reason
    assert reason is not None and reason.startswith("diverges at token 60")
    assert "goes on with 'bb', the cached one with 'aa" in reason
    reason = one(engine, tokens(2, 60)).profile.kv_miss_reason
    assert reason == "no cached prompt begins with its first token"
    past_all = one(engine, [*prompt, 97, 97]).profile
    assert past_all.kv_miss_reason is None, "nothing was missing"


@pytest.mark.parametrize("host", [0, 100 * TOKEN])
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_pinned_stays(make_engine: Make, host: int, whole: bool) -> None:
    engine = make_engine(parallel=2, kv_host_bytes=host)
    fix_costs(engine)
    prompt = tokens(1, 90)
    one(engine, prompt, name="pinned")
    named = history(engine, "pinned") if whole else prompt[:80]
    assert run(engine.kv.apin(named, ttl_s=100)) == {"pinned_tokens": len(named)}
    for seed in (2, 3, 4):
        one(engine, tokens(seed, 70))
    one(engine, [*prompt[:40], *tokens(5, 20)])  # begins like it: must not cut it
    one(engine, tokens(6, 70))
    pinned = [node for node in engine.kv.tree()["nodes"] if node["pinned_s"] > 0]
    assert sum(node["tokens"] for node in pinned) == len(named) and all(node["tiers"] for node in pinned)
    assert one(engine, prompt).profile.kv_cache_hit >= min(len(named), 89)
    assert run(engine.kv.aunpin(named)) == {"unpinned_tokens": len(named)}
    for seed in (7, 8, 9):
        one(engine, tokens(seed, 70))
    assert one(engine, prompt).profile.kv_cache_hit < 80


def test_a_pin_ends(make_engine: Make) -> None:
    engine = make_engine(parallel=1, kv_host_bytes=0)
    one(engine, tokens(1, 90))
    run(engine.kv.apin(tokens(1, 90), ttl_s=1e-6))
    one(engine, tokens(2, 90))
    assert one(engine, tokens(1, 90)).profile.kv_cache_hit == 0
    assert run(engine.kv.apin([97] * 50, ttl_s=5)) == {"pinned_tokens": 0}


def test_pins_do_not_stop_the_engine(make_engine: Make) -> None:
    engine = make_engine(parallel=2, kv_host_bytes=100 * TOKEN)
    for seed in range(8):
        one(engine, tokens(seed, 90))
        run(engine.kv.apin(tokens(seed, 90), ttl_s=100))
        assert engine.kv.audit() == []


POLICY_FILES = {
    "raises": "def score(self, entry, now_ns):\n        return 1 / (entry.start - entry.start)",
    "nonsense": "def score(self, entry, now_ns):\n        return 'first'",
    "evicted": "def score(self, *what):\n        return 1\n    def evicted(self, *what):\n        raise OSError",
}


def test_the_policy_is_changed_while_it_runs(make_engine: Make) -> None:
    """Three prompts' worth of host memory; the one of most hits is the oldest."""
    found = {}
    for name in ("lru", "lfu", "fifo", "turns", "cost"):
        engine = make_engine(parallel=1, kv_host_bytes=240 * TOKEN)
        for _ in range(3):
            one(engine, tokens(1, 100))
        one(engine, tokens(2, 100))
        one(engine, tokens(3, 100))
        assert run(engine.kv.aset_policy(name, None))["policy"] == name
        one(engine, tokens(4, 100))
        found[name] = one(engine, tokens(1, 100)).profile.kv_cache_hit
        assert engine.kv.snapshot()["policy"] == {**run(engine.kv.aset_policy(name, None)), "fallback": None}
    assert found["lfu"] == found["turns"] == 99 and found["lru"] < 99 and found["fifo"] < 99
    with pytest.raises(InvalidRequest, match="lfu"):
        run(engine.kv.aset_policy("lfo", None))
    assert engine.kv.snapshot()["policy"]["policy"] == "cost"


@pytest.mark.parametrize("body", POLICY_FILES.values(), ids=POLICY_FILES)
@pytest.mark.parametrize("live", [True, False])
def test_a_broken_policy_is_replaced_by_lru(make_engine: Make, tmp_path: Path, body: str, live: bool) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"class Mine:\n    name = 'mine'\n    {body}\n")
    spec = f"{file}:Mine"
    engine = make_engine(parallel=1, kv_host_bytes=150 * TOKEN, **EXACT, **({} if live else {"kv_policy": spec}))
    if live:
        run(engine.kv.aset_policy(spec, None))
    first = [one(engine, tokens(seed, 100)).text for seed in range(4)]
    assert [one(engine, tokens(seed, 100)).text for seed in range(4)] == first
    policy = engine.kv.snapshot()["policy"]
    assert policy["policy"] == "lru"
    assert policy["fallback"]["from"] == spec and policy["fallback"]["reason"]


def test_a_token_in_common_changes_nobody_s_turn(make_engine: Make) -> None:
    """Every prompt begins with the same token, as many models want it: the oldest still makes room."""
    engine = make_engine(parallel=2, kv_host_bytes=0)
    fix_costs(engine)
    for seed in (1, 2, 3):
        one(engine, [97, *tokens(seed, 70)])
    assert one(engine, [97, *tokens(2, 70)]).profile.kv_cache_hit == 70
    assert one(engine, [97, *tokens(3, 70)]).profile.kv_cache_hit == 70


# -- dropping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [30, 60, 64, 67])
def test_a_dropped_prefix_is_nowhere(make_engine: Make, n: int) -> None:
    """Wherever it ends: within a stretch, where one ends, in the answer."""
    engine = make_engine(parallel=2, kv_host_bytes=1 << 26)
    for seed in (1, 2, 3, 1):  # in a slot and in host memory, also the first one
        one(engine, tokens(seed, 60), name=f"r{seed}")
    past = history(engine, "r1")
    since = engine.kv.events.last_seq
    dropped = run(engine.kv.adrop(past[:n]))
    assert dropped["cells_freed"] == 67 and dropped["host_bytes_freed"] > 0
    assert engine.kv.audit() == []
    assert all(event.kind is KvEventKind.DROPPED and event.request is None for event in events(engine, since))
    assert one(engine, tokens(1, 60)).profile.kv_cache_hit == (0 if n <= 60 else 59), "all that begins so, and no more"
    assert one(engine, tokens(2, 60)).profile.kv_cache_hit == 59
    assert run(engine.kv.adrop([*past[:n], 97])) == dict.fromkeys(dropped, 0), "nothing begins so"


def test_one_tier_is_dropped(make_engine: Make) -> None:
    engine = make_engine(parallel=2, kv_host_bytes=1 << 26)
    for seed in (1, 2, 3, 1):
        one(engine, tokens(seed, 60))
    assert run(engine.kv.adrop(tiers=["host"]))["cells_freed"] == 0
    assert engine.kv.snapshot()["tiers"]["host"]["bytes_used"] == 0
    assert one(engine, tokens(2, 60)).profile.kv_cache_hit == 0
    assert one(engine, tokens(1, 60)).profile.kv_cache_hit == 59
    for seed in (4, 5):
        one(engine, tokens(seed, 60))
    assert run(engine.kv.adrop(tiers=["device"]))["host_bytes_freed"] == 0
    assert holders(engine) == {}
    assert one(engine, tokens(1, 60)).profile.kv_cache_source == "host"


def test_what_runs_keeps_its_own(make_engine: Make) -> None:
    engine = make_engine(parallel=2, ctx_size=1024, **EXACT)
    expected = one(engine, tokens(1, 60), 600).text
    engine.kv.drop()
    (generation,) = submit(engine, request("r", tokens(1, 60), 600))
    head = next(generation).text
    run(engine.kv.adrop(tokens(1, 60)))
    engine.kv.drop()
    assert engine.kv.audit() == []
    assert head + read(generation).text == expected


def test_everything_is_dropped(make_engine: Make) -> None:
    engine = make_engine(parallel=2, kv_host_bytes=1 << 26)
    for seed in range(5):
        one(engine, tokens(seed % 3, 60) + tokens(seed, 20), cache_salt="x" * (seed % 2))
    run(engine.kv.adrop())
    kv = engine.kv.snapshot()
    assert (kv["cells_used"], kv["tiers"]["host"]["bytes_used"], kv["index"]["nodes"]) == (0, 0, 0)


# -- salts ---------------------------------------------------------------------------------------------------------


def test_salts_share_nothing(make_engine: Make) -> None:
    engine = make_engine(parallel=4, kv_host_bytes=1 << 26, **EXACT)
    prompt = tokens(1, 100)
    together = ask(engine, *(request(f"r{salt}", prompt, cache_salt=salt) for salt in ("", "x", "y")))
    for answer in together:
        assert (answer.profile.kv_cache_hit, answer.profile.kv_cache_source) == (0, "none")
        assert answer.profile.kv_miss_reason == "no cached prompt begins with its first token"
    assert len({answer.text for answer in together}) == 1
    assert [one(engine, prompt, cache_salt=salt).profile.kv_cache_hit for salt in ("x", "", "z")] == [99, 99, 0]
    tree = engine.kv.tree()["nodes"]
    names = {node["namespace"] for node in tree}
    assert len(names) == 4 and "" in names and all(len(name) in (0, 12) for name in names)
    assert run(engine.kv.adrop(namespace="x"))["cells_freed"] > 0
    assert [one(engine, prompt, cache_salt=salt).profile.kv_cache_hit for salt in ("x", "y")] == [0, 99]
    assert run(engine.kv.apin(prompt, ttl_s=9, namespace="nobody")) == {"pinned_tokens": 0}


# -- what can be seen ----------------------------------------------------------------------------------------------


def test_events_tell_what_happens_to_whom(make_engine: Make) -> None:
    engine = make_engine(parallel=2, kv_host_bytes=120 * TOKEN)
    for seed, name in enumerate(("ann", "ben", "cat", "dan")):
        one(engine, tokens(seed, 60), name=name)
    one(engine, tokens(2, 60), name="eve")
    found = events(engine)
    assert [event.seq for event in found] == list(range(1, len(found) + 1))
    assert {event.request for event in found} - {None} == {"ann", "ben", "cat", "dan", "eve"}
    assert [event.time_ns for event in found] == sorted(event.time_ns for event in found)
    stored = [event for event in found if (event.kind, event.tier) == (KvEventKind.STORED, KvTier.DEVICE)]
    assert [(event.request, event.start, event.end) for event in stored] == [
        (name, 0, 67) for name in ("ann", "ben", "cat", "dan", "eve")
    ]
    assert all(event.tokens[:240] == pack(tokens(seed, 60)) for seed, event in enumerate(stored[:4]))
    (reused,) = [event for event in found if event.kind is KvEventKind.REUSED]
    assert (reused.request, reused.start, reused.end) == ("eve", 0, 59)
    saved = [event for event in found if (event.kind, event.tier) == (KvEventKind.STORED, KvTier.HOST)]
    evicted = [event for event in found if event.kind is KvEventKind.EVICTED]
    assert saved[0].request in (None, "cat"), "ann's KV went to host memory for it, or ahead of it for nobody"
    assert "dan" in {event.request for event in saved}, "there was no room to copy ben's ahead"
    assert evicted and all(event.tier is KvTier.HOST for event in evicted)


def test_a_checkpoint_is_its_own_request_s(make_engine: Make, tiny_model: Tiny) -> None:
    """Also when another one came in meanwhile."""
    engine = make_engine(tiny_model("mamba"), parallel=2, kv_host_bytes=1 << 26)
    ask(engine, *(request(f"r{seed}", tokens(seed, 200)) for seed in range(2)))
    saved = [event for event in events(engine) if event.tier is KvTier.HOST]
    assert sorted((event.request, event.end) for event in saved) == [("r0", 199), ("r1", 199)]
    assert all(event.tokens == pack(tokens(int(str(event.request)[1:]), 199)) for event in saved)


@pytest.mark.parametrize("layout", ["streams", "unified"])
def test_map_tree_and_snapshot_agree(make_engine: Make, layout: str) -> None:
    engine = make_engine(parallel=3, kv_layout=layout, kv_host_bytes=1 << 26)
    for seed in (1, 2, 3, 4, 1):
        one(engine, tokens(seed % 2, 40) + tokens(seed, 40))
    kv, tree, cells = engine.kv.snapshot(), engine.kv.tree(), engine.kv.map()
    streams = cells["caches"][0]["streams"]
    assert sum(stream["cells"] for stream in streams) == kv["cells_total"]
    for stream in streams:
        assert [run[0] for run in stream["runs"]] == [
            sum(run[1] for run in stream["runs"][:i]) for i in range(len(stream["runs"]))
        ]
    used = sum(n for stream in streams for _, n, owner in stream["runs"] if owner >= 0)
    assert used == kv["cells_used"]
    held = {row["slot"]: row["cells"] for row in kv["slots"]}
    for slot, n in held.items():
        assert sum(node["tokens"] for node in tree["nodes"] if slot in node["slots"]) == n
    assert kv["tiers"]["host"]["bytes_used"] == sum(node["host_bytes"] for node in tree["nodes"])
    assert kv["tiers"]["host"]["tokens"] == sum(node["tokens"] for node in tree["nodes"] if "host" in node["tiers"])
    seen: set[int | None] = {None}
    for node in tree["nodes"]:
        assert node["parent"] in seen
        seen.add(node["id"])
    assert engine.kv.tree(limit=2)["truncated"]


def test_the_profile_says_what_kv_it_took(make_engine: Make) -> None:
    engine = make_engine(parallel=2)
    profile = one(engine, tokens(1, 100), 50).profile
    assert profile.kv_bytes == (100 + 50 - 1) * TOKEN
    assert 0 < profile.kv_byte_seconds <= profile.kv_bytes * profile.total_ms / 1e3
    longer = one(engine, tokens(2, 100), 300).profile
    assert longer.kv_byte_seconds > profile.kv_byte_seconds


# -- anything, in any order ----------------------------------------------------------------------------------------

numbers = st.integers(0, 7)
lengths = st.integers(1, 120)
actions = st.one_of(
    st.tuples(st.just("submit"), numbers, lengths),
    st.tuples(st.just("submit"), numbers, lengths),
    st.tuples(st.just("cancel"), numbers, st.just(0)),
    st.tuples(st.just("finish"), numbers, st.just(0)),
    st.tuples(st.just("drop"), numbers, st.integers(0, 120)),
    st.tuples(st.just("pin"), numbers, lengths),
    st.tuples(st.just("policy"), numbers, st.just(0)),
)


@pytest.fixture
def pair(make_engine: Make) -> tuple[Engine, Engine, dict[bytes, str]]:
    """An engine that all examples share (what one leaves behind, the next one finds), and one that computes cold."""
    engine = make_engine(parallel=2, kv_host_bytes=150 * TOKEN, kv_tokens=400, **EXACT)
    return engine, make_engine(parallel=1, kv_host_bytes=0, **EXACT), {}


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(actions, min_size=4, max_size=24))
@example([("submit", 1, 100), ("pin", 1, 50), ("submit", 4, 60), ("drop", 1, 30), ("cancel", 0, 0), ("submit", 1, 90)])
def test_the_books_are_right_whatever_happens(
    pair: tuple[Engine, Engine, dict[bytes, str]], steps: list[tuple[str, int, int]]
) -> None:
    engine, cold, expected = pair
    live: list[tuple[list[int], Any]] = []

    def prompt(number: int, n: int) -> list[int]:
        return [*tokens(number % 3, n), 97 + number]

    for what, number, n in steps:
        if what == "submit":
            live.append((prompt(number, n), engine.submit_sync(request(f"r{number}", prompt(number, n), 20))))
        elif what == "cancel" and live:
            _, generation = live.pop(number % len(live))
            generation.cancel()
            list(generation)
        elif what == "finish" and live:
            _finish(live.pop(number % len(live)), cold, expected)
        elif what == "drop":
            run(engine.kv.adrop(tokens(number % 3, n) if n else None, tiers=("host", "device")[: number % 3]))
        elif what == "pin":
            run(engine.kv.apin(tokens(number % 3, n), ttl_s=(0.0, 50.0)[number % 2]))
        elif what == "policy":
            run(engine.kv.aset_policy(("lru", "lfu", "fifo", "cost")[number % 4], None))
        assert engine.kv.audit() == []
    while live:
        _finish(live.pop(), cold, expected)
    run(engine.kv.adrop())
    kv = engine.kv.snapshot()
    assert (kv["cells_used"], kv["tiers"]["host"]["bytes_used"], kv["index"]["nodes"], kv["audit"]) == (0, 0, 0, [])
    assert engine.counters()["failed"] == 0


def _finish(one_live: tuple[list[int], Any], cold: Engine, expected: dict[bytes, str]) -> None:
    prompt, generation = one_live
    key = pack(prompt)
    if key not in expected:
        cold.kv.drop()
        expected[key] = one(cold, prompt, 20).text
    assert read(generation).text == expected[key]
