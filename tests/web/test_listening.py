"""Where the server listens: names with several addresses, brackets, Unix sockets."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from mullama.config import ServeConfig
from mullama.errors import ConfigError
from mullama.serving.manager import ModelManager
from mullama.web.http.listening import Listener, bind, is_loopback, plain_host, unix_path, url_of
from mullama.web.server import Server, run_server
from mullama.web.services import Services

from .fake_engine import FakeEngine
from .test_live import wait_until


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")


@contextmanager
def serving(config: ServeConfig) -> Iterator[Listener]:
    sock = bind(config)
    services = Services(config, ModelManager([("fake", FakeEngine())]))
    server = Server(config, services, sock)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sock.all})
    thread.start()
    try:
        wait_until(lambda: server.started, 10)
        yield sock
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        sock.close()
        services.close()


def chat(url: str, transport: httpx.HTTPTransport | None = None, **headers: str) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with httpx.Client(transport=transport, trust_env=False) as client:
        return client.post(f"{url}/v1/chat/completions", json=body, headers=headers)


@ipv6
def test_localhost_listens_on_both_addresses() -> None:
    with serving(ServeConfig(host="localhost", port=0)) as sock:
        port = sock.getsockname()[1]
        for url in (f"http://127.0.0.1:{port}", f"http://[::1]:{port}"):
            reply = chat(url)
            assert reply.status_code == 200 and "[DONE]" in reply.text
        assert url_of(ServeConfig(host="localhost"), sock) == f"http://localhost:{port}"


@ipv6
def test_a_port_that_is_taken_at_one_address_of_a_name() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as other:
        other.bind(("::1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match="the port is in use"):
            bind(ServeConfig(host="localhost", port=port)).close()
        with socket.socket() as probe:  # and nothing stays bound at the other one
            probe.bind(("127.0.0.1", port))


def test_without_ipv6_the_other_address_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from mullama.web.http import listening

    plain = listening._listen

    def listen(family: int, address: tuple[str, int]) -> Listener:
        if family == socket.AF_INET6:
            raise listening._NotHere("no IPv6")
        return plain(family, address)

    monkeypatch.setattr(listening, "_listen", listen)
    with bind(ServeConfig(host="localhost", port=0)) as sock:
        assert len(sock.all) == 1
        socket.create_connection(sock.getsockname(), timeout=5).close()


@ipv6
@pytest.mark.parametrize("host", ["[::1]", "::1"])
def test_an_ipv6_address_with_and_without_brackets(host: str) -> None:
    with serving(ServeConfig(host=host, port=0)) as sock:
        url = url_of(ServeConfig(host=host), sock)
        assert url == f"http://[::1]:{sock.getsockname()[1]}"
        assert chat(url).status_code == 200
    assert is_loopback(host) and plain_host(host) == "::1"


@ipv6
def test_all_ipv6_addresses_are_all_ipv4_addresses_too() -> None:
    with bind(ServeConfig(host="[::]", port=0)) as sock:
        socket.create_connection(("127.0.0.1", sock.getsockname()[1]), timeout=5).close()
    assert not is_loopback("[::]")


@unix
def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    config = ServeConfig(host=f"unix:{path}", api_key=["long-enough-key"])
    with serving(config) as sock:
        assert url_of(config, sock) == f"unix:{path}"
        with httpx.HTTPTransport(uds=str(path)) as transport:
            reply = chat("http://anything.example", transport, **{"X-Api-Key": "long-enough-key"})
            assert reply.status_code == 200 and "[DONE]" in reply.text
    assert not path.exists()


@unix
def test_a_client_of_a_unix_socket_that_shuts_its_sending_half(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with serving(ServeConfig(host=f"unix:{path}")), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(path))
        client.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        received = b""
        while piece := client.recv(65536):
            received += piece
    assert json.loads(received.partition(b"\r\n\r\n")[2])["data"][0]["id"] == "fake"


@unix
def test_what_lies_where_a_unix_socket_shall_be(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    config = ServeConfig(host=f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # a server that was killed leaves it
    with bind(config):
        with pytest.raises(ConfigError, match="another server listens there"):
            bind(config)
        socket.socket(socket.AF_UNIX).connect(str(path))
    path.write_text("mine")
    with pytest.raises(ConfigError, match="a file that is not a socket"):
        bind(config)
    assert path.read_text() == "mine"
    path.unlink()
    with bind(config):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


@unix
@pytest.mark.parametrize(
    ("host", "words"), [("unix:", "the path is missing"), ("unix:/no/such/folder/x", "No such file")]
)
def test_unix_sockets_that_cannot_be(host: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bind(ServeConfig(host=host))
    with pytest.raises(ConfigError, match="too long"):
        bind(ServeConfig(host="unix:/tmp/" + "x" * 200))


def test_spellings_of_a_unix_socket() -> None:
    assert unix_path("unix:/run/m.sock") == unix_path("unix:///run/m.sock") == "/run/m.sock"
    assert unix_path("unix:m.sock") == "m.sock" and unix_path("unix.example") is None
    assert unix_path("unix:~/m.sock") == str(Path.home() / "m.sock")
    assert is_loopback("unix:/run/m.sock")


def test_off_loopback_the_start_says_which_names_are_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only as far as the profile log, which cannot be opened."""

    def start(**options: object) -> str:
        caplog.clear()
        config = ServeConfig(port=0, profile_log=str(tmp_path / "no" / "x"), api_key=["long-enough-key"], **options)  # type: ignore[arg-type]
        with caplog.at_level(logging.WARNING), pytest.raises(ConfigError, match="--profile-log"):
            run_server(config, ModelManager([("fake", FakeEngine())]))
        return caplog.text

    assert "--allowed-host" in start(host="0.0.0.0")
    assert "--allowed-host" not in start(host="0.0.0.0", allowed_host=["box"])
    assert start(host="127.0.0.1") == start(host="localhost") == ""
