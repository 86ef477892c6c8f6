"""``https:`` over a local server: resumption, validators, lies, redirects, and who may be connected to."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from hub_support import LocalServer, Reply, Seen, file_reply, serve
from hypothesis import given
from hypothesis import strategies as st
from models_support import METADATA, TENSORS, make_gguf

from mullama.errors import PrivateAddress, ReferenceNotFound, StoreError
from mullama.models.parse import parse_reference
from mullama.models.sources import download, net, private_addresses
from mullama.models.sources.download import Fetcher
from mullama.models.sources.net import CheckedBackend, is_public, make_client
from mullama.models.store.pulling import pull
from mullama.models.store.store import Store

DATA = make_gguf(tensors=[("token_embd.weight", (32, 4000), 8, 4000 * 34)])
SHA = hashlib.sha256(DATA).hexdigest()
OTHER = make_gguf(tensors=[("token_embd.weight", (32, 4000), 8, 4000 * 34)], seed=9)


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loopback is a private address, so most tests need leave; no proxy of the machine's."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(private_addresses, "_allowed", True)
    return None


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits before another attempt, which take no time."""
    waits: list[float] = []
    monkeypatch.setattr(download, "pause", waits.append)
    return waits


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer() as running:
        yield running


def left(store: Store) -> list[Path]:
    """What lies in the store beside locks."""
    return [path for path in store.root.rglob("*") if path.is_file() and path.parent.name != "locks"]


def ranges(server: LocalServer) -> list[str | None]:
    return [seen.headers.get("range") for seen in server.seen]


def cutting(at: int, answer: Callable[[Seen], Reply | None]) -> Callable[[Seen], Reply | None]:
    """The first answer breaks off after ``at`` bytes."""
    cuts = [at]

    def route(seen: Seen) -> Reply | None:
        reply = answer(seen)
        if reply is not None and cuts:
            reply.cut = cuts.pop()
        return reply

    return route


def test_a_file_is_fetched_verified_and_named(store: Store, server: LocalServer) -> None:
    server.routes.append(serve("/d/My.Q8_0.gguf", DATA))
    steps: list[tuple[str, int, int | None]] = []
    entry = pull(store, parse_reference(f"{server.url}/d/My.Q8_0.gguf?download=true"), lambda *step: steps.append(step))
    assert (entry.sha256, entry.filename, entry.revision, entry.quant) == (SHA, "My.Q8_0.gguf", '"v1"', "Q8_0")
    assert store.path_of(entry).read_bytes() == DATA
    assert store.path_of(entry).stat().st_mode & 0o777 == 0o444
    assert steps[0] == ("downloading", 0, len(DATA))
    assert steps[-1] == ("downloading", len(DATA), len(DATA))
    assert server.seen[0].headers["accept-encoding"] == "identity"


def test_a_pin_is_compared(store: Store, server: LocalServer) -> None:
    server.routes.append(serve("/m.gguf", DATA))
    with pytest.raises(StoreError, match=rf"sha256 is {SHA}, expected 0000.*nothing was kept"):
        pull(store, parse_reference(f"{server.url}/m.gguf#sha256={'0' * 64}"))
    assert left(store) == []
    assert pull(store, parse_reference(f"{server.url}/m.gguf#sha256={SHA}")).sha256 == SHA


def test_a_broken_connection_is_resumed(store: Store, server: LocalServer, pauses: list[float]) -> None:
    server.routes.append(cutting(50_000, serve("/m.gguf", DATA)))
    assert pull(store, parse_reference(f"{server.url}/m.gguf")).sha256 == SHA
    assert ranges(server) == [None, "bytes=50000-"]
    assert server.seen[1].headers["if-range"] == '"v1"'
    assert pauses == [0.5]


