"""The official ``openai`` client on ``/v1/responses``, ``/v1/files`` and ``/v1/batches`` of a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from .support import CHAT, NAME, ServerProcess, run_mullama, wait_until

GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


def lines(n: int, max_tokens: int) -> bytes:
    body = {**GREEDY, "max_tokens": max_tokens, "ignore_eos": True}
    requests = [
        {
            "custom_id": f"n{i}",
            "method": "POST",
            "url": CHAT,
            "body": body | {"messages": [{"role": "user", "content": f"Tell me about the number {i}."}]},
        }
        for i in range(n)
    ]
    return "\n".join(map(json.dumps, requests)).encode()


def test_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(**GREEDY, input="Name a fruit.", max_output_tokens=8)
    assert first.output_text and first.usage is not None and first.usage.output_tokens <= 8
    whole = client.responses.create(**GREEDY, input="Another.", previous_response_id=first.id, max_output_tokens=12)
    events = list(
        client.responses.create(
            **GREEDY, input="Another.", previous_response_id=first.id, max_output_tokens=12, stream=True
        )
    )
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert whole.usage is not None and whole.usage.input_tokens_details.cached_tokens > 0  # what led to it is cached
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert len(list(client.responses.input_items.list(whole.id))) == 3
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError as error:
        assert error.code == "response_not_found"
    else:
        raise AssertionError("it is still there")


def test_a_response_in_the_background_is_cancelled(client: openai.OpenAI) -> None:
    fields: Any = {"extra_body": {"ignore_eos": True}}
    begun = client.responses.create(**GREEDY, input="Count.", background=True, max_output_tokens=1500, **fields)
    assert client.responses.cancel(begun.id).status == "cancelled"
    wait_until(lambda: client.responses.retrieve(begun.id).status == "cancelled")


def test_a_batch_goes_on_after_a_restart(spawn: Callable[..., ServerProcess], tmp_path: Path) -> None:
    options = ["--files-dir", str(tmp_path / "files"), "--parallel", "2", "--ctx-size", "512", "--drain-timeout", "1"]
    server = spawn(*options)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    file = client.files.create(file=("in.jsonl", lines(12, 24)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

    def completed() -> int:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts.completed if counts is not None else 0

    wait_until(lambda: completed() >= 2, 60)
    server.kill()  # not even a signal that it could answer
    server = spawn(*options)
    out = tmp_path / "out.jsonl"
    done = run_mullama("batch", batch.id, "-o", str(out), "--json", "--url", server.url, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert {one["custom_id"] for one in answers} == {f"n{i}" for i in range(12)} and len(answers) == 12
    assert all(one["response"]["body"]["usage"]["completion_tokens"] == 24 for one in answers)
    assert server.terminate() == 0
