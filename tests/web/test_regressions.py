"""Published faults of llama.cpp, Ollama, vLLM and uvicorn that could have been ours: one test each, with its number.

What it takes a vocabulary to show is in tests/core (test_pretokenizers.py).
"""

from __future__ import annotations

import logging
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from mullama.config import ServeConfig
from mullama.errors import ModelLoadError, MullamaError
from mullama.kv.index.tree import namespace_of
from mullama.models.files import gguf
from mullama.models.parse import parse_spec
from mullama.models.store.entry import is_plain_name
from mullama.models.store.store import Store
from mullama.serving.manager import ModelManager
from mullama.web import security
from mullama.web.app import create_app
from mullama.web.keys import key_ring
from mullama.web.services import Services

from .conftest import Client, Live
from .fake_engine import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
V1 = "/v1/chat/completions"


# -- files: llama.cpp's and Ollama's readers of GGUF ----------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(n_tensors: int, n_pairs: int, rest: bytes = b"", version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_pairs) + rest


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(b"t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 1 << 62

#: The published file that each one is like.
FILES: dict[str, bytes] = {
    "CVE-2024-21802 tensor with more dimensions than there are": header(1, 0, text(b"t") + struct.pack("<I", 1000)),
    "CVE-2024-21825 array of more elements than fit": header(
        0, 1, text(b"a") + struct.pack("<IIQ", 9, 4, HUGE) + bytes(64)
    ),
    "CVE-2024-21836 more tensors than fit": header(HUGE, 0, bytes(64)),
    "CVE-2024-23496 more pairs than fit": header(0, HUGE, bytes(64)),
    "CVE-2024-23605 string longer than the file": header(0, 1, struct.pack("<Q", HUGE) + bytes(64)),
    "CVE-2024-32878 array of a type that is none": header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 77, 4) + bytes(64)),
    "CVE-2024-41130 string of the largest length": header(0, 1, struct.pack("<Q", (1 << 64) - 1) + bytes(64)),
    "CVE-2024-39720 four bytes": b"GGUF",
    "CVE-2025-0317 an alignment of nothing": header(
        1, 1, text(b"general.alignment") + struct.pack("<II", 4, 0) + tensor((4,)) + bytes(64)
    ),
    "CVE-2025-0315 a length that would take all memory": header(
        0, 1, text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1 << 40) + bytes(64)
    ),
    "CVE-2025-53630 sizes whose product wraps": header(1, 0, tensor((1 << 32, 1 << 32)) + bytes(64)),
    "CVE-2026-27940 sizes whose padded sum wraps": header(
        2, 0, tensor(((1 << 62) - 8,)) + tensor(((1 << 62) - 8,), offset=((1 << 64) - 32)) + bytes(64)
    ),
    "CVE-2025-66959 a key whose length would take all memory": header(0, 1, struct.pack("<Q", 1 << 40) + bytes(64)),
    "CVE-2025-66960 a text whose length is negative as an int64": header(
        0, 1, text(b"a") + struct.pack("<IQ", 8, 1 << 63) + bytes(64)
    ),
    "CVE-2026-7482 a tensor beyond the end of the file": header(1, 0, tensor((4,), offset=1 << 20) + bytes(64)),
}


@pytest.mark.parametrize("number", FILES)
def test_a_file_that_lies_is_refused(tmp_path: Path, number: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(FILES[number])
    with pytest.raises(ModelLoadError) as caught:
        gguf.check(path, label="m")
    assert "\n" not in str(caught.value)


def test_cve_2025_49847_a_token_longer_than_an_int32(tmp_path: Path) -> None:
    """llama.cpp: its length became negative, and so the room it was copied into was always enough."""
    length = (1 << 31) + 8
    path = tmp_path / "m.gguf"
    for before in (0, 5):  # the first tokens are kept, the others passed over
        pair = text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, before + 1) + text(b"a") * before
        with path.open("wb") as file:
            file.write(header(0, 1, pair + struct.pack("<Q", length)))
            file.truncate(file.tell() + length + 64)  # sparse: it takes no room
        with pytest.raises(ModelLoadError, match=f"a text of {length} bytes"):
            gguf.check(path, label="m")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "sha256:../../x", "..", "a/../../b", "C:\\x", "a\0b", "/abs.gguf", ""]
)
def test_cve_2024_37032_and_39722_no_name_leaves_the_store(tmp_path: Path, name: str) -> None:
    """Ollama: digests and names of models were paths."""
    assert not is_plain_name(name)
    store = Store(tmp_path / "home")
    path = store._ref_path(name)
    assert path.parent == store.refs and path.resolve().parent == store.refs.resolve()
    try:
        spec = parse_spec(f"hf:{name}", store.lookup)
    except MullamaError:
        return
    assert store._ref_path(spec.reference.key).resolve().parent == store.refs.resolve()


