"""Where the server listens: an address, a name with all of its addresses, or a Unix socket."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Any

from mullama.config import ServeConfig
from mullama.errors import ConfigError

BACKLOG = 2048
UNIX = "unix:"
_TRIES = 20  # free ports that are looked at until one is free at all addresses


def unix_path(host: str) -> str | None:
    """The path of a host that is a Unix socket, ``unix:/path`` (or ``unix:///path``); None for others."""
    if not host.startswith(UNIX):
        return None
    path = host.removeprefix(UNIX)
    path = path[2:] if path.startswith("//") else path
    return str(Path(path).expanduser()) if path.startswith("~") else path


def plain_host(host: str) -> str:
    """A host without the brackets that an IPv6 address has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_loopback(host: str) -> bool:
    """Whether what listens there is reachable from this machine only."""
    if unix_path(host) is not None:
        return True
    try:
        return ipaddress.ip_address(plain_host(host)).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Listener(socket.socket):
    """A socket that listens, with those of the other addresses of the same name (``others``), which it closes too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.others: list[socket.socket] = []
        self._path: Path | None = None  # of a Unix socket: it goes with this
        self._made: os.stat_result | None = None

    @property
    def all(self) -> list[socket.socket]:
        return [self, *self.others]

    def owns(self, path: Path) -> None:
        """Remove ``path`` when this is closed, unless it is another one by then."""
        self._path, self._made = path, path.stat()

    def close(self) -> None:
        super().close()
        for other in self.others:
            other.close()
        if self._path is not None and self._made is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(self._path.stat(), self._made):
                    self._path.unlink()
            self._path = None


def bind(config: ServeConfig) -> Listener:
    """Listen where ``config`` says. Clients that connect before ``run_server`` wait for it.

    Raises ConfigError, one line, when the address cannot be had.
    """
    path = unix_path(config.host)
    if path is not None:
        return _bind_unix(path)
    host = plain_host(config.host)
    where = f"{config.host}:{config.port}"
    for left in reversed(range(_TRIES)):
        found = _addresses(host, config.port, where)
        first = None
        try:
            first = _listen(*found[0])
            for family, address in found[1:]:
                with contextlib.suppress(_NotHere):
                    first.others.append(_listen(family, (address[0], first.getsockname()[1], *address[2:])))
            return first
        except OSError as error:
            if first is not None:
                first.close()
                if config.port == 0 and left:
                    continue  # that one was free at the first address only
            raise ConfigError(f"cannot listen on {where}: {_reason(error)}", param="port") from None
    raise AssertionError("unreachable")  # pragma: no cover


class _NotHere(OSError):
    """This machine has no such address, or not its family."""


def _addresses(host: str, port: int, where: str) -> list[tuple[int, Any]]:
    """(family, address) of all that a name stands for, the IPv4 ones first: most clients expect those."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ConfigError(
            f"cannot listen on {where}: '{host}' is not an address of this machine", param="host"
        ) from None
    addresses = {(int(family), address) for family, _, _, _, address in found}
    if host.lower() == "localhost":  # whatever the machine's list of hosts says
        addresses |= {(int(socket.AF_INET), ("127.0.0.1", port)), (int(socket.AF_INET6), ("::1", port, 0, 0))}
    return sorted(addresses, key=lambda one: (one[0] != socket.AF_INET, str(one)))


def _listen(family: int, address: Any) -> Listener:
    try:
        sock = Listener(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _NotHere(*error.args) from None
    try:
        if sys.platform != "win32":  # there it would let two servers share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # :: means IPv4 as well, whatever the system's default
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise _NotHere(*error.args) from None
        raise
    return sock


def _bind_unix(path: str) -> Listener:
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError("cannot listen on a Unix socket: this system has none", param="host")
    where = f"cannot listen on {UNIX}{path}"
    if not path:
        raise ConfigError(f"{where}: the path is missing; it must look like {UNIX}/run/mullama.sock", param="host")
    sock = Listener(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(Path(path))
        sock.bind(path)
        sock.owns(Path(path))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(f"{where}: {error.strerror or error}", param="host") from None
    return sock


def _clear(path: Path) -> None:
    """Remove what a server that is gone has left there. Raises OSError when something else is there."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "there is a file that is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another server listens there")


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; choose another one with --port, or 0 for a free one"
    if error.errno == errno.EACCES:
        return "permission denied; ports below 1024 are reserved"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address"
    return error.strerror or str(error)


def url_of(config: ServeConfig, sock: socket.socket) -> str:
    """Where a client on this machine reaches the socket; the real port when a free one was asked for."""
    path = unix_path(config.host)
    if path is not None:
        return f"{UNIX}{path}"
    port = sock.getsockname()[1]
    host = plain_host(config.host)
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = "localhost"
        elif address.version == 6:
            host = f"[{host}]"
    return f"http://{host}:{port}"
