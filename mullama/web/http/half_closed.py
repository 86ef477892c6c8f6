"""Connections whose client has sent the end of its stream: does it wait for the answer, or is it gone?

A client that shuts its sending half (``SHUT_WR``) and one that closes its socket send the same FIN. The first is
answered; the second is noticed when something is sent to it, which for a whole answer may be minutes of computing too
late. So the system is asked from time to time, without a byte that a client could see:

1. A Unix socket reports a hang-up once both halves are closed.
2. The other end of a loopback connection is a socket of this machine, and Linux says whether a process still has it.
3. Elsewhere TCP's keep-alive probes ask: a client that waits acknowledges them. Linux soon forgets the state of a
   socket that nobody has any more, and then does not.
"""

from __future__ import annotations

import asyncio
import ipaddress
import select
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

CHECK_SECONDS = (0.005, 0.05, 0.25)  # after the end of the stream, and the last one again and again
#: Seconds until the first probe, between probes, and how many may stay without an answer.
PROBES = (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4))

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBBI")  # struct inet_diag_req_v2, up to its id
_PORTS = struct.Struct(">HH16s16s")  # struct inet_diag_sockid: ports and addresses in network order,
_REST = struct.Struct("=III")  # the interface, and a cookie of which all bits mean "any"
_ANY_COOKIE = 0xFFFFFFFF
_INODE_AT = _HEADER.size + 4 + _PORTS.size + _REST.size + 16  # in the answer, a struct inet_diag_msg


class HalfClosed:
    """Calls ``on_gone`` once the client of ``transport`` is surely gone. On the event loop; ``close`` ends it."""

    def __init__(self, transport: asyncio.Transport, on_gone: Callable[[], None]) -> None:
        self._socket = transport.get_extra_info("socket")
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._intervals = list(reversed(CHECK_SECONDS))
        if self._socket is not None and self._socket.family in (socket.AF_INET, socket.AF_INET6):
            _probe(self._socket)
        self._timer = self._loop.call_later(self._intervals[-1], self._check)

    def _check(self) -> None:
        if self._socket is None or is_gone(self._socket):
            self._on_gone()
            return
        if len(self._intervals) > 1:
            self._intervals.pop()
        self._timer = self._loop.call_later(self._intervals[-1], self._check)

    def close(self) -> None:
        self._timer.cancel()


def _probe(sock: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def is_gone(sock: Any) -> bool:
    """Whether nobody is left at the other end of a connected socket whose stream has ended; False where unknown."""
    try:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return True  # it was reset, or nothing came back for the probes
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            return has_no_owner(sock.getpeername()[:2], sock.getsockname()[:2])
        poll = select.poll()
        poll.register(sock.fileno(), 0)  # a hang-up is reported whatever is asked for
        return any(event & select.POLLHUP for _, event in poll.poll(0))
    except (OSError, AttributeError):  # closed meanwhile, or a system without poll
        return bool(sock.fileno() < 0)


def has_no_owner(end: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether no process has the socket at ``end`` of a TCP connection any more; False where it is not known.

    Only the ends of connections within this machine are looked at.
    """
    if not sys.platform.startswith("linux"):
        return False
    if end[0] != other[0] and not ipaddress.ip_address(end[0].partition("%")[0]).is_loopback:
        return False
    # Systems that cannot say it do not know our own end either.
    return bool(_inode(other, end)) and not _inode(end, other)


def _inode(end: tuple[str, int], other: tuple[str, int]) -> int | None:
    """The inode of a TCP socket, 0 when no process has it, None when the system does not know it (sock_diag(7))."""
    family = socket.AF_INET6 if ":" in end[0] else socket.AF_INET
    addresses = [socket.inet_pton(family, host.partition("%")[0]) for host in (end[0], other[0])]
    request = (
        _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
        + _PORTS.pack(end[1], other[1], *addresses)
        + _REST.pack(0, _ANY_COOKIE, _ANY_COOKIE)
    )
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as diag:
            diag.setblocking(False)  # the kernel answers within the call
            size = _HEADER.size + len(request)
            diag.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request)
            answer = diag.recv(4096)
    except OSError:
        return None
    if len(answer) < _INODE_AT + 4 or _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    inode: int = struct.unpack_from("=I", answer, _INODE_AT)[0]
    return inode
