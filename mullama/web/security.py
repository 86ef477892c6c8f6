"""Who may ask what: the Host allow-list, the API key, the admin key.

The Host check keeps a web page from reaching a local server through DNS rebinding: such a request carries the
attacker's name. Keys are checked once the route is known, by the resource's ``access``, and never by the path's
spelling: Falcon routes ``//v1/models`` like ``/v1/models``.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
from typing import Any

import falcon
import falcon.asgi

from mullama.config import ServeConfig
from mullama.errors import AuthenticationError, ConfigError, PermissionDenied, UnsupportedMediaType
from mullama.web.request import Request

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Access(enum.Enum):
    """What a resource asks of its callers; a class attribute ``access`` of the resource."""

    OPEN = "open"  # no key: health checks
    CLIENT = "client"  # the API key, when one is set
    INTERNAL = "internal"  # reading: either key, when an API key is set; writing: see Security


def is_loopback(host: str) -> bool:
    """Whether a listening address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_name(header: str) -> str:
    """The name in a Host header: lower case, without port, brackets and trailing dot."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.rstrip(".")


class Security:
    """Falcon middleware. Raises AuthenticationError, PermissionDenied, UnsupportedMediaType."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises ConfigError when tenants shall be kept apart and no API key tells them apart."""
        self._api_keys = [key.encode() for key in config.api_key if key]
        if config.cache_salt_per_key and not self._api_keys:
            raise ConfigError("--cache-salt-per-key needs an --api-key", param="cache_salt_per_key")
        self._names_tenants = len(self._api_keys) > 1 or config.cache_salt_per_key
        self._admin_key = config.admin_key.encode()
        self._on_loopback = is_loopback(config.host)
        self._any_host = "*" in config.allowed_host
        self._hosts = {"localhost", "127.0.0.1", "::1", host_name(config.host), *map(host_name, config.allowed_host)}
        # Off loopback, clients use whichever address the machine has. An address cannot be rebound, only a name can.
        self._any_address = not self._on_loopback
        self._seen: set[str] = set()  # PERF: raw headers already accepted

    async def process_request(self, req: Request, resp: falcon.asgi.Response) -> None:
        if self._any_host:
            return
        header = req.get_header("Host")
        if header in self._seen:
            return
        if header is None:
            if req.scope.get("http_version") == "1.0":
                return  # no browser speaks it
            raise PermissionDenied("the request has no Host header")
        if not self._host_allowed(host_name(header)):
            raise PermissionDenied(
                f"the host '{header}' is not allowed; start the server with --allowed-host to accept it"
            )
        if len(self._seen) < 64:
            self._seen.add(header)

    def _host_allowed(self, name: str) -> bool:
        if name in self._hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address or address.is_loopback

    async def process_resource(
        self, req: Request, resp: falcon.asgi.Response, resource: object, params: dict[str, Any]
    ) -> None:
        access = getattr(resource, "access", Access.CLIENT)
        if access is Access.OPEN:
            return
        if access is Access.CLIENT:
            if self._api_keys:
                given = _bearer(req)
                if not self._is_client(given):
                    raise _unauthenticated("the API key")
                if self._names_tenants:
                    req.tenant = tenant_of(given)
            return
        given = _bearer(req)
        if req.method not in _SAFE_METHODS:
            self._check_write(req)
        elif self._api_keys and not (self._is_client(given) or _same(given, self._admin_key)):
            raise _unauthenticated("the API key or the admin key")
        if self._names_tenants and self._is_client(given):
            req.tenant = tenant_of(given)
        req.is_operator = _same(given, self._admin_key) if self._admin_key else self._on_loopback

    def _is_client(self, given: bytes) -> bool:
        # Every key is compared, so that the time taken does not tell which one was nearly right.
        return sum(_same(given, key) for key in self._api_keys) > 0

    def _check_write(self, req: Request) -> None:
        """A write under /internal: a type that no HTML form can send, and the admin key where it is needed."""
        media_type = (req.content_type or "").partition(";")[0].strip().lower()
        if media_type != falcon.MEDIA_JSON:
            raise UnsupportedMediaType("writes under /internal need 'Content-Type: application/json'")
        if self._admin_key:
            if not _same(_bearer(req), self._admin_key):
                raise PermissionDenied("writes under /internal need 'Authorization: Bearer <the admin key>'")
        elif not self._on_loopback:
            raise PermissionDenied(
                "writes under /internal are off: the server is not on loopback and has no --admin-key"
            )
        elif self._api_keys and not self._is_client(_bearer(req)):
            raise _unauthenticated("the API key")


def tenant_of(key: bytes) -> str:
    """A name for who holds a key that does not give the key away."""
    return f"key-{hashlib.sha256(key).hexdigest()[:8]}"


def salt_of(tenant: str | None, salt: str | None) -> str:
    """What keeps a request's KV apart from others': its own salt, and before it the tenant that must share with nobody.

    No tenant's name has a NUL, so no salt can pass for another tenant's.
    """
    return salt or "" if tenant is None else f"{tenant}\0{salt or ''}"


def _bearer(req: Request) -> bytes:
    """The bearer token of the request, empty when there is none."""
    scheme, _, token = (req.get_header("Authorization") or "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _same(given: bytes, key: bytes) -> bool:
    return bool(key) and hmac.compare_digest(given, key)


def _unauthenticated(key: str) -> AuthenticationError:
    return AuthenticationError(
        f"this needs {key}: 'Authorization: Bearer <key>', and the one given is missing or wrong"
    )
