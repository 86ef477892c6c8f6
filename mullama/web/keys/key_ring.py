"""All keys of a server, and whose a given one is."""

from __future__ import annotations

import hmac
import secrets

from mullama.config import ServeConfig
from mullama.errors import ConfigError
from mullama.web.keys.key_file import KeyEntry, digest_of, read_key_file
from mullama.web.keys.rate_limits import Permit, Usage


class Key:
    """Who holds a key, what it may do, and what it has used."""

    def __init__(self, entry: KeyEntry, usage: Usage) -> None:
        self.entry = entry
        self.is_admin = entry.role == "admin"
        self.usage = usage
        usage.limit(entry.requests_per_minute or 0, entry.tokens_per_minute or 0, entry.concurrent or 0)
        self._is_limited = any((entry.requests_per_minute, entry.tokens_per_minute, entry.concurrent))

    @property
    def name(self) -> str:
        return self.entry.name

    def admit(self) -> Permit | None:
        """The right to a request; None: there are no limits. Raises RateLimited."""
        return self.usage.admit() if self._is_limited else None

    def priority(self, wanted: int) -> int:
        """What becomes of a request's priority: lower is more urgent."""
        floor = self.entry.priority_floor
        return wanted if floor is None else max(wanted, floor)


class KeyRing:
    """Those of ``--api-key``, ``--admin-key`` and ``--key-file``.

    SAFETY: a key is found by a digest that is made with a secret of this process, so that the time which that takes
    tells nothing of any key.
    """

    def __init__(self, config: ServeConfig, before: KeyRing | None = None) -> None:
        """``before``: the keys that held until now; what their holders have used stays used.

        Raises ConfigError, and then nothing has changed.
        """
        entries = [KeyEntry(name=tenant_of(key.encode()), key=key) for key in config.api_key]
        if config.admin_key:
            entries.append(KeyEntry(name="admin-key", key=config.admin_key, role="admin"))
        from_file = read_key_file(config.key_file) if config.key_file else []
        entries += from_file
        digests = [digest for entry in entries for digest in entry.digests()]
        if len(set(digests)) < len(digests):
            raise ConfigError("--key-file: a key is there twice, or is an --api-key or the --admin-key as well")
        users = [entry for entry in entries if entry.role == "user"]
        self.has_users = bool(users)
        self.has_admins = len(users) < len(entries)
        #: Whether clients are told apart: by the key file always, else where there are several.
        self.names_tenants = bool(from_file) or len(users) > 1
        if config.cache_shared_by_keys and len(users) < 2:
            raise ConfigError("--cache-shared-by-keys needs several --api-key", param="cache_shared_by_keys")
        if before is not None and before.has_users and not self.has_users:
            raise ConfigError("it has no API key any more; a restart opens the server to everyone", param="api_key")
        if before is not None and before.has_admins and not self.has_admins:
            raise ConfigError("it has no admin key any more; a restart does without one", param="admin_key")
        old = {} if before is None else {key.name: key.usage for key in before.holders()}
        self._secret = secrets.token_bytes(32)
        self._found: dict[bytes, Key] = {}
        for entry in entries:
            key = Key(entry, old.get(entry.name) or Usage())
            self._found |= {self._blinded(digest): key for digest in entry.digests()}

    def holders(self) -> list[Key]:
        return list(dict.fromkeys(self._found.values()))

    def find(self, given: bytes) -> Key | None:
        """Whose key that is."""
        return self._found.get(self._blinded(digest_of(given))) if given else None

    def _blinded(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")


def tenant_of(key: bytes) -> str:
    """A name for who holds a key that does not give the key away."""
    return f"key-{digest_of(key).hex()[:8]}"
