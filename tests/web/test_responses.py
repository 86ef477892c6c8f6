"""``/v1/responses``: bodies, answers, events in their order, and what is kept for whom."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from mullama.config import ServeConfig
from mullama.errors import ComputeFailed, ResponseNotFound
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.responses.response_store import OVERHEAD, ResponseStore, Stored
from mullama.web.services import Services

from .conftest import Client, Live
from .fake_engine import N_CTX, FakeEngine

URL = "/v1/responses"
BODY = {"model": "fake", "input": "Hi"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each checked: the type that it says, the next number, and what OpenAI's client parses."""
    found: list[dict[str, Any]] = []
    for block in data.decode().split("\n\n")[:-1]:
        kind, line = [one for one in block.split("\n") if not one.startswith(":")]
        fields = json.loads(line.removeprefix("data: "))
        assert kind == f"event: {fields['type']}"
        assert fields["sequence_number"] == len(found)
        assert type(EVENT.validate_python(fields)).__name__ != "dict"
        found.append(fields)
    return found


def check_order(found: list[dict[str, Any]], response: dict[str, Any]) -> str:
    """OpenAI's order of the events of one text, whose parts, ``done`` and end say the same; returns it."""
    kinds = [one["type"].removeprefix("response.") for one in found]
    n = len(found) - 8
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[4 : 4 + n] == ["output_text.delta"] * n
    assert kinds[4 + n :] == ["output_text.done", "content_part.done", "output_item.done", response["status"]]
    text = "".join(one["delta"] for one in found[4 : 4 + n])
    (item,) = response["output"]
    assert found[-4]["text"] == found[-3]["part"]["text"] == item["content"][0]["text"] == text
    assert found[-2]["item"] == item
    assert {one.get("item_id", item["id"]) for one in found} == {item["id"]}
    assert {one["response"]["id"] for one in found if "response" in one} == {response["id"]}
    return text


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def test_a_response(client: Client, engine: FakeEngine) -> None:
    engine.cached = 3
    fields = {"temperature": 0.5, "metadata": {"a": "b"}, "prompt_cache_key": "k", "instructions": "Be brief."}
    answer = client.post(URL, BODY | fields).json
    parsed = Response.model_validate(answer)
    assert parsed.output_text == "Hello wörld!"
    assert answer["id"].startswith("resp_")
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    assert {name: answer[name] for name in fields} == fields
    n = len("<system>Be brief.<user>Hi<assistant>") + 1
    assert answer["usage"] == {
        "input_tokens": n,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": n + 4,
    }
    assert engine.rendered == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_a_stream_says_the_same(client: Client) -> None:
    whole = client.post(URL, BODY).json
    result = client.post(URL, BODY | {"stream": True})
    assert result.headers["content-type"].startswith("text/event-stream")
    found = events(result.body)
    last = found[-1]["response"]
    assert check_order(found, last) == text_of(whole)
    volatile = ("id", "created_at", "completed_at", "output")
    assert {k: v for k, v in last.items() if k not in volatile} == {k: v for k, v in whole.items() if k not in volatile}
    assert found[0]["response"]["status"] == "in_progress"


def test_a_cut_answer_is_incomplete(client: Client, engine: FakeEngine) -> None:
    whole = client.post(URL, BODY | {"max_output_tokens": 2}).json
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][0]["status"] == "incomplete"
    assert engine.requests[-1].sampling.max_tokens == 2
    found = events(client.post(URL, BODY | {"max_output_tokens": 2, "stream": True}).body)
    assert check_order(found, found[-1]["response"]) == text_of(whole)


@given(
    pieces=st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=1, max_size=12), direct=st.booleans()
)
@settings(max_examples=25, deadline=None)
def test_events_are_in_order_however_the_text_comes(pieces: list[str], direct: bool) -> None:
    engine, config = FakeEngine(reply=pieces), ServeConfig()
    services = Services(config, ModelManager([("fake", engine)]))
    client = Client(create_app(config, services.models, services), services)
    found = events(client.post(URL, BODY | {"stream": True}).body)
    assert check_order(found, found[-1]["response"]) == "".join(pieces)
    kept = client.get(f"{URL}/{found[-1]['response']['id']}").json
    assert kept == found[-1]["response"]
    services.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_stream_over_a_socket(engine: FakeEngine, live: Callable[..., Live], direct: bool) -> None:
    engine.delay, engine.reply = 0.002, [f"{i} " for i in range(60)]
    server = live(direct=direct)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("POST", URL, json.dumps(BODY | {"stream": True}))
    found = events(connection.getresponse().read())
    assert check_order(found, found[-1]["response"]) == "".join(engine.reply)
    connection.close()


def test_the_id_is_there_before_the_first_token(engine: FakeEngine, live: Callable[..., Live]) -> None:
    engine.first_delay = 30
    server = live()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("POST", URL, json.dumps(BODY | {"stream": True}))
    reply = connection.getresponse()
    assert reply.readline() == b"event: response.created\n"
    connection.close()


