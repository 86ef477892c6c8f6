"""The key file (``--key-file``): TOML, a table ``[[key]]`` for everybody who may ask. It is taken whole or not at all.

Nothing that is said of it holds a key: not its errors, and not the log.
"""

from __future__ import annotations

import hashlib
import logging
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mullama.config import check_key
from mullama.errors import ConfigError

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20
MAX_KEYS = 1000  # all are read on the event loop, when a running server reads them again

_NAME = re.compile(r"(?!key-)[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Limit = Annotated[int, Meta(ge=1, le=1 << 40)]


class KeyEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A table of the file. Several keys of one name are one client, while a new key takes the place of an old one."""

    name: str
    key: str | list[str] = []
    sha256: str | list[str] = []  # of keys that the file shall not hold
    role: Literal["user", "admin"] = "user"
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None
    priority_floor: Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)] | None = None  # none is more urgent
    models: list[str] | None = None  # served names, or patterns of them such as qwen*; None: all

    def may_use(self, model: str) -> bool:
        """``model`` is a served name."""
        return self.models is None or any(fnmatchcase(model.lower(), pattern.lower()) for pattern in self.models)

    def digests(self) -> list[bytes]:
        """SHA-256 of its keys."""
        keys = [self.key] if isinstance(self.key, str) else self.key
        shown = [self.sha256] if isinstance(self.sha256, str) else self.sha256
        return [digest_of(key.encode()) for key in keys] + [bytes.fromhex(one) for one in shown]


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    key: list[KeyEntry] = []


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_key_file(path: str) -> list[KeyEntry]:
    """Raises ConfigError, which names the file and the entry, and never a key."""
    source = f"--key-file {path}"
    try:
        file = Path(path)
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        if file.stat().st_mode & 0o004:
            log.warning("%s: every user of this machine may read it; chmod o-r keeps the keys to yourself", source)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}", param="key_file") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{source}: it is larger than {MAX_BYTES} bytes", param="key_file")
    try:
        entries = msgspec.toml.decode(data, type=_KeyFile).key
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: {error}", param="key_file") from None
    if not 0 < len(entries) <= MAX_KEYS:
        raise ConfigError(f"{source}: it has {len(entries)} tables [[key]], not 1 to {MAX_KEYS}", param="key_file")
    names = set()
    for number, entry in enumerate(entries, 1):
        where = f"{source}: [[key]] {number}"
        if not _NAME.fullmatch(entry.name):
            raise ConfigError(
                f"{where}: a name has 1 to 64 letters, digits and . _ @ -, and does not begin with key-",
                param="key_file",
            )
        where += f" ({entry.name})"
        if entry.name in names:
            raise ConfigError(f"{where}: there are two of this name", param="key_file")
        names.add(entry.name)
        _check(entry, where)
    return entries


def _check(entry: KeyEntry, where: str) -> None:
    for key in [entry.key] if isinstance(entry.key, str) else entry.key:
        check_key(key, f"{where}: key")
    for one in [entry.sha256] if isinstance(entry.sha256, str) else entry.sha256:
        if not _SHA256.fullmatch(one):
            raise ConfigError(f"{where}: sha256 must be 64 hexadecimal digits in lower case", param="key_file")
    if not entry.key and not entry.sha256:
        raise ConfigError(f"{where}: it has neither key nor sha256", param="key_file")
    limits = ("requests_per_minute", "tokens_per_minute", "concurrent", "priority_floor", "models")
    if entry.role == "admin" and (named := [name for name in limits if getattr(entry, name) is not None]):
        raise ConfigError(f"{where}: an admin has no limits, but it has {', '.join(named)}", param="key_file")
    if entry.models is not None and not (entry.models and all(entry.models)):
        raise ConfigError(f"{where}: models must be names of models; leave it out to allow all", param="key_file")
