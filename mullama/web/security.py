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
import logging
from typing import Any

import falcon
import falcon.asgi

from mullama.config import ServeConfig
from mullama.errors import AuthenticationError, ConfigError, PermissionDenied, UnsupportedMediaType
from mullama.web.http.listening import is_loopback, unix_path
from mullama.web.http.request import Request

log = logging.getLogger(__name__)

#: Where clients of other makers put the key: Anthropic's, Azure's.
_KEY_HEADERS = ("X-Api-Key", "Api-Key")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Access(enum.Enum):
    """What a resource asks of its callers; a class attribute ``access`` of the resource."""

    OPEN = "open"  # no key: health checks
    CLIENT = "client"  # the API key, when one is set
    INTERNAL = "internal"  # reading: any key, a client is shown its own; writing: an operator
    OPERATOR = "operator"  # an operator, for reading as well


def host_name(header: str) -> str:
    """The name in a Host header: lower case, without port, brackets and trailing dot."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.rstrip(".")


class Security:
    """Falcon middleware: marks each request with its tenant and with whether an operator sent it.

    An operator holds the admin key. Without one it is whoever reaches a server on loopback that has at most one API
    key (and holds that): there is nobody to hide from. Raises AuthenticationError, PermissionDenied,
    UnsupportedMediaType.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Raises ConfigError when keys shall share the cache and there are not several."""
        self.take_keys(config)
        self._on_loopback = is_loopback(config.host)
        if not self._on_loopback and not self._api_keys:
            log.warning("anybody who reaches %s:%d may use the models: there is no --api-key", config.host, config.port)
        # No page's request comes through a Unix socket.
        self._any_host = "*" in config.allowed_host or unix_path(config.host) is not None
        for name in config.allowed_host:
            if "/" in name:
                raise ConfigError(
                    f"--allowed-host: '{name}' is not a host name; leave out http:// and paths", param="allowed_host"
                )
        names = [host_name(name.removeprefix("*")) if name != "*" else name for name in config.allowed_host]
        self._domains = tuple(name for name in names if name.startswith("."))
        self._hosts = {"localhost", "127.0.0.1", "::1", host_name(config.host), *names}
        self._hosts |= {domain[1:] for domain in self._domains}
        # Off loopback, clients use whichever address the machine has. An address cannot be rebound, only a name can.
        self._any_address = not self._on_loopback
        self._seen: set[str] = set()  # PERF: raw headers already accepted

    def take_keys(self, config: ServeConfig) -> None:
        """The keys that count from now on. Raises ConfigError as ``Security`` does."""
        names_tenants = len(config.api_key) > 1
        if config.cache_shared_by_keys and not names_tenants:
            raise ConfigError("--cache-shared-by-keys needs several --api-key", param="cache_shared_by_keys")
        self._api_keys = [key.encode() for key in config.api_key]
        self._names_tenants = names_tenants
        self._admin_key = config.admin_key.encode()

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
        if name in self._hosts or name.endswith(self._domains):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address or address.is_loopback

    async def process_resource(
        self, req: Request, resp: falcon.asgi.Response, resource: object, params: dict[str, Any]
    ) -> None:
        access = getattr(resource, "access", Access.OPERATOR)  # what forgets to say so is shown to nobody else
        req.spell_error = getattr(resource, "spell_error", None)
        given = _key(req) if self._api_keys or self._admin_key else b""
        is_client = self._is_client(given)
        is_admin = _same(given, self._admin_key)
        if self._admin_key:
            req.is_operator = is_admin
        else:
            req.is_operator = self._on_loopback and not self._names_tenants and (is_client or not self._api_keys)
        if self._names_tenants and is_client:
            req.tenant = tenant_of(given)
        if access is Access.OPEN or req.method == "OPTIONS":  # a browser asks what it may send before it sends the key
            return
        if access is Access.CLIENT:
            if self._api_keys and not is_client:
                raise _unauthenticated("the API key")
            return
        is_write = req.method not in _SAFE_METHODS
        if is_write and _takes(resource, req.method, params):  # else it is answered with 405
            _check_type(req)
        needs_operator = is_write or access is Access.OPERATOR
        if needs_operator and self._admin_key and not is_admin and (is_write or is_client or not self._api_keys):
            raise PermissionDenied("this needs 'Authorization: Bearer <the admin key>'")
        if self._api_keys and not (is_client or is_admin):
            raise _unauthenticated("the API key or the admin key" if self._admin_key else "the API key")
        if needs_operator and not req.is_operator:
            raise PermissionDenied(self._why_nobody())

    def _is_client(self, given: bytes) -> bool:
        # Every key is compared, so that the time taken does not tell which one was nearly right.
        return sum([_same(given, key) for key in self._api_keys]) > 0

    def _why_nobody(self) -> str:
        """Why nobody at all is an operator of this server."""
        why = "several --api-key" if self._on_loopback else "an address that is not loopback"
        return f"this is off: a server with {why} needs an --admin-key for it"


def _takes(resource: object, method: str, params: dict[str, Any]) -> bool:
    takes = getattr(resource, "takes", None)
    return takes(method, **params) if takes is not None else hasattr(resource, f"on_{method.lower()}")


def _check_type(req: Request) -> None:
    """A write under /internal has a type that no HTML form can send. Raises UnsupportedMediaType."""
    media_type = (req.content_type or "").partition(";")[0].strip().lower()
    if media_type != falcon.MEDIA_JSON:
        raise UnsupportedMediaType("writes under /internal need 'Content-Type: application/json'")


def tenant_of(key: bytes) -> str:
    """A name for who holds a key that does not give the key away."""
    return f"key-{hashlib.sha256(key).hexdigest()[:8]}"


def salt_of(tenant: str | None, salt: str | None) -> str:
    """What keeps a request's KV apart from others': its own salt, and before it the tenant that must share with nobody.

    No tenant's name has a NUL, so no salt can pass for another tenant's.
    """
    return salt or "" if tenant is None else f"{tenant}\0{salt or ''}"


def _key(req: Request) -> bytes:
    """The key that came with the request, empty when there is none: a bearer token first."""
    scheme, _, token = (req.get_header("Authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip().encode("latin-1")
    for name in _KEY_HEADERS:
        if key := (req.get_header(name) or "").strip():
            return key.encode("latin-1")
    return b""


def _same(given: bytes, key: bytes) -> bool:
    return bool(key) and hmac.compare_digest(given, key)


def _unauthenticated(key: str) -> AuthenticationError:
    return AuthenticationError(
        f"this needs {key}: 'Authorization: Bearer <key>', and the one given is missing or wrong"
    )