def test_another_pull_goes_on_where_the_first_gave_up(
    store: Store, server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.routes.append(cutting(70_000, serve("/m.gguf", DATA)))
    reference = parse_reference(f"{server.url}/m.gguf")
    with pytest.raises(StoreError, match="cannot download"):
        pull(store, reference)
    assert store.find(reference.key) is None
    assert pull(store, reference).sha256 == SHA
    assert ranges(server) == [None, "bytes=70000-"]
    assert {path.parent.name for path in left(store)} == {"blobs", "refs", "digests"}


def test_ctrl_c_keeps_what_can_be_gone_on_with(store: Store, server: LocalServer) -> None:
    server.routes.append(lambda seen: _in_pieces(serve("/m.gguf", DATA)(seen)))
    reference = parse_reference(f"{server.url}/m.gguf")

    def stop(what: str, done: int, total: int | None) -> None:
        if done > 20_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(store, reference, stop)
    assert pull(store, reference).sha256 == SHA
    first = ranges(server)[1]
    assert first is not None
    assert int(first[6:-1]) > 20_000


def _in_pieces(reply: Reply | None) -> Reply | None:
    if reply is not None:
        reply.pieces = 10
    return reply


def test_last_modified_serves_where_there_is_no_etag(store: Store, server: LocalServer) -> None:
    when = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.routes.append(cutting(1000, serve("/m.gguf", DATA, None, last_modified=when)))
    assert pull(store, parse_reference(f"{server.url}/m.gguf")).revision == when
    assert server.seen[1].headers["if-range"] == when


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_validator_it_starts_again(store: Store, server: LocalServer, etag: str | None) -> None:
    server.routes.append(cutting(1000, serve("/m.gguf", DATA, etag)))
    assert pull(store, parse_reference(f"{server.url}/m.gguf")).sha256 == SHA
    assert ranges(server) == [None, None]


def test_a_pin_makes_a_range_safe_without_a_validator(store: Store, server: LocalServer) -> None:
    server.routes.append(cutting(1000, serve("/m.gguf", DATA, None)))
    assert pull(store, parse_reference(f"{server.url}/m.gguf#sha256={SHA}")).sha256 == SHA
    assert ranges(server) == [None, "bytes=1000-"]


def test_a_file_that_changed_meanwhile_is_fetched_whole(store: Store, server: LocalServer) -> None:
    answers = iter([(OTHER, '"v1"'), (DATA, '"v2"')])

    def route(seen: Seen) -> Reply:
        reply = file_reply(seen, *next(answers))
        reply.cut = 1000 if len(server.seen) == 1 else None
        return reply

    server.routes.append(route)
    entry = pull(store, parse_reference(f"{server.url}/m.gguf"))
    assert (entry.sha256, entry.revision) == (SHA, '"v2"')


def _lie(server: LocalServer, lie: Callable[[Seen], Reply], *, forever: bool) -> None:
    """The first answer breaks off; the next one (or all that follow) is the lie."""
    honest = serve("/m.gguf", DATA)

    def route(seen: Seen) -> Reply | None:
        reply = honest(seen)
        if len(server.seen) == 1:
            assert reply is not None
            reply.cut = 1000
            return reply
        asks = "range" in seen.headers
        return lie(seen) if asks and (forever or len(server.seen) == 2) else reply

    server.routes.append(route)


def _partial(content_range: str | None, body: bytes, etag: str | None = '"v1"') -> Callable[[Seen], Reply]:
    headers = {} if content_range is None else {"Content-Range": content_range}
    return lambda seen: Reply(206, {**headers, **({"ETag": etag} if etag else {})}, body)


N = len(DATA)
LIES = {
    "starts elsewhere": _partial(f"bytes 900-{N - 1}/{N}", DATA[900:]),
    "ends elsewhere": _partial(f"bytes 1000-{N - 2}/{N}", DATA[1000:-1]),
    "another total": _partial(f"bytes 1000-{N}/{N + 1}", DATA[1000:] + b"x"),
    "no range at all": _partial(None, DATA[1000:]),
    "nonsense": _partial("bytes over there", DATA[1000:]),
    "backwards": _partial("bytes 1000-900/1000", DATA[1000:]),
    "another file": _partial(f"bytes 1000-{N - 1}/{N}", OTHER[1000:], '"v2"'),
    "a range and a length that disagree": _partial(f"bytes 1000-{N - 1}/{N}", DATA[2000:]),
    "nothing there": lambda seen: Reply(416, {"Content-Range": f"bytes */{N}"}),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_about_ranges_starts_again_from_zero(store: Store, server: LocalServer, lie: Any) -> None:
    _lie(server, lie, forever=False)
    assert pull(store, parse_reference(f"{server.url}/m.gguf")).sha256 == SHA
    assert ranges(server) == [None, "bytes=1000-", None]


def test_a_server_that_ignores_ranges_sends_it_whole(store: Store, server: LocalServer) -> None:
    _lie(server, lambda seen: Reply(200, {"ETag": '"v1"'}, DATA), forever=False)
    assert pull(store, parse_reference(f"{server.url}/m.gguf")).sha256 == SHA


def test_what_the_digest_finds_wrong_after_resuming_is_fetched_whole(store: Store, server: LocalServer) -> None:
    """The range looks right in every way, and is another file's."""
    _lie(server, _partial(f"bytes 1000-{N - 1}/{N}", OTHER[1000:]), forever=False)
    assert pull(store, parse_reference(f"{server.url}/m.gguf#sha256={SHA}")).sha256 == SHA
    assert ranges(server) == [None, "bytes=1000-", None]


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (lambda: Reply(200, {"ETag": '"v1"'}, DATA, length=N + 500), "closed connection"),
        (lambda: Reply(200, {"ETag": '"v1"', "Content-Encoding": "gzip"}, DATA), "compresses"),
        (lambda: Reply(206, {"Content-Range": f"bytes 0-{N - 1}/{N}"}, DATA), "range where the whole"),
        (lambda: Reply(200, {}, DATA[: N // 2]), "truncated"),
        (lambda: Reply(200, {}, b"<html>please log in</html>"), "not a GGUF file"),
        (lambda: Reply(404), "has no m.gguf"),
        (lambda: Reply(403), "may be private"),
        (lambda: Reply(418), "HTTP 418"),
        (lambda: Reply(503), "HTTP 503"),
        (lambda: Reply(429, {"Retry-After": "4000"}), "come back in 4000 seconds"),
        (lambda: Reply(302, {"Location": "/m.gguf"}), "redirects more than"),
    ],
)
def test_what_stays_wrong_is_a_clear_error(store: Store, server: LocalServer, reply: Any, says: str) -> None:
    server.routes.append(lambda seen: reply())
    with pytest.raises(Exception, match=says) as raised:
        pull(store, parse_reference(f"{server.url}/m.gguf"))
    assert isinstance(raised.value, StoreError) or raised.type.__name__ in ("ReferenceNotFound", "ModelLoadError")
    assert "\n" not in str(raised.value)
    assert not list((store.root / "blobs").iterdir())
    assert store.list() == []


def test_a_server_that_sends_too_much(store: Store, server: LocalServer) -> None:
    """In chunks, so that its own length does not stop it."""
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (DATA, b"more")) + b"0\r\n\r\n"

    def route(seen: Seen) -> Reply:
        return Reply(200, {"ETag": '"v1"', "Content-Length": "", "Transfer-Encoding": "chunked"}, chunked)

    server.routes.append(route)
    store.root.mkdir()
    with make_client(allow_private=True) as client:
        fetcher = Fetcher(client, allow_private=True)
        with pytest.raises(StoreError, match=rf"more than the {N} bytes it has; nothing was kept"):
            fetcher.download(f"{server.url}/m.gguf", store.root / "m", what="m", progress=lambda *_: None, size=N)
    assert list(store.root.iterdir()) == []


def test_rate_limits_are_waited_for(store: Store, server: LocalServer, pauses: list[float]) -> None:
    answers = [Reply(429, {"Retry-After": "2"}), Reply(503)]
    server.routes.append(lambda seen: answers.pop(0) if answers else file_reply(seen, DATA, '"v1"'))
    assert pull(store, parse_reference(f"{server.url}/m.gguf")).sha256 == SHA
    assert pauses == [2.0, 1.0]


def test_retry_after_may_be_a_date() -> None:
    reply = httpx.Response(429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    assert download._retry_after(reply) == 0.0
    assert download._retry_after(httpx.Response(429, headers={"Retry-After": "soon"})) is None


def test_what_cannot_fit_is_refused_by_its_announced_size(store: Store, server: LocalServer) -> None:
    server.routes.append(lambda seen: Reply(200, {"ETag": '"v1"'}, b"GGUF", length=1 << 60))
    with pytest.raises(StoreError, match="MB free"):
        pull(store, parse_reference(f"{server.url}/m.gguf"))
    assert left(store) == []


def split_parts(count: int = 3) -> list[bytes]:
    """A split model of the smallest kind: one tensor a file."""
    common = {"split.count": count, "split.tensors.count": count}
    tensors = [(f"blk.{n}.x", TENSORS[0][1], TENSORS[0][2], TENSORS[0][3]) for n in range(count)]
    return [
        make_gguf({**(METADATA if n == 0 else {}), "split.no": n, **common}, [tensors[n]], seed=n) for n in range(count)
    ]


def test_a_split_model_is_fetched_in_all_its_parts(store: Store, server: LocalServer) -> None:
    parts = split_parts()
    for number, data in enumerate(parts, 1):
        server.routes.append(serve(f"/Big-0000{number}-of-00003.gguf", data))
    reference = parse_reference(f"{server.url}/Big-00001-of-00003.gguf")
    steps: list[str] = []
    entry = pull(store, reference, lambda what, *_: steps.append(what))
    assert [part.sha256 for part in entry.parts] == [hashlib.sha256(data).hexdigest() for data in parts]
    assert entry.size == sum(map(len, parts))
    first = store.resolve(reference)
    assert first.name.endswith("-00001-of-00003.gguf")
    assert sorted(path.read_bytes() for path in first.parent.iterdir()) == sorted(parts)
    assert "downloading part 3 of 3" in steps
    assert store.remove(entry.key) == entry.size
    assert left(store) == []


def test_a_part_that_is_not_there(store: Store, server: LocalServer) -> None:
    for number, data in enumerate(split_parts()[:2], 1):
        server.routes.append(serve(f"/Big-0000{number}-of-00003.gguf", data))
    with pytest.raises(ReferenceNotFound, match="Big-00003-of-00003"):
        pull(store, parse_reference(f"{server.url}/Big-00001-of-00003.gguf"))
    assert store.list() == []


# -- who may be connected to


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "nonsense", ""),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses())
def test_no_mapped_address_is_more_public_than_itself(address: Any) -> None:
    if address.version == 4:
        assert is_public(f"::ffff:{address}") == is_public(str(address))
    assert not is_public(str(address)) or address.is_global


@pytest.mark.parametrize(
    "text",
    [
        *("http://example.org/m.gguf", "https://127.0.0.1/m.gguf", "https://[::1]/m.gguf", "https://localhost/m.gguf"),
        *("https://169.254.169.254/m.gguf", "https://a.localhost./m.gguf", "https://[::ffff:10.0.0.1]/m.gguf"),
        *(
            "https://2130706433/m.gguf",
            "https://0x7f.1/m.gguf",
            "ollama:127.0.0.1:9/library/x:1",
            "ollama:http://e.org/x",
        ),
    ],
)
def test_private_places_are_refused(store: Store, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_addresses, "_allowed", False)
    # No name server is asked; these spellings of 127.0.0.1 are what the system's resolver makes of them.
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    )
    with pytest.raises(StoreError, match="--allow-private-sources"):
        pull(store, parse_reference(text))
    assert store.list() == []


