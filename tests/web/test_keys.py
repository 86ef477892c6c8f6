"""The key file: what it takes, what each key may do, how much of it, and that it is taken whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama.config import ServeConfig
from mullama.errors import ConfigError, InvalidRequest, RateLimited
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.batches.asking import Asking
from mullama.web.keys.key_file import MAX_BYTES, MAX_KEYS, KeyEntry, read_key_file
from mullama.web.keys.key_ring import KeyRing, tenant_of
from mullama.web.keys.rate_limits import MINUTE, Bucket, Usage, duration
from mullama.web.reload import Reload
from mullama.web.services import Services

from .conftest import Client, Live, Result
from .fake_engine import FakeEngine

PROMPT = {"prompt": "abc", "max_tokens": 4}  # 4 prompt tokens with BOS, 4 of completion


class Counting(FakeEngine):
    def counters(self) -> dict[str, int]:
        return {}


class World:
    """A server with a key file that tests write, and a clock that they move."""

    def __init__(self, path: Path, text: str, **options: Any) -> None:
        self.path = path
        self.write(text)
        self.config = ServeConfig(key_file=str(path), **options)
        self.engines = {name: Counting(name) for name in ("small", "large", "large-q4")}
        self.services = Services(self.config, ModelManager(self.engines.items()))  # type: ignore[arg-type]
        self.client = Client(create_app(self.config, self.services.models, self.services), self.services)
        self.reload = Reload(self.services, lambda: replace(self.config))

    def write(self, text: str) -> None:
        self.path.write_text(text, encoding="utf-8")
        self.path.chmod(0o600)

    def ask(self, key: str, body: Any = None, path: str = "/v1/completions", **more: Any) -> Result:
        return self.client.post(path, PROMPT if body is None else body, headers=bearer(key), **more)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def world(text: str, **options: Any) -> World:
        made.append(World(tmp_path / "keys.toml", text, **options))
        return made[-1]

    yield world
    for one in made:
        one.services.close()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that limits are counted with."""
    found = [1000.0]
    monkeypatch.setattr(Usage.__init__, "__defaults__", (lambda: found[0],))
    return found


# -- the file --------------------------------------------------------------------------------------------------


def entry(more: str = "", name: str = "alice", key: str = 'key = "a-key"') -> str:
    return f'[[key]]\nname = "{name}"\n{key}\n{more}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "0 tables"),
        ("[[key]]\n", "name"),
        ("x =", "keys.toml: Invalid value"),
        (entry(key=""), r"\[\[key\]\] 1 \(alice\): it has neither key nor sha256"),
        (entry(key='sha256 = "secret-hash"'), "64 hexadecimal digits"),
        (entry(key='key = " "'), "empty"),
        (entry(key='key = "secret key"'), "white space"),
        (entry(name="key-12345678"), "does not begin with key-"),
        (entry(name="a b"), "a name has"),
        (entry() + entry(key='key = "other"'), r"\[\[key\]\] 2 \(alice\): there are two"),
        (entry() + entry(name="bob"), "a key is there twice"),
        (entry(key='key = "taken"'), "is an --api-key"),
        (entry('role = "root"'), "role"),
        (entry("requests_per_minute = 0"), "requests_per_minute"),
        (entry("tokens_per_minute = 1.5"), "tokens_per_minute"),
        (entry("concurrent = true"), "concurrent"),
        (entry('role = "admin"\nconcurrent = 3'), "an admin has no limits, but it has concurrent"),
        (entry("models = []"), "models"),
        (entry("request_per_minute = 1"), "request_per_minute"),
        (entry("priority_floor = 99999999999"), "priority_floor"),
    ],
)
def test_a_wrong_file_says_what_is_wrong_and_no_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as caught:
        KeyRing(ServeConfig(key_file=str(path), api_key=["taken"]))
    assert "--key-file" in caught.value.message
    assert not any(secret in caught.value.message for secret in ("a-key", "secret", "taken"))


