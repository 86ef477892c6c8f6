"""Chats of very many messages: cut in a time that grows with them, given up with their client, and with the server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from .support import CHAT, Raw, ServerProcess


def letters(n: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": "ab"[i % 2]} for i in range(n - 1)] + [
        {"role": "user", "content": "Say one word."}
    ]


def head_of(body: bytes) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
        CHAT.encode(),
        len(body),
    )


def test_a_chat_of_many_messages_is_cut(start: Callable[..., ServerProcess]) -> None:
    server = start("--ctx-size", "512", "--parallel", "2")
    for n in (3001, 20_001):
        for policy in ("truncate_left", "truncate_middle"):
            answer = server.chat(letters(n), context_policy=policy, max_tokens=4)
            context = answer["context"]
            assert context["prompt_tokens"] < 512 and context["prompt_tokens_before"] > 5 * n
            assert answer["usage"]["prompt_tokens"] == context["prompt_tokens"]
    refused = server.post(CHAT, {"messages": letters(20_001)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    server.assert_serving()


def test_clients_that_left_hold_nobody_up_and_not_the_end(spawn: Callable[..., ServerProcess]) -> None:
    """What they asked for would take the threads of the texts for minutes."""
    server = spawn("--ctx-size", "512", "--parallel", "2")
    body = json.dumps({"messages": letters(100_001), "context_policy": "truncate_left"}).encode()
    for _ in range(4):
        connection = Raw(server.port)
        connection.sock.sendall(head_of(body) + body)
        connection.file.close()
        connection.sock.close()
    long = [{"role": "user", "content": "word " * 2000}, {"role": "user", "content": "Say one word."}]
    answer = server.chat(long, context_policy="truncate_left", max_tokens=4)
    assert answer["usage"]["completion_tokens"] > 0
    connection = Raw(server.port)
    connection.sock.sendall(head_of(body) + body)
    time.sleep(0.2)
    assert server.terminate() == 0, server.stderr
    connection.file.close()
    connection.sock.close()
    assert "Traceback" not in server.stderr
    assert [line for line in server.stderr.splitlines() if " WARNING " in line or " ERROR " in line] == []
