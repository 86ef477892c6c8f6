"""Requests that are nearly right: valid ones for every route, with something about them changed at random."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
GENERATION: dict[str, Any] = {
    "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "n": 1, "stop": ["x"], "user": "u",
    "logit_bias": {"5": 1}, "presence_penalty": 0.1, "dry_multiplier": 0.5, "dry_sequence_breakers": ["\n"],
    "stream": False, "priority": 1, "slo_ms": 500, "preempt": "auto", "cache_salt": "s", "keep_alive": -1,
    "context_policy": "truncate_left", "min_p": 0.1, "mirostat": 0, "ignore_eos": False, "min_tokens": 0,
}  # fmt: skip

#: (method, path, query, body): each is answered with 2xx, or refused for what the server is not in a state to do.
VALID: list[tuple[str, str, str, Any]] = [
    ("POST", "/v1/chat/completions", "", {"messages": MESSAGES, **GENERATION}),
    ("POST", "/v1/chat/completions", "", {"messages": MESSAGES, "max_tokens": 2, "stream": True}),
    ("POST", "/v1/completions", "", {"prompt": "Hello", **GENERATION}),
    ("POST", "/v1/completions", "", {"prompt": [[5, 6], [7]], "max_tokens": 1, "echo": True}),
    ("GET", "/v1/models", "", None),
    ("GET", "/v1/models/{model}", "", None),
    ("POST", "/chat/completions", "", {"messages": MESSAGES, "max_tokens": 1}),
    ("GET", "/models", "", None),
    ("POST", "/tokenize", "", {"content": ["a", 7, "b"], "add_special": True, "with_pieces": True}),
    ("POST", "/v1/tokenize", "", {"messages": MESSAGES, "add_generation_prompt": False, "return_token_strs": True}),
    ("POST", "/detokenize", "", {"tokens": [5, 6]}),
    ("POST", "/v1/detokenize", "", {"tokens": [5, 6]}),
    ("POST", "/apply-template", "", {"messages": MESSAGES}),
    ("POST", "/v1/messages", "", {"messages": [MESSAGES[1]], "system": "Be brief.", "max_tokens": 2, "top_k": 3}),
    ("POST", "/v1/messages", "", {"messages": [MESSAGES[1]], "max_tokens": 2, "stream": True}),
    ("POST", "/v1/messages/count_tokens", "", {"messages": [MESSAGES[1]]}),
    ("POST", "/api/chat", "", {"model": "{model}", "messages": MESSAGES, "options": {"num_predict": 2, "top_k": 3}}),
    ("POST", "/api/generate", "", {"model": "{model}", "prompt": "a", "raw": True, "options": {"num_predict": 1}}),
    ("GET", "/api/tags", "", None),
    ("GET", "/api/ps", "", None),
    ("POST", "/api/show", "", {"model": "{model}"}),
    ("GET", "/api/version", "", None),
    ("POST", "/api/copy", "", {"source": "no-such-model", "destination": "other"}),
    ("DELETE", "/api/delete", "", {"model": "no-such-model"}),
    ("POST", "/api/pull", "", {"model": "no-such-model-anywhere:none", "stream": False}),
    *(("POST", f"/api/{name}", "", {"model": "{model}"}) for name in ("push", "create", "embed", "embeddings")),
    *(("POST", path, "", {"query": "a", "documents": ["b", "c"]}) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
    *(("POST", path, "", {"text_1": "a", "text_2": ["b"]}) for path in ("/score", "/v1/score")),
    *(("POST", path, "", {"input": ["a", "b"]}) for path in ("/v1/embeddings", "/embeddings", "/embedding")),
    ("POST", "/completion", "", {"prompt": "Hello", "n_predict": 1}),
    ("POST", "/completions", "", {"prompt": "Hello", "n_predict": 1, "stream": True}),
    ("POST", "/v1/responses", "", {"input": "Hello", "instructions": "Be brief.", "max_output_tokens": 2}),
    ("POST", "/v1/responses", "", {"input": [MESSAGES[1]], "max_output_tokens": 1, "stream": True, "store": False}),
    ("POST", "/v1/responses/input_tokens", "", {"input": "Hello"}),
    ("POST", "/v1/responses/compact", "", {"input": "Hello"}),
    ("GET", "/v1/responses/none", "", None),
    ("POST", "/v1/responses/x/cancel", "", {}),
    ("GET", "/v1/responses/x/input_items", "limit=5", None),
    ("GET", "/v1/files", "", None),
    ("GET", "/v1/files/none", "", None),
    ("GET", "/v1/files/x/content", "", None),
    ("GET", "/v1/batches", "", None),
    ("POST", "/v1/batches", "", {"input_file_id": "none", "endpoint": "/v1/completions", "completion_window": "24h"}),
    ("GET", "/v1/batches/none", "", None),
    ("POST", "/v1/batches/x/cancel", "", {}),
    ("GET", "/openapi.json", "", None),
    ("GET", "/docs", "", None),
    ("GET", "/tokenizer_info", "", None),
    ("GET", "/props", "", None),
    ("GET", "/slots", "", None),
    ("GET", "/v1/health", "", None),
    ("GET", "/health", "", None),
    ("GET", "/ready", "", None),
    ("GET", "/internal/models", "", None),
    ("GET", "/internal/models/{model}", "", None),
    ("GET", "/internal/models/{model}/adapters", "", None),
    ("POST", "/internal/models/{model}/load", "", {}),
    ("POST", "/internal/models/{model}/pin", "", {"keep_alive": "-1"}),
    ("POST", "/internal/models/{model}/unpin", "", {}),
    ("POST", "/internal/models/{model}/share", "", {"weight": 1.0, "priority": 0}),
    ("POST", "/internal/models/{model}/adapters", "", {"path": "/nowhere.gguf", "scale": 1.0}),
    ("DELETE", "/internal/models/{model}/adapters/none", "", {}),
    ("POST", "/internal/models/{model}/swap", "wait=true", {"to": "nothing-of-that-name", "kv": "auto"}),
    ("GET", "/internal/swaps", "", None),
    ("GET", "/internal/swaps/1", "", None),
    ("GET", "/internal/arbiter", "", None),
    ("PUT", "/internal/arbiter", "", {"policy": "round_robin"}),
    ("GET", "/internal/memory", "", None),
    ("GET", "/internal/machine", "", None),
    ("GET", "/internal/scheduler", "model={model}", None),
    ("PUT", "/internal/scheduler", "", {"policy": "fcfs", "params": {"chunk": 0}}),
    ("PATCH", "/internal/scheduler", "", {"params": {"max_running": 0}}),
    ("PUT", "/internal/scheduler/shadow", "", {"policy": "fair", "params": {}}),
    ("DELETE", "/internal/scheduler/shadow", "", {}),
    ("GET", "/internal/kv", "", None),
    ("GET", "/internal/kv/tree", "limit=5", None),
    ("GET", "/internal/kv/map", "", None),
    ("GET", "/internal/kv/events", "since=0", None),
    ("GET", "/internal/kv/policy", "", None),
    ("PUT", "/internal/kv/policy", "", {"policy": "lru", "params": {}}),
    ("POST", "/internal/kv/pin", "", {"prompt": "Hello", "ttl_s": 1}),
    ("POST", "/internal/kv/unpin", "", {"messages": MESSAGES}),
    ("POST", "/internal/kv/drop", "", {"prompt": [5], "tiers": ["device"]}),
    ("POST", "/internal/kv/save", "", {"prompt": "Hello"}),
    ("POST", "/internal/kv/load", "", {"prompt": "Hello"}),
    ("POST", "/internal/models/pull", "", {"model": "no-such-model-anywhere:none", "stream": False}),
]
#: Its valid form asks other machines; only what is refused before that is sent.
NEVER_VALID = ("/internal/models/pull", "/api/pull")

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, -1e-308, "", " ", "x" * 3000,
    "\0", "\ud800", "é🙂漢", "../../etc/passwd", "{{ 1 }}", "%s%n", [], {}, [[]], [None], [""], {"": None}, ["a"] * 300,
    [0] * 2000, {"a": {"b": {"c": [1, {"d": None}]}}}, "nan", "-1", "1e9", "true", "fcfs:x", "<|im_end|>" * 50,
]  # fmt: skip
RAW = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"{",
    b"\xff\xfe{}",
    b'{"a":' * 2000,
    b'"' + b"x" * 5000,
    b"{}{}",
    b"NaN",
    b"\x00",
    b"[" * 500,
]
TYPES = [
    "application/json",
    "application/json",
    "text/plain",
    "",
    "application/json; charset=utf-16",
    "multipart/form-data",
]
HEADERS = [
    ("X-Profile", "true"), ("X-Profile", "\t"), ("Accept", "text/event-stream"), ("Last-Event-ID", "-1"),
    ("Authorization", "Bearer " + "x" * 500), ("Expect", "100-continue"), ("Cookie", "a=b"), ("Range", "bytes=0-0"),
    ("Transfer-Encoding", "identity"), ("X-HTTP-Method-Override", "DELETE"), ("Accept-Encoding", "gzip, br"),
]  # fmt: skip
QUERIES = [
    "model=nobody",
    "limit=0",
    "limit=-1",
    "limit=99999999999999999999",
    "since=x",
    "a=b&a=c",
    "%ff=%00",
    "tokens=1",
    "wait=no",
]


@dataclass
class Mutant:
    method: str
    path: str
    query: str
    body: bytes | None
    headers: dict[str, str]

    def __str__(self) -> str:
        """As a curl line, to try it again."""
        shown = "" if self.body is None else f" --data-binary {self.body[:300]!r}"
        heads = "".join(f" -H {f'{name}: {value}'!r}" for name, value in self.headers.items())
        return f"curl -X {self.method}{heads}{shown} {self.path}?{self.query}"


def error_of(body: bytes) -> tuple[str, str | None]:
    """Message and code (None where the API has none) of a refusal, in the shape of one of the APIs."""
    found = json.loads(body)
    error = found["error"]
    if isinstance(error, str):  # Ollama's
        assert found.keys() == {"error"}
        return error, None
    if found.get("type") == "error":  # Anthropic's
        assert found.keys() == {"type", "error"} and error.keys() == {"type", "message"}
        return error["message"], "queue_full" if error["type"] == "overloaded_error" else None
    assert found.keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}
    return error["message"], error["code"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value there is something to change."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        found += places(below, (*path, key))
    return found


def changed(rng: random.Random, value: Any) -> Any:
    """A copy with one to three members changed, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        where = places(value)
        if not where:
            return rng.choice(ODD)
        *above, key = rng.choice(where)
        holder = value
        for step in above:
            holder = holder[step]
        action = rng.random()
        if action < 0.7:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.85:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(["", "model", "extra", "n", "\0"])] = copy.deepcopy(rng.choice(ODD))
    return value