def test_files_that_are_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_key_file(str(tmp_path / "none.toml"))
    path = tmp_path / "keys.toml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        read_key_file(str(path))
    path.write_text("".join(entry(name=f"n{i}", key=f'key = "k{i}"') for i in range(MAX_KEYS + 1)))
    with pytest.raises(ConfigError, match=f"has {MAX_KEYS + 1} tables"):
        read_key_file(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="key-file"):
        read_key_file(str(path))


def test_a_file_that_everybody_may_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry())
    path.chmod(0o644)
    read_key_file(str(path))
    assert "chmod o-r" in caplog.text and "a-key" not in caplog.text


def test_the_example_of_the_page_is_a_key_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(\[\[key\]\].*?)```", page, re.DOTALL)
    path = tmp_path / "keys.toml"
    path.write_text(example)
    ring = KeyRing(ServeConfig(key_file=str(path)))
    found = {one.name: one for one in ring.holders()}
    assert set(found) == {"alice", "reports", "root"} and found["root"].is_admin
    reports = ring.find(b"its-successor")
    assert reports is found["reports"] and reports.entry.may_use("Qwen3:4b") and not reports.entry.may_use("gemma")
    rows = set(re.findall(r"^\| `(\w+)` \|", page.partition("### The key file")[2].partition("\n## ")[0], re.M))
    assert rows == set(KeyEntry.__struct_fields__)


def test_keys_and_digests_of_one_name_are_one_client(make: Callable[..., World]) -> None:
    digest = hashlib.sha256("clé".encode()).hexdigest()
    world = make(entry(key=f'key = ["old", "new"]\nsha256 = "{digest}"') + entry(name="bob", key='key = "b"'))
    for key in ("old", "new", "clé"):
        assert world.client.post("/v1/completions", PROMPT, headers=bearer(key)).status == 200
    assert {request.tenant for request in world.engines["small"].requests} == {"alice"}
    assert world.ask("b").status == 200 and world.engines["small"].requests[-1].tenant == "bob"
    assert len({request.cache_salt for request in world.engines["small"].requests}) == 2
    for wrong in ("", "Old", "old ", "alice", digest):
        headers = bearer(wrong) if wrong.strip() == wrong else {"X-Api-Key": "nope"}
        assert world.client.post("/v1/completions", PROMPT, headers=headers).status == 401


def test_keys_of_both_kinds_hold_together(make: Callable[..., World]) -> None:
    world = make(entry() + entry('role = "admin"', "root", 'key = "r"'), api_key=["flag"], admin_key="chief")
    assert [world.ask(key).status for key in ("a-key", "flag", "r", "chief", "")] == [200, 200, 401, 401, 401]
    statuses = [world.ask(key, {}, "/internal/models/small/pin").status for key in ("a-key", "flag", "r", "chief", "")]
    assert statuses == [403, 403, 200, 200, 403]
    assert world.engines["small"].requests[1].tenant == tenant_of(b"flag")


def test_one_user_in_a_file_is_no_operator(make: Callable[..., World]) -> None:
    """Unlike the one with a single --api-key on loopback: who writes a file means what it says."""
    world = make(entry())
    assert world.ask("a-key").status == 200
    assert world.ask("a-key", {}, "/internal/models/small/pin").status == 403


# -- what a key may do -----------------------------------------------------------------------------------------


def test_models_that_a_key_may_not_use_are_not_there(make: Callable[..., World]) -> None:
    world = make(entry('models = ["LARGE*"]') + entry(name="bob", key='key = "b"'))
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    allowed = world.ask("a-key", {**PROMPT, "model": "large-q4"})
    assert (allowed.status, allowed.json["model"]) == (200, "large-q4")
    assert world.ask("a-key").json["model"] == "large", "the first that it may use"
    for path, body in (
        ("/v1/completions", {**PROMPT, "model": "small"}),
        ("/v1/chat/completions", {**chat, "model": "SMALL"}),
        ("/v1/messages", {**chat, "model": "small"}),
        ("/api/chat", {**chat, "model": "small:latest"}),
        ("/tokenize", {"content": "x", "model": "small"}),
    ):
        refused = world.ask("a-key", body, path)
        unknown = world.ask("a-key", {**body, "model": str(body["model"]).lower().replace("small", "nobody")}, path)
        assert refused.status == unknown.status == 404
        assert refused.body.lower().replace(b"small", b"nobody") == unknown.body.lower(), (
            "it is as if it were not there"
        )
        assert world.ask("b", body, path).status == 200
    assert world.client.get("/v1/models/small", headers=bearer("a-key")).status == 404
    for path in ("/v1/models", "/api/tags", "/api/ps", "/internal/models"):
        assert b"small" not in world.client.get(path, headers=bearer("a-key")).body
        assert b"small" in world.client.get(path, headers=bearer("b")).body
    assert world.client.get("/props", headers=bearer("a-key"), query="model=small").status == 404


def test_a_key_is_no_more_urgent_than_its_floor(make: Callable[..., World]) -> None:
    world = make(entry("priority_floor = 5"))
    for wanted, got in ((None, 5), (-9, 5), (5, 5), (7, 7)):
        assert world.ask("a-key", {**PROMPT, "priority": wanted}).status == 200
        assert world.engines["small"].requests[-1].priority == got


# -- how much --------------------------------------------------------------------------------------------------


def test_requests_a_minute(make: Callable[..., World], now: list[float]) -> None:
    world = make(entry("requests_per_minute = 3") + entry(name="bob", key='key = "b"'))
    first = world.ask("a-key")
    names = ("limit", "remaining", "reset")
    assert [first.headers[f"x-ratelimit-{name}-requests"] for name in names] == ["3", "2", "20s"]
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert world.ask("a-key", b"{").status == 400, "a wrong one counts"
    assert world.client.get("/v1/models", headers=bearer("a-key")).status == 200, "to look costs nothing"
    last = world.ask("a-key", {**PROMPT, "stream": True})
    assert (last.status, last.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    refused = world.ask("a-key")
    assert (refused.status, refused.error["type"], refused.error["code"]) == (
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
    )
    assert refused.headers["retry-after"] == "20" and refused.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert "3 requests a minute" in refused.error["message"]
    anthropic = world.ask("a-key", {}, "/v1/messages")
    assert anthropic.json["error"]["type"] == "rate_limit_error" and anthropic.status == 429
    assert set(world.ask("a-key", {}, "/api/chat").json) == {"error"}
    assert world.ask("b").status == 200 and "x-ratelimit-limit-requests" not in world.ask("b").headers
    now[0] += 20
    assert world.ask("a-key").status == 200
    assert world.ask("a-key").status == 429


def test_tokens_are_reserved_and_settled(make: Callable[..., World], now: list[float]) -> None:
    world = make(entry("tokens_per_minute = 20"))
    first = world.ask("a-key")  # 4 + 4 of 20
    names = ("limit", "remaining", "reset")
    assert [first.headers[f"x-ratelimit-{name}-tokens"] for name in names] == ["20", "12", "24s"]
    assert world.ask("a-key", {"prompt": "abc", "max_tokens": 8}).status == 200  # wants 12, uses 8
    third = world.ask("a-key", {"prompt": "abc", "max_tokens": 1})
    assert (third.status, third.headers["x-ratelimit-remaining-tokens"]) == (429, "4")
    assert third.headers["retry-after"] == "3"
    assert len(world.engines["small"].requests) == 2
    now[0] += 3
    assert world.ask("a-key", {"prompt": "abc", "max_tokens": 1}).status == 200


def test_what_a_request_uses_beyond_its_minute_is_owed(make: Callable[..., World], now: list[float]) -> None:
    world = make(entry("tokens_per_minute = 6"))
    assert world.ask("a-key", {"prompt": "abc"}).status == 200  # no max_tokens: takes all 6, uses 8
    owed = world.ask("a-key", {"prompt": "a", "max_tokens": 1})
    assert (owed.status, owed.headers["retry-after"], owed.headers["x-ratelimit-remaining-tokens"]) == (429, "20", "0")
    now[0] += 20 + 30
    assert world.ask("a-key", {"prompt": "a", "max_tokens": 1}).status == 200
    never = world.ask("a-key", {"prompt": "a" * 10, "max_tokens": 1})
    assert never.status == 400 and "6 a minute" in never.error["message"]


def test_a_refused_request_costs_no_tokens(make: Callable[..., World], now: list[float]) -> None:
    world = make(entry("tokens_per_minute = 20"))
    world.engines["small"].submit_errors = [InvalidRequest("no")]
    refused = world.ask("a-key")
    assert (refused.status, refused.headers["x-ratelimit-remaining-tokens"]) == (400, "20")


def test_requests_at_once(make: Callable[..., World]) -> None:
    world = make(entry("concurrent = 2"))
    (key,) = world.services.security._ring.holders()  # type: ignore[union-attr]
    permits = [key.admit(), key.admit()]
    refused = world.ask("a-key")
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    permits[0].release()  # type: ignore[union-attr]
    permits[0].release()  # type: ignore[union-attr]
    for body in (PROMPT, {**PROMPT, "stream": True}, b"{"):
        assert world.ask("a-key", body).status in (200, 400)
        assert key.usage.n_open == 1, "given back when the answer has ended"
    permits[1].release()  # type: ignore[union-attr]
    assert key.usage.n_open == 0


def test_the_right_to_a_request_comes_back_when_its_client_leaves(make: Callable[..., World]) -> None:
    world = make(entry("concurrent = 1\ntokens_per_minute = 100"))
    world.engines["small"].hang = True
    (key,) = world.services.security._ring.holders()  # type: ignore[union-attr]

    async def leave() -> None:
        body = json.dumps({**PROMPT, "stream": True}).encode()
        events = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            if len(events) == 1:
                await asyncio.sleep(0.02)
                assert key.usage.n_open == 1 and key.usage.tokens.level < 93
            return events.pop(0) if events else await asyncio.sleep(60)

        async def send(event: Any) -> None:
            pass

        headers = [(b"host", b"localhost"), (b"authorization", b"Bearer a-key"), (b"content-length", b"%d" % len(body))]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        scope |= {"asgi": {"version": "3.0"}, "http_version": "1.1", "server": ("localhost", 80), "scheme": "http"}
        await world.client.app(scope, receive, send)
        await world.services.settle()

    asyncio.run(leave())
    assert key.usage.n_open == 0
    assert key.usage.tokens.level == 100, "nobody began with it"


def test_what_the_server_asks_for_a_tenant_counts_as_its_own(make: Callable[..., World], now: list[float]) -> None:
    world = make(entry("requests_per_minute = 2\nmodels = ['large']"))
    asking = Asking(world.client.app, world.services)

    def line(model: str) -> Any:
        return asyncio.run(asking("alice", "/v1/completions", json.dumps({**PROMPT, "model": model}).encode()))

    assert (line("large").status, line("small").status) == (200, 404)
    refused = line("large")
    assert (refused.status, refused.retry_after) == (429, 30)
    assert world.ask("a-key").status == 429
    (key,) = world.services.security._ring.holders()  # type: ignore[union-attr]
    assert key.usage.n_open == 0


# -- reading it again ------------------------------------------------------------------------------------------


def test_sighup_takes_the_file_whole(
    make: Callable[..., World], now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world = make(entry("requests_per_minute = 2") + entry(name="bob", key='key = "b"'))
    assert world.ask("a-key").status == 200
    world.write(entry("requests_per_minute = 4", key='key = "new-key"'))
    world.reload()
    assert [world.ask(key).status for key in ("a-key", "b")] == [401, 401]
    again = world.ask("new-key")
    assert (again.status, again.headers["x-ratelimit-remaining-requests"]) == (200, "2"), "what was used stays used"
    for wrong in ("", entry("concurrent = 0"), entry('role = "admin"'), "[[key"):
        world.write(wrong)
        world.reload()
        assert "the keys stay as they are" in caplog.text
        caplog.clear()
        assert world.client.get("/v1/models", headers=bearer("new-key")).status == 200
        assert world.client.get("/v1/models", headers=bearer("a-key")).status == 401
    world.path.unlink()
    world.reload()
    assert "cannot be read" in caplog.text and world.client.get("/v1/models", headers=bearer("new-key")).status == 200
    assert "new-key" not in caplog.text


# -- limits alone ----------------------------------------------------------------------------------------------


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1000), st.integers(0, 2000)), max_size=30),
)
def test_no_more_is_used_than_the_limit_lets(capacity: int, steps: list[tuple[float, int, int]]) -> None:
    """Whatever is asked for when: what was used is at most a minute's and what came since, but for one overshoot."""
    now = [0.0]
    usage = Usage(lambda: now[0])
    usage.limit(0, capacity, 0)
    used = worst = 0
    for wait, prompt, completion in steps:
        now[0] += wait
        try:
            reservation = usage.admit().reserve(prompt, completion)
        except InvalidRequest:
            assert prompt > capacity
            continue
        except RateLimited as error:
            assert error.retry_after is not None and error.retry_after >= 0
            continue
        actual = completion if completion % 2 else completion // 2
        assert used <= capacity + now[0] * capacity / MINUTE + 1e-6
        reservation.settle(prompt + actual)
        reservation.settle(10**6)
        used += prompt + actual
        worst = max(worst, prompt + actual)
        assert used <= capacity + now[0] * capacity / MINUTE + worst + 1e-6
        assert usage.tokens.level <= capacity


def test_a_bucket_says_when() -> None:
    now = [0.0]
    bucket = Bucket(lambda: now[0])
    bucket.resize(60)
    bucket.take(60)
    assert bucket.seconds_until(1) == pytest.approx(1)
    now[0] = 0.5
    assert (bucket.level, bucket.seconds_until(60)) == (pytest.approx(30 / 60), pytest.approx(59.5))
    bucket.resize(30)
    assert bucket.level == pytest.approx(-29.5)
    now[0] = 10_000
    assert bucket.level == 30


def test_durations() -> None:
    assert [duration(x) for x in (0, 0.0001, 0.25, 1, 58.2, 60, 61.5, 600)] == [
        *("0ms", "1ms", "250ms", "1s", "59s", "1m0s", "1m2s", "10m0s")
    ]


def test_openai_s_client_reads_the_limits(
    live: Callable[..., Live], config: ServeConfig, tmp_path: Path, now: list[float]
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("requests_per_minute = 2\ntokens_per_minute = 1000\nmodels = ['fake']"))
    path.chmod(0o600)
    config.key_file = str(path)
    client = openai.OpenAI(base_url=f"{live().url}/v1", api_key="a-key", max_retries=0)
    headers = {"X-Request-ID": "my-request"}
    raw = client.completions.with_raw_response.create(model="fake", prompt="abc", max_tokens=4, extra_headers=headers)
    assert raw.headers["x-ratelimit-remaining-requests"] == "1" and raw.headers["x-ratelimit-limit-tokens"] == "1000"
    assert raw.headers["x-request-id"] == "my-request" and int(raw.headers["openai-processing-ms"]) >= 0
    fingerprint = raw.parse().system_fingerprint
    assert fingerprint is not None and re.fullmatch(r"fp_[0-9a-f]{12}", fingerprint)
    message: Any = {"role": "user", "content": "x"}
    chunks = list(client.chat.completions.create(model="fake", messages=[message], max_tokens=4, stream=True))
    assert {chunk.system_fingerprint for chunk in chunks} == {fingerprint}
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="fake", prompt="abc")
    assert caught.value.code == "rate_limit_exceeded" and caught.value.response.headers["retry-after"] == "30"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