@pytest.mark.parametrize("n", [0, 2])
def test_what_fails_in_a_stream_ends_it(client: Client, engine: FakeEngine, n: int) -> None:
    engine.delay, engine.fail_after, engine.failure = 0.01, n, ComputeFailed("the logits are not finite")
    found = events(client.post(URL, BODY | {"stream": True}).body)
    assert found[-1]["type"] == "response.failed"
    assert found[-1]["response"]["status"] == "failed"
    assert found[-1]["response"]["error"]["message"]
    assert client.post(URL, BODY).status == 500


# -- items


def test_items_become_messages(client: Client, engine: FakeEngine) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "role": "assistant",
            "phase": "commentary",
            "content": [{"type": "output_text", "text": "c", "annotations": []}],
        },
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "call_2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "1"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "2"}]},
    ]
    assert client.post(URL, {"input": items}).status == 200
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for i, name in ((1, "f"), (2, "g"))
    ]
    assert engine.rendered == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "call_1", "name": "f"},
        {"role": "tool", "content": "2", "tool_call_id": "call_2", "name": "g"},
    ]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"n": 2}, "n"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "store": False}, "store"),
        ({"truncation": "some"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"samplers": ["top_k"]}, "samplers"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"model": "none"}, "model"),
    ],
)
def test_what_is_wrong_is_named(client: Client, body: dict[str, Any], param: str) -> None:
    asked = body if "input" in body or not body else BODY | body
    reply = client.post(URL, asked)
    assert (reply.status // 100, reply.error["param"]) == (4, param)


def test_a_long_conversation_is_cut_only_where_it_may_be(client: Client, engine: FakeEngine) -> None:
    turns = [{"role": "user", "content": "x" * (N_CTX // 3)} for _ in range(5)]
    refused = client.post(URL, {"input": turns})
    assert (refused.status, refused.error["param"]) == (400, "input")
    answer = client.post(URL, {"input": turns, "truncation": "auto", "max_output_tokens": 5}).json
    assert answer["context"]["dropped_messages"] > 0
    assert len(engine.requests[-1].prompt) < N_CTX


# -- what is kept


def ask(client: Client, **fields: Any) -> dict[str, Any]:
    reply = client.post(URL, BODY | fields)
    assert reply.status == 200, reply.body
    answer: dict[str, Any] = reply.json
    return answer


def test_an_answer_is_gone_on_with(client: Client, engine: FakeEngine) -> None:
    first = ask(client, instructions="Only now.")
    second = ask(client, input="And?", previous_response_id=first["id"])
    ask(client, input=[{"role": "user", "content": "Well?"}], previous_response_id=second["id"])
    assert [(one["role"], one["content"]) for one in engine.rendered] == [
        ("user", "Hi"),
        ("assistant", "Hello wörld!"),
        ("user", "And?"),
        ("assistant", "Hello wörld!"),
        ("user", "Well?"),
    ]
    items = client.get(f"{URL}/{second['id']}/input_items", query="order=asc").json
    assert [one["content"][0]["text"] for one in items["data"]] == ["Hi", "Hello wörld!", "And?"]
    ids = [one["id"] for one in items["data"]]
    page = client.get(f"{URL}/{second['id']}/input_items", query=f"order=asc&limit=1&after={ids[0]}").json
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([ids[1]], True)
    assert client.get(f"{URL}/{second['id']}/input_items").json["first_id"] == ids[2]
    assert client.get(f"{URL}/{second['id']}/input_items", query="after=nothing").status == 400


def test_what_is_not_stored_or_was_deleted_is_not_there(client: Client) -> None:
    unstored = ask(client, store=False)
    assert unstored["store"] is False
    assert client.get(f"{URL}/{unstored['id']}").status == 404
    kept = ask(client)
    assert client.get(f"{URL}/{kept['id']}").json == kept
    assert client.request("DELETE", f"{URL}/{kept['id']}", b"", {}).json["deleted"] is True
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        assert client.request(method, f"{URL}/{kept['id']}{path}", b"", {}).status == 404
    refused = client.post(URL, BODY | {"previous_response_id": kept["id"]})
    assert (refused.status, refused.error["code"]) == (404, "response_not_found")


def test_a_tenant_sees_none_of_another_s(engine: FakeEngine) -> None:
    config = ServeConfig(api_key=["one", "two"])
    services = Services(config, ModelManager([("fake", engine)]))
    client = Client(create_app(config, services.models, services), services)
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    kept = client.post(URL, BODY, headers=one).json
    assert client.get(f"{URL}/{kept['id']}", headers=one).status == 200
    assert client.get(f"{URL}/{kept['id']}", headers=two).status == 404
    assert client.post(URL, BODY | {"previous_response_id": kept["id"]}, headers=two).status == 404
    assert client.request("DELETE", f"{URL}/{kept['id']}", b"", two).status == 404
    services.close()


def test_in_the_background(engine: FakeEngine, live: Callable[..., Live]) -> None:
    engine.first_delay = 0.2
    port = live().port

    def call(method: str, path: str = "", body: Any = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(method, URL + path, None if body is None else json.dumps(body))
        reply = connection.getresponse()
        found: dict[str, Any] = json.loads(reply.read()) | {"http": reply.status}
        connection.close()
        return found

    begun = call("POST", body=BODY | {"background": True})
    assert (begun["status"], begun["output"]) == ("in_progress", [])
    while (found := call("GET", f"/{begun['id']}"))["status"] == "in_progress":
        pass
    assert (found["status"], text_of(found)) == ("completed", "Hello wörld!")
    assert call("POST", f"/{begun['id']}/cancel")["status"] == "completed"  # it had ended

    engine.first_delay = 60
    begun = call("POST", body=BODY | {"background": True})
    assert call("POST", f"/{begun['id']}/cancel")["status"] == "cancelled"
    while (found := call("GET", f"/{begun['id']}"))["status"] == "in_progress":
        pass
    assert found["status"] == "cancelled"
    assert engine.running == set()
    engine.first_delay, engine.fail_after, engine.failure = 0, 1, ComputeFailed("not finite")
    begun = call("POST", body=BODY | {"background": True})
    while (found := call("GET", f"/{begun['id']}"))["status"] == "in_progress":
        pass
    assert (found["status"], found["error"]["message"]) == ("failed", "not finite")
    engine.fail_after = None
    assert call("POST", f"/{call('POST', body=BODY)['id']}/cancel")["http"] == 400


def test_what_runs_in_the_background_counts_for_its_key(
    engine: FakeEngine, config: ServeConfig, live: Callable[..., Live], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[[key]]\nname = "ann"\nkey = "ann-has-a-long-key"\nconcurrent = 1\n')
    keys.chmod(0o600)
    config.key_file = str(keys)
    engine.hang = True
    client = openai.OpenAI(base_url=f"{live().url}/v1", api_key="ann-has-a-long-key", max_retries=0)
    begun = client.responses.create(**BODY, background=True)
    with pytest.raises(openai.RateLimitError):
        client.responses.create(**BODY)
    assert client.responses.cancel(begun.id).status == "cancelled"
    while client.responses.retrieve(begun.id).status != "cancelled" or engine.running:
        pass
    engine.hang = False
    assert client.responses.create(**BODY).output_text == "Hello wörld!"


def test_a_server_may_keep_nothing(engine: FakeEngine) -> None:
    config = ServeConfig(response_store_bytes=0)
    services = Services(config, ModelManager([("fake", engine)]))
    client = Client(create_app(config, services.models, services), services)
    assert ask(client)["store"] is False
    assert client.post(URL, BODY | {"background": True}).error["param"] == "background"
    services.close()


def test_tokens_are_counted_without_an_answer(client: Client, engine: FakeEngine) -> None:
    first = ask(client)
    answer = client.post(f"{URL}/input_tokens", BODY | {"previous_response_id": first["id"]}).json
    assert answer == {
        "object": "response.input_tokens",
        "input_tokens": 1 + len("<user>Hi<assistant>Hello wörld!<user>Hi<assistant>"),
    }
    assert len(engine.requests) == 1


# -- the store


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def stored(name: str, tenant: str | None = None, size: int = 100, previous: str | None = None) -> Stored:
    return Stored(name, tenant, previous, b"[]", b"x" * (size - 2), "completed")


def test_the_store_keeps_its_bounds_and_nobody_pushes_others_out() -> None:
    store = ResponseStore(10 * (OVERHEAD + 100), 60.0)
    store.put(stored("mine", "small"))
    for i in range(200):
        store.put(stored(f"r{i}", "large"))
        assert store.n_bytes <= store.max_bytes
    assert len(store) == 10
    assert store.get("mine", "small").id == "mine"
    assert store.get("r199", "large")
    with pytest.raises(ResponseNotFound):
        store.get("r100", "large")
    store.put(stored("huge", "small", size=store.max_bytes))
    with pytest.raises(ResponseNotFound):
        store.get("huge", "small")
    assert len(store) == 10


def test_answers_go_when_their_time_is_over() -> None:
    clock = Clock()
    store = ResponseStore(1 << 20, 60.0, clock)
    store.put(stored("a"))
    store.put(stored("b", previous="a"))
    clock.now = 59
    assert [one.id for one in store.chain("b", None)] == ["a", "b"]
    clock.now = 60
    with pytest.raises(ResponseNotFound, match="previous_response_id"):
        store.chain("b", None)
    with pytest.raises(ResponseNotFound):
        store.get("a", None)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "delete"]),
            st.sampled_from("abcdef"),
            st.sampled_from("xy"),
            st.integers(10, 900),
        )
    )
)
def test_the_store_counts_what_it_holds(steps: list[tuple[str, str, str, int]]) -> None:
    store = ResponseStore(3000, 60.0)
    for step, name, tenant, size in steps:
        try:
            if step == "put":
                store.put(stored(name, tenant, size))
            elif step == "get":
                assert store.get(name, tenant).tenant == tenant
            else:
                store.delete(name, tenant)
        except ResponseNotFound:
            pass
        held = [one for mine in store._of.values() for one in mine.values()]
        assert store.n_bytes == sum(one.n_bytes for one in held) <= 3000
        assert len(store) == len(held)