def test_cve_2024_39721_a_device_is_no_model() -> None:
    """Ollama: reading /dev/random never ended."""
    with pytest.raises(MullamaError):
        Store().resolve(parse_spec("/dev/zero", lambda name: None).reference)


# -- requests: vLLM's and llama-server's ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "change"),
    [
        ("CVE-2024-8939 best_of", {"best_of": 10_000_000}),
        ("CVE-2026-34756 n", {"n": 10_000_000}),
        ("CVE-2026-34756 n negative", {"n": -1}),
        ("CVE-2026-21869 a negative count", {"max_tokens": -2}),
        ("CVE-2026-21869 a negative n_discard", {"n_discard": -1}),
        ("CVE-2025-62164 a prompt as embeddings", {"prompt_embeds": "AAAA", "best_of": 1}),
        ("CVE-2025-62372 embeddings of another shape", {"prompt_embeds": ["AAAA", "AA"], "best_of": 1}),
        ("CVE-2025-48942 a schema that is none", {"response_format": {"type": "json_schema", "json_schema": {"x": 1}}}),
        ("CVE-2025-48943 an expression that is none", {"guided_regex": "[", "response_format": {"type": "regex"}}),
        (
            "CVE-2025-48944 a tool whose schema is none",
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
        ),
        ("CVE-2025-48944 a tool of a type that is none", {"tools": [{"type": "x"}]}),
    ],
)
def test_a_field_that_would_end_the_server_is_refused(
    client: Client, engine: FakeEngine, number: str, change: dict[str, object]
) -> None:
    path = "/v1/completions" if "best_of" in change else V1
    body: dict[str, object] = {"prompt": "x"} if "best_of" in change else dict(CHAT)
    result = client.post(path, {**body, **change})
    assert result.status == 400, (number, result)
    assert client.post(V1, CHAT).status == 200


@pytest.mark.parametrize("prompt", ["", [], [""], [[]]])
def test_cve_2024_8768_an_empty_prompt_ends_nothing(client: Client, prompt: object) -> None:
    """vLLM: the engine died."""
    assert client.post("/v1/completions", {"prompt": prompt}).status in (200, 400)
    assert client.post(V1, CHAT).status == 200


@pytest.mark.parametrize(
    "field", [{"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"tokenize": True, "chat_template": "{{ x }}"}}]
)
def test_cve_2025_61620_and_62426_no_client_brings_a_template(
    client: Client, engine: FakeEngine, field: dict[str, object]
) -> None:
    """vLLM: a request's template ran on the server, for as long as it liked."""
    result = client.post(V1, {**CHAT, **field})
    assert result.status in (200, 400)
    assert "{{" not in str(getattr(engine, "rendered", ""))


def test_cve_2025_25183_no_prompt_is_another_s_prefix(client: Client) -> None:
    """vLLM: hashes of prefixes collided, and could be made to. Here tokens are compared; what keeps tenants apart is a
    keyed hash of 128 bits."""
    assert len({namespace_of(str(n)) for n in range(10_000)}) == 10_000
    assert namespace_of("-1") != namespace_of("-2")  # equal under hash()
    assert hash(-1) == hash(-2)


def test_cve_2025_59425_keys_are_compared_in_constant_time() -> None:
    """vLLM: the time of a refusal told how much of a key was right."""
    rings = [key_ring.KeyRing(ServeConfig(api_key=["alice-key"])) for _ in range(2)]
    one, other = (ring._blinded(key_ring.digest_of(b"alice-key")) for ring in rings)
    assert one != other, "what is compared is made with a secret, which no client can steer"
    assert rings[0].find(b"alice-key") is not None and rings[0].find(b"alice-kez") is None
    for module in (security, key_ring):
        source = Path(module.__file__).read_text(encoding="utf-8")
        assert not re.search(r"(api_key|admin_key|given)\s*(==|!=|in)\s*(self\._)?(api|admin|key)", source)


def test_cve_2025_46570_times_tell_nobody_what_another_has_sent() -> None:
    """vLLM: whether a prefix was cached by another user showed in the time to the first token. Each key has its own."""
    prompts = {}
    for key in ("alice-key", "bob-key"):
        engine = FakeEngine()
        services = Services(ServeConfig(api_key=["alice-key", "bob-key"]), ModelManager([("fake", engine)]))
        client = Client(create_app(services.config, services.models, services), services)
        assert client.post(V1, CHAT, headers={"Authorization": f"Bearer {key}"}).status == 200
        prompts[key] = (engine.requests[0].prompt, engine.requests[0].cache_salt)
        services.close()
    assert prompts["alice-key"][0] == prompts["bob-key"][0]
    assert prompts["alice-key"][1] != prompts["bob-key"][1]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "http://169.254.169.254/", "file:///etc/passwd"])
