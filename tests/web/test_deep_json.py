"""Bodies that are nested thousands of times: 400, whatever the route and the place."""

from __future__ import annotations

import pytest

from .conftest import Client

ROUTES = ("/v1/chat/completions", "/v1/completions", "/internal/kv/pin", "/internal/kv/drop", "/internal/kv/save")
DEPTHS = (600, 5_000, 100_000)


def deep(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * depth + (b"" if opening == b"[" else b"1") + closing * depth


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_body_that_is_nothing_but_nested(client: Client, route: str, depth: int) -> None:
    for body in (deep(depth), deep(depth, b'{"a":', b"}")):
        result = client.post(route, body)
        assert result.status == 400, result
        assert result.error["type"] == "invalid_request_error" and len(result.error["message"]) < 300


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    "frame",
    [
        b'{"messages": %b}',
        b'{"messages": [{"role": "user", "content": %b}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "stop": %b}',
        b'{"messages": [{"role": "user", "content": "hi"}], "logit_bias": %b}',
    ],
)
def test_a_field_that_is_nested(client: Client, frame: bytes, depth: int) -> None:
    for value in (deep(depth), deep(depth, b'{"a":', b"}")):
        assert client.post("/v1/chat/completions", frame % value).status == 400


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("field", ["metadata", "of_nobody"])
def test_an_ignored_field_that_is_nested(client: Client, field: str, depth: int) -> None:
    """It is not looked into, or refused: the server goes on either way."""
    frame = b'{"messages": [{"role": "user", "content": "hi"}], "%b": %b}'
    for value in (deep(depth), deep(depth, b'{"a":', b"}")):
        assert client.post("/v1/chat/completions", frame % (field.encode(), value)).status in (200, 400)
    assert client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}).status == 200