def mutant(rng: random.Random, model: str) -> Mutant:
    """The next request. What would only take long is kept short: answers of a few tokens."""
    method, path, query, body = rng.choice(VALID)
    path, query = path.replace("{model}", model), query.replace("{model}", model)
    body = json.loads(json.dumps(body).replace("{model}", model))
    headers = {"Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    how = rng.random() if path not in NEVER_VALID else rng.uniform(0.0, 0.1)
    if body is not None and how < 0.1:
        data = rng.choice(RAW)
    elif body is not None and how < 0.75:
        found = changed(rng, body)
        data = json.dumps(found).encode()
    elif data and how < 0.85:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.randrange(3) :]
    elif 0.85 <= how < 0.9:
        path = path[: rng.randrange(1, len(path))] + rng.choice(["", "/", "%2e%2e", "//x", "/\u00e9", ";x", "%00"])
    elif 0.9 <= how < 0.93:
        method = rng.choice(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"])
    if rng.random() < 0.15:
        query = rng.choice(QUERIES)
    if rng.random() < 0.1:
        headers["Content-Type"] = rng.choice(TYPES)
    if rng.random() < 0.15:
        name, value = rng.choice(HEADERS)
        headers[name] = value
    return Mutant(method, path, query, data, {name: value for name, value in headers.items() if value})