def test_what_httpx_takes_for_no_address(store: Store) -> None:
    """Our own reader of addresses is laxer in places."""
    with pytest.raises(StoreError, match="is not an address"):
        pull(store, parse_reference("https://example.org/m.gguf?" + "x" * 70_000))


def test_the_setting_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_addresses, "_allowed", None)
    monkeypatch.delenv(private_addresses.VARIABLE, raising=False)
    assert not private_addresses.is_private_allowed()
    monkeypatch.setenv(private_addresses.VARIABLE, "1")
    assert private_addresses.is_private_allowed()
    private_addresses.allow_private(False)
    assert not private_addresses.is_private_allowed()


class Recorder(httpcore.NetworkBackend):
    """Stands in for the network: notes whom it should connect to, and connects to a local server instead."""

    def __init__(self, port: int) -> None:
        self.asked: list[tuple[str, int]] = []
        self._port = port

    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        self.asked.append((host, port))
        return httpcore.SyncBackend().connect_tcp("127.0.0.1", self._port, *args, **kwargs)


def _client(backend: CheckedBackend) -> httpx.Client:
    return httpx.Client(transport=net.CheckedTransport(backend), trust_env=False)


def test_a_connection_goes_to_the_address_that_was_checked(server: LocalServer) -> None:
    """DNS rebinding: the name means another address a moment later, and nobody asks for it again."""
    server.routes.append(serve("/x", b"data"))
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    network = Recorder(server.port)
    with _client(CheckedBackend(resolver=lambda host, port: next(answers), inner=network)) as client:
        assert client.get("http://rebind.example/x").content == b"data"
        client.get("http://rebind.example/x")  # over the same connection
    assert network.asked == [("93.184.216.34", 80)]


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::1"], []])
def test_a_name_with_a_private_address_is_refused(server: LocalServer, addresses: list[str]) -> None:
    network = Recorder(server.port)
    with (
        _client(CheckedBackend(resolver=lambda host, port: addresses, inner=network)) as client,
        pytest.raises(PrivateAddress, match=r"inner\.example"),
    ):
        client.get("http://inner.example/x")
    assert network.asked == []


