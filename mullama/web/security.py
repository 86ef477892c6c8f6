"""Who may ask what: the Host allow-list, the API key, the admin key.

The Host check keeps a web page from reaching a local server through DNS rebinding: such a request carries the
attacker's name. Keys are checked once the route is known, by the resource's ``access``, and never by the path's
spelling: Falcon routes ``//v1/models`` like ``/v1/models``.
"""

from __future__ import annotations

import enum
import ipaddress
import logging
from typing import Any

import falcon
import falcon.asgi

from mullama.config import ServeConfig
from mullama.errors import AuthenticationError, ConfigError, PermissionDenied, UnsupportedMediaType
from mullama.serving.served_models import VISIBLE
from mullama.web.http.listening import is_loopback, unix_path
from mullama.web.http.request import PERMIT, Request
from mullama.web.keys.key_ring import KeyRing

log = logging.getLogger(__name__)

#: Where clients of other makers put the key: Anthropic's, Azure's.
_KEY_HEADERS = ("X-Api-Key", "Api-Key")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


#: In the scope of a request that the server itself makes, which no client can set: (tenant,).
INSIDE = "mullama.inside"


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
        self._ring = KeyRing(config)
        self._on_loopback = is_loopback(config.host)
        if not self._on_loopback and not self._ring.has_users:
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
        """The keys that count from now on. Raises ConfigError as ``Security`` does; then those that held go on to hold.

        What clients have used of their limits stays used.
        """
        self._ring = KeyRing(config, self._ring)

    async def process_request(self, req: Request, resp: falcon.asgi.Response) -> None:
        if self._any_host or INSIDE in req.scope:
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
        if access is Access.CLIENT and INSIDE in req.scope:
            self._mark_inside(req)
            return
        ring = self._ring
        key = req.key = ring.find(_key(req)) if ring.has_users or ring.has_admins else None
        is_admin = key is not None and key.is_admin
        is_client = key is not None and not key.is_admin
        if ring.has_admins:
            req.is_operator = is_admin
        else:
            req.is_operator = self._on_loopback and not ring.names_tenants and (is_client or not ring.has_users)
        if key is not None and is_client:
            if ring.names_tenants:
                req.tenant = key.name
            if key.entry.models is not None:
                VISIBLE.set(key.entry.may_use)
        if access is Access.OPEN or req.method == "OPTIONS":  # a browser asks what it may send before it sends the key
            return
        if access is Access.CLIENT:
            if ring.has_users and not is_client:
                raise _unauthenticated("the API key")
            if key is not None and req.method not in _SAFE_METHODS and getattr(resource, "counts", True):
                req.scope[PERMIT] = key.admit()
            return
        is_write = req.method not in _SAFE_METHODS
        if is_write and _takes(resource, req.method, params):  # else it is answered with 405
            _check_type(req)
        needs_operator = is_write or access is Access.OPERATOR
        if needs_operator and ring.has_admins and not is_admin and (is_write or is_client or not ring.has_users):
            raise PermissionDenied("this needs 'Authorization: Bearer <the admin key>'")
        if ring.has_users and key is None:
            raise _unauthenticated("the API key or the admin key" if ring.has_admins else "the API key")
        if needs_operator and not req.is_operator:
            raise PermissionDenied(self._why_nobody())

    def _mark_inside(self, req: Request) -> None:
        """A tenant's own request that the server makes: it is one of its key's, with the limits of that.

        Raises AuthenticationError for a tenant who has no key any more, RateLimited.
        """
        (req.tenant,) = req.scope[INSIDE]
        key = next((one for one in self._ring.holders() if one.name == req.tenant), None)
        if req.tenant is not None and key is None:
            raise AuthenticationError(f"'{req.tenant}' has no key here any more")
        VISIBLE.set(key.entry.may_use if key is not None and key.entry.models is not None else None)
        if key is not None:
            req.key = key
            req.scope[PERMIT] = key.admit()

    async def process_response(
        self, req: Request, resp: falcon.asgi.Response, resource: object, req_succeeded: bool
    ) -> None:
        if req.key is not None:
            for name, value in req.key.usage.headers():
                resp.set_header(name, value)

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


def _unauthenticated(key: str) -> AuthenticationError:
    return AuthenticationError(
        f"this needs {key}: 'Authorization: Bearer <key>', and the one given is missing or wrong"
    )
