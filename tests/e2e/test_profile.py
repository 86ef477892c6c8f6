"""X-Profile, prefix reuse as the profile shows it, and the profile log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .support import CHAT, COMPLETIONS, NAME, PROFILE_FIELDS, ServerProcess, connect, events_of, text_of, wait_until

WITH = {"X-Profile": "true"}
ASK: list[dict[str, str]] = [{"role": "user", "content": "Name a colour."}]


def check_profile(profile: dict[str, Any], *, tokens: int) -> None:
    """All fields, and the relations between them that hold on any machine."""
    assert profile.keys() >= PROFILE_FIELDS
    assert profile["completion_tokens"] == tokens
    assert profile["kv_cache_hit"] + profile["kv_cache_miss"] == profile["prompt_tokens"] > 0
    assert profile["kv_cache_miss"] > 0, "the last prompt token is always computed"
    assert profile["kv_cache_evict"] >= 0
    assert 0 <= profile["queue_ms"] < profile["time_to_first_token_ms"] <= profile["total_ms"]
    assert profile["prefill_ms"] > 0
    assert profile["sample_ms"] > 0
    assert profile["prefill_ms"] + profile["decode_ms"] + profile["sample_ms"] <= profile["total_ms"] + 1
    # The first token comes out of the prefill.
    assert profile["steps"] >= tokens
    assert profile["mean_batch_size"] >= 1


def test_a_whole_answer(server: ServerProcess) -> None:
    for path, body in ((CHAT, {"messages": ASK}), (COMPLETIONS, {"prompt": "Red, green,"})):
        reply = server.post(path, {**body, "max_tokens": 8, "temperature": 0}, headers=WITH).json()
        check_profile(reply["profile"], tokens=8)
        usage = reply["usage"]
        assert usage["prompt_tokens"] == reply["profile"]["prompt_tokens"]
        assert usage["completion_tokens"] == 8
        assert usage["prompt_tokens_details"]["cached_tokens"] == reply["profile"]["kv_cache_hit"]
        assert reply["profile"]["mean_batch_size"] == 1, "it ran alone"


def test_nobody_else_gets_one(server: ServerProcess) -> None:
    body = {"messages": ASK, "max_tokens": 2}
    for headers in ({}, {"X-Profile": "false"}):
        assert "profile" not in server.post(CHAT, body, headers=headers).json()
    assert b"profile" not in server.post(CHAT, {**body, "stream": True}).content


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("with_usage", [False, True])
def test_a_stream(server: ServerProcess, path: str, with_usage: bool) -> None:
    body = {"messages": ASK} if path == CHAT else {"prompt": "Red, green,"}
    body |= {"max_tokens": 8, "temperature": 0, "stream": True, "stream_options": {"include_usage": with_usage}}
    plain = events_of(server.post(path, body).content)
    events = events_of(server.post(path, body, headers=WITH).content)
    assert events[-1] == plain[-1] == "[DONE]"
    carriers = [event for event in events[:-1] if "profile" in event]
    assert carriers == [events[-2]], "one chunk carries it, the last one"
    check_profile(carriers[0]["profile"], tokens=8)
    if with_usage:
        assert carriers[0]["choices"] == [] and carriers[0]["usage"]["completion_tokens"] == 8
    else:
        assert carriers[0]["choices"][0]["finish_reason"] == "length"
    # Never an extra chunk: without text, a stream has as many chunks with a profile as without.
    assert bare(events) == bare(plain)


def bare(events: list[Any]) -> list[str]:
    """The kinds of the chunks that are no text (how text is cut into chunks is a matter of time)."""
    kinds = []
    for event in events[:-1]:
        choice = event["choices"][0] if event["choices"] else None
        if choice is None:
            kinds.append("usage")
        elif choice["finish_reason"]:
            kinds.append("finish")
    return kinds


def test_several_choices(server: ServerProcess) -> None:
    reply = server.complete("Red, green,", n=3, max_tokens=4)
    assert len(reply["profiles"]) == 3
    for profile in reply["profiles"]:
        check_profile(profile, tokens=4)
    assert reply["profile"]["completion_tokens"] == 12
    assert reply["profile"]["kv_cache_hit"] + reply["profile"]["kv_cache_miss"] == reply["profile"]["prompt_tokens"]


def test_the_second_turn_continues_in_place(server: ServerProcess) -> None:
    server.drop_kv()
    first = server.chat(ASK, max_tokens=4)
    assert first["profile"]["kv_cache_hit"] == 0
    answer = first["choices"][0]["message"]
    turns = [*ASK, {"role": answer["role"], "content": answer["content"]}, {"role": "user", "content": "And?"}]
    second = server.chat(turns, max_tokens=12)
    hit = second["profile"]["kv_cache_hit"]
    assert hit >= first["profile"]["prompt_tokens"], "the whole first prompt is reused"
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == hit

    assert server.drop_kv() > 0
    assert server.kv()["cells_used"] == 0
    fresh = server.chat(turns, max_tokens=12)
    assert fresh["profile"]["kv_cache_hit"] == 0
    assert fresh["profile"]["kv_cache_miss"] == second["profile"]["prompt_tokens"]
    assert fresh["choices"] == second["choices"], "what was reused and what is computed give the same text"


def test_a_long_prefix_is_reused_and_another_prompt_does_not_share_it(server: ServerProcess) -> None:
    server.drop_kv()
    text = " ".join(f"item {i}" for i in range(150))
    first = server.complete(text, max_tokens=2)["profile"]
    assert first["prompt_tokens"] > 300
    longer = server.complete(text + " and then", max_tokens=2)["profile"]
    assert longer["kv_cache_hit"] >= first["prompt_tokens"] - 1
    other = server.complete("Something else altogether", max_tokens=2)["profile"]
    assert other["kv_cache_hit"] == 0
    again = server.complete(text, max_tokens=2)["profile"]
    assert again["kv_cache_hit"] == again["prompt_tokens"] - 1
    server.assert_kv_sound()


def test_eviction_is_counted(start: Callable[..., ServerProcess]) -> None:
    running = start("--parallel", "1", "--ctx-size", "256")
    first = running.complete("The first of two prompts that cannot both stay", max_tokens=4)
    cells = running.assert_kv_sound()["cells_used"]
    assert cells >= first["profile"]["prompt_tokens"]
    second = running.complete("Another one", max_tokens=4)
    assert second["profile"]["kv_cache_evict"] == cells
    assert second["profile"]["kv_cache_hit"] == 0


def test_the_profile_log(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    file = tmp_path / "profiles.jsonl"
    running = start("--profile-log", str(file), "--parallel", "2", "--ctx-size", "1024")
    whole = running.complete("Red, green,", max_tokens=4, user="ann")
    chat = events_of(running.post(CHAT, {"messages": ASK, "max_tokens": 3, "stream": True}).content)
    both = running.complete("Red, green,", n=2, max_tokens=2)
    with connect(running) as raw:
        raw.send(COMPLETIONS, {"prompt": "Once", "stream": True, "ignore_eos": True})
        raw.head()
        raw.chunk()
    running.wait_idle()
    running.post(CHAT, {"messages": []})  # refused: no sequence, no profile

    lines = wait_until(lambda: (found := file.read_text().splitlines()) and len(found) == 5 and found)
    records = [json.loads(line) for line in lines]
    assert all(record.keys() >= PROFILE_FIELDS and record["model"] == NAME for record in records)
    assert [record["finish_reason"] for record in records] == ["length"] * 4 + ["cancelled"]
    assert [record["completion_tokens"] for record in records[:4]] == [4, 3, 2, 2]
    assert records[0]["id"] == whole["id"] and records[0]["user"] == "ann"
    assert (records[0]["endpoint"], records[0]["stream"]) == ("completions", False)
    assert (records[1]["endpoint"], records[1]["stream"]) == ("chat.completions", True)
    assert records[1]["id"] == chat[0]["id"] and text_of(chat)
    assert {record["id"] for record in records[2:4]} == {f"{both['id']}-0", f"{both['id']}-1"}
    assert {k: records[0][k] for k in whole["profile"]} == whole["profile"], "the log and the answer say the same"
    assert records[4]["completion_tokens"] > 0