def test_cve_2025_6242_and_2026_24779_no_request_makes_the_server_ask_another(
    client: Client, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """vLLM: the address of a picture was fetched, from wherever it led."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the server opened a connection")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    content = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": url}}]
    assert client.post(V1, {"messages": [{"role": "user", "content": content}]}).status == 400


@pytest.mark.parametrize(
    "body",
    [
        b"2\r\n{}XX0\r\n\r\n",  # two bytes where the end of a chunk belongs
        b"2;\nignored\r\n{}\r\n0\r\n\r\n",
        b"0x2\r\n{}\r\n0\r\n\r\n",
        b"+2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_cve_2025_43859_a_chunk_that_is_none_hides_no_request(live: Callable[..., Live], body: bytes) -> None:
    """h11, which uvicorn can use: a proxy and the server could disagree on where a request ends. Ours is llhttp."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    hidden = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live().port), timeout=30) as client:
        client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + body + hidden)
        received = b""
        while data := client.recv(65536):
            received += data
    assert received == b"" or (received.startswith(b"HTTP/1.1 400") and received.count(b"HTTP/1.1 ") == 1)


def test_cve_2025_48956_a_head_without_an_end(live: Callable[..., Live]) -> None:
    """vLLM: a header of gigabytes was kept in memory."""
    port = live().port
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        received = b""
        try:
            for _ in range(200):
                client.sendall(b"a" * 4096)
            while data := client.recv(4096):
                received += data
        except OSError:
            pass  # it was closed while we still sent
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


# -- the web: Ollama's and uvicorn's --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080"])
def test_cve_2024_28224_a_page_that_points_its_name_here_is_refused(client: Client, host: str) -> None:
    """Ollama: DNS rebinding."""
    assert client.post(V1, CHAT, headers={"Host": host}).status == 403


@pytest.mark.parametrize("header", ["X-Request-ID", "Origin", "User-Agent"])
@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: x=1", "a\nb", "a\x1b[31mred"])
def test_cve_2020_7694_and_7695_no_header_splits_an_answer_or_steers_a_terminal(
    client: Client, caplog: pytest.LogCaptureFixture, header: str, value: str
) -> None:
    """uvicorn: what a client sent came back in headers, and in the log, as it was."""
    with caplog.at_level(logging.DEBUG):
        result = client.post(V1, CHAT, headers={header: value})
    for name, given in result.headers.items():
        assert not set("\r\n\x1b") & set(str(name) + str(given))
    for record in caplog.records:
        assert not set("\r\n\x1b") & set(record.getMessage())


def test_no_body_of_a_route_is_unpickled() -> None:
    """CVE-2025-32444 and CVE-2025-47277, vLLM: what came over a socket was unpickled."""
    root = Path(security.__file__).resolve().parents[1]
    users = [p.name for p in root.rglob("*.py") if re.search(r"\b(pickle|marshal|dill|cloudpickle)\b", p.read_text())]
    assert users == []


def test_a_request_names_no_file_of_the_server(client: Client) -> None:
    """CVE-2024-39719, Ollama: an error told whether a file exists."""
    answers = {
        client.post(V1, {**CHAT, "model": name}).error["message"].replace(name, "NAME")
        for name in ("/etc/passwd", "/etc/no-such-file")
    }
    assert len(answers) == 1
