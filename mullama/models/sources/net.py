"""HTTP for sources that take addresses from users: no connection goes to an address that is not public.

The name of every host is resolved here, once a connection; the address is checked and the connection is made to that
very address. So neither a redirect nor a name that resolves differently a moment later (DNS rebinding) reaches what
only this machine or its network may reach. ``allow_private_sources`` switches the check off; hosts of the user's own
settings (``OLLAMA_REGISTRY``) are exempt.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpcore
import httpx

from mullama.errors import PrivateAddress, StoreError
from mullama.models.sources.private_addresses import VARIABLE, quiet_logs

CONNECT_SECONDS = 20.0
READ_SECONDS = 60.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
#: Host and port to the texts of its addresses. Raises OSError.
Resolve = Callable[[str, int], list[str]]

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet. False for what is no address."""
    try:
        parsed: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is None and parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:  # an address in another's clothes
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, in the system's order. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


class CheckedBackend(httpcore.NetworkBackend):
    """Connects to public addresses only, and to hosts in ``trusted`` (host, port)."""

    def __init__(
        self,
        *,
        trusted: Iterable[tuple[str, int]] = (),
        resolver: Resolve = resolve,
        inner: httpcore.NetworkBackend | None = None,
    ) -> None:
        self._trusted = frozenset(trusted)
        self._resolve = resolver
        self._inner = inner or httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Raises PrivateAddress, httpcore.ConnectError, httpcore.ConnectTimeout."""
        if (host.lower(), port) in self._trusted:
            return self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        try:
            addresses = self._resolve(host, port)
        except OSError as error:
            raise httpcore.ConnectError(f"the name {host} cannot be resolved: {error.strerror or error}") from error
        # One private address among public ones is as telling as a private one alone.
        private = [address for address in addresses if not is_public(address)]
        if private or not addresses:
            raise refused(host, private[0] if private else None)
        last: Exception = httpcore.ConnectError(f"cannot connect to {host}")
        for address in addresses:
            try:
                return self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        raise last

    def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        raise httpcore.ConnectError("no source is reached by a socket file")


class CheckedTransport(httpx.BaseTransport):
    """httpx over a pool whose connections :class:`CheckedBackend` makes."""

    def __init__(self, backend: httpcore.NetworkBackend) -> None:
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context(), network_backend=backend, http1=True, max_connections=8, retries=0
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        core = httpcore.Request(
            method=request.method,
            url=httpcore.URL(
                scheme=request.url.raw_scheme,
                host=request.url.raw_host,
                port=request.url.port,
                target=request.url.raw_path,
            ),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _as_httpx(request):
            reply = self._pool.handle_request(core)
        return httpx.Response(
            status_code=reply.status,
            headers=reply.headers,
            stream=_Body(reply, request),
            extensions=reply.extensions,
        )

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, reply: httpcore.Response, request: httpx.Request) -> None:
        self._reply = reply
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx(self._request):
            yield from self._reply.iter_stream()

    def close(self) -> None:
        self._reply.close()


@contextlib.contextmanager
def _as_httpx(request: httpx.Request) -> Iterator[None]:
    """The lower library's errors under the names of httpx."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise httpx.TimeoutException(str(error) or "no answer in time", request=request) from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
        raise httpx.TransportError(str(error) or type(error).__name__, request=request) from error


def ssl_context() -> ssl.SSLContext:
    """Certificates as httpx finds them; ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` hold."""
    return httpx.create_ssl_context()


def make_client(*, allow_private: bool, trusted: Iterable[tuple[str, int]] = ()) -> httpx.Client:
    """A client that follows no redirect by itself and asks for no compression.

    Where the environment names a proxy for a host, the proxy resolves that host's name, and only addresses that are
    written out can be checked here; see :func:`check_url`.
    """
    quiet_logs()
    headers = {"User-Agent": "mullama", "Accept-Encoding": "identity"}
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    direct: httpx.BaseTransport = (
        httpx.HTTPTransport(verify=ssl_context())
        if allow_private
        else CheckedTransport(CheckedBackend(trusted=trusted))
    )
    mounts: dict[str, httpx.BaseTransport] = {
        f"{scheme}://": httpx.HTTPTransport(proxy=proxy, verify=ssl_context()) for scheme, proxy in proxies().items()
    }
    mounts |= {f"{scheme}{host}": direct for scheme in tuple(mounts) for host in _no_proxy()}
    return httpx.Client(
        transport=direct, mounts=mounts, headers=headers, timeout=timeout, follow_redirects=False, trust_env=False
    )


def proxies() -> dict[str, str]:
    """Scheme -> proxy, of the user's environment."""
    found = {}
    for scheme, proxy in urllib.request.getproxies().items():
        if scheme in ("http", "https") and proxy and "*" not in _no_proxy():
            found[scheme] = proxy if "://" in proxy else f"http://{proxy}"
    return found


def _no_proxy() -> list[str]:
    """The hosts that ``NO_PROXY`` exempts, each with the pattern of its subdomains; "*" for all."""
    listed = [host.strip() for host in urllib.request.getproxies().get("no", "").split(",")]
    if "*" in listed:
        return ["*"]
    hosts = [host.lstrip("*.") for host in listed]
    return [pattern for host in hosts if host for pattern in (host, f"*.{host}")]


def check_url(url: httpx.URL, *, allow_private: bool, trusted: Iterable[tuple[str, int]] = ()) -> None:
    """What can be said of an address before anybody connects. Raises StoreError: not HTTPS, a private address.

    Plain HTTP is for sources at private addresses and needs the same leave.
    """
    port = url.port or (443 if url.scheme == "https" else 80)
    if allow_private or (url.host.lower(), port) in set(trusted):
        if url.scheme not in ("http", "https"):
            raise StoreError(f"{shown(url)} is not a web address")
        return
    if url.scheme != "https":
        raise PrivateAddress(
            f"{shown(url)} is not HTTPS; plain HTTP is only used with --allow-private-sources ({VARIABLE}=1)"
        )
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(url.host)
        if not is_public(str(address)):
            raise refused(url.host, url.host)
    if url.host.lower().rstrip(".") == "localhost" or url.host.lower().rstrip(".").endswith(".localhost"):
        raise refused(url.host, None)


def refused(host: str, address: str | None) -> PrivateAddress:
    what = f"{host} is at the address {address}, which" if address and address != host else host
    return PrivateAddress(
        f"{what} is not on the public internet; such sources are only used with --allow-private-sources ({VARIABLE}=1)"
    )


def shown(url: httpx.URL) -> str:
    """An address for a message: without user, password, query and fragment, which may hold secrets."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))