def test_the_next_address_is_tried_when_one_does_not_answer(server: LocalServer) -> None:
    server.routes.append(serve("/x", b"data"))

    class Flaky(Recorder):
        def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
            stream = super().connect_tcp(host, port, *args, **kwargs)
            if host == "1.1.1.1":
                stream.close()
                raise httpcore.ConnectError("no route")
            return stream

    network = Flaky(server.port)
    backend = CheckedBackend(resolver=lambda host, port: ["1.1.1.1", "1.0.0.1"], inner=network)
    with _client(backend) as client:
        assert client.get("http://two.example/x").content == b"data"
    assert [host for host, _ in network.asked] == ["1.1.1.1", "1.0.0.1"]


def test_a_redirect_to_a_private_address_is_refused(server: LocalServer) -> None:
    """The host itself is the user's own setting; where it sends us to is not."""
    with LocalServer(serve("/x", b"secret")) as inner:
        server.routes.append(lambda seen: Reply(302, {"Location": f"{inner.url}/x"}))
        trusted = frozenset({("127.0.0.1", server.port)})
        with make_client(allow_private=False, trusted=trusted) as client:
            fetcher = Fetcher(client, allow_private=False, trusted=trusted)
            with pytest.raises(PrivateAddress):
                fetcher.open(f"{server.url}/x")
        assert inner.seen == []


def test_headers_stay_with_their_host(server: LocalServer) -> None:
    with LocalServer(serve("/x", b"data")) as other, make_client(allow_private=True) as client:
        server.routes.append(lambda seen: Reply(307, {"Location": f"{other.url}/x"}))
        fetcher = Fetcher(client, allow_private=True)
        fetcher.headers["Authorization"] = "Bearer secret"
        fetcher.open(f"{server.url}/y").close()
        assert server.seen[0].headers["authorization"] == "Bearer secret"
        assert "authorization" not in other.seen[0].headers


def test_a_proxy_of_the_environment_is_used(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It resolves names itself, so only what is written out can be refused here."""
    server.routes.append(lambda seen: file_reply(seen, DATA, '"v1"'))
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "direct.example,127.0.0.1")
    with make_client(allow_private=False) as client:
        assert client.get("http://models.example/m.gguf").content == DATA
        assert server.seen[0].path == "http://models.example/m.gguf"
        with pytest.raises(PrivateAddress):
            client.get("http://127.0.0.1:9/x")
    monkeypatch.setenv("no_proxy", "*")
    assert net.proxies() == {}
