"""The protocol of Ollama's registry: a manifest that names layers, blobs by digest, a token where one is wanted."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx

from mullama.errors import StoreError
from mullama.models.sources.base import Fetched, FetchedFile, Job
from mullama.models.sources.download import Fetcher
from mullama.models.sources.net import make_client
from mullama.models.sources.ollama_location import Location
from mullama.models.sources.selection import quant_of
from mullama.models.store.entry import is_digest

REGISTRY = "https://registry.ollama.ai"
VARIABLE = "OLLAMA_REGISTRY"

_ACCEPT = ", ".join(
    (
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
    )
)
_LAYER = "application/vnd.ollama.image."
_MANIFEST_BYTES = 4 << 20
_TEXT_BYTES = 4 << 20
_TOKEN_BYTES = 1 << 20
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Layer:
    kind: str  # model, template, system, params, license, …
    digest: str  # hex
    size: int


def obtain(location: Location, job: Job) -> Fetched:
    """Have the model's weights ready in ``job.folder``, or in the store. Raises ReferenceNotFound, StoreError."""
    base, trusted = _registry(location)
    with make_client(allow_private=job.allow_private, trusted=trusted) as client:
        fetcher = Fetcher(client, allow_private=job.allow_private, trusted=trusted, authorize=_Tokens(
            client, job.allow_private, trusted,
        ))  # fmt: skip
        job.progress("reading the manifest", 0, None)
        layers, digest = _manifest(fetcher, f"{base}/v2/{location.repository}/manifests/{location.tag}", location)
        blobs = f"{base}/v2/{location.repository}/blobs/sha256:"
        models = [layer for layer in layers if layer.kind == "model"]
        if len(models) != 1:
            raise StoreError(f"{location} has {len(models)} model layers where one is understood")
        if any(layer.kind == "adapter" for layer in layers):
            raise StoreError(f"{location} is a model with an adapter beside it, which mullama cannot fetch as one")
        texts = {
            layer.kind: _text(fetcher, blobs, layer, location)
            for layer in layers
            if layer.kind in ("template", "system", "params", "license")
        }
        file = _weights(fetcher, blobs, models[0], location, job)
    defaults = _parameters(texts.get("params"), location)
    licence = texts.get("license")
    return Fetched(
        (file,),
        license=_first_line(licence),
        license_text=licence,
        revision=digest,
        quant=quant_of(location.tag),
        template=texts.get("template"),
        system=texts.get("system"),
        defaults=defaults,
    )


def _registry(location: Location) -> tuple[str, frozenset[tuple[str, int]]]:
    """The registry's address, and its host where that is the user's own setting."""
    if location.host is not None:
        return (location.host if "://" in location.host else f"https://{location.host}"), frozenset()
    base = os.environ.get(VARIABLE, "").rstrip("/")
    if not base:
        return REGISTRY, frozenset()
    base = base if "://" in base else f"https://{base}"
    try:
        url = httpx.URL(base)
    except httpx.InvalidURL as error:
        raise StoreError(f"{VARIABLE} is not an address: {error}") from None
    return base, frozenset({(url.host.lower(), url.port or (443 if url.scheme == "https" else 80))})


def _manifest(fetcher: Fetcher, url: str, location: Location) -> tuple[list[Layer], str]:
    """The layers, and the manifest's own digest. SAFETY: digests become paths and are checked here."""
    response = fetcher.get(url, {"Accept": _ACCEPT}, what=f"model {location}", limit=_MANIFEST_BYTES)
    digest = hashlib.sha256(response.content).hexdigest()
    announced = response.headers.get("docker-content-digest")
    if announced is not None and announced != f"sha256:{digest}":
        raise StoreError(f"the manifest of {location} is not the one that its registry announces")
    try:
        manifest = json.loads(response.content)
        layers = [_layer(layer) for layer in manifest["layers"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise StoreError(f"the manifest of {location} is damaged, or not one of a model") from None
    return layers, digest


def _layer(data: Mapping[str, Any]) -> Layer:
    """Raises ValueError, TypeError, KeyError."""
    kind, digest, size = str(data["mediaType"]), str(data["digest"]), data["size"]
    if not digest.startswith("sha256:") or not is_digest(digest.removeprefix("sha256:")):
        raise ValueError("not a sha256")
    if type(size) is not int or size < 0:
        raise ValueError("not a size")
    return Layer(kind.removeprefix(_LAYER), digest.removeprefix("sha256:"), size)


def _text(fetcher: Fetcher, blobs: str, layer: Layer, location: Location) -> str:
    what = f"{layer.kind} of {location}"
    if layer.size > _TEXT_BYTES:
        raise StoreError(f"the {what} has {layer.size} bytes, which is too long for a text")
    data = fetcher.get(blobs + layer.digest, what=what, limit=_TEXT_BYTES).content
    if hashlib.sha256(data).hexdigest() != layer.digest:
        raise StoreError(f"the {what} is not the one that the manifest names")
    return data.decode("utf-8", "replace")


def _weights(fetcher: Fetcher, blobs: str, layer: Layer, location: Location, job: Job) -> FetchedFile:
    """The model layer: of the store where it is there already, else downloaded."""
    filename = f"{location.name}-{location.tag}.gguf"
    there: Path | None = job.have(layer.digest)
    if there is not None:
        return FetchedFile(there, filename, layer.digest)
    got = fetcher.download(
        blobs + layer.digest,
        job.folder / "model.gguf",
        what=f"weights of {location}",
        progress=partial(job.progress, "downloading"),
        check_space=job.check_space,
        sha256=layer.digest,
        size=layer.size,
    )
    return FetchedFile(got.path, filename, got.sha256)


def _parameters(text: str | None, location: Location) -> dict[str, Any]:
    """The params layer: a JSON object such as ``{"temperature": 0.7, "stop": ["</s>"]}``."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StoreError(f"the parameters of {location} are not a JSON object")
    return found


def _first_line(text: str | None) -> str | None:
    """A licence's title, fit for a terminal."""
    for line in (text or "").splitlines():
        title = "".join(filter(str.isprintable, line)).strip()[:100]
        if title:
            return title
    return None


class _Tokens:
    """The token dance: a registry's 401 names who gives out tokens, and for what."""

    def __init__(self, client: httpx.Client, allow_private: bool, trusted: frozenset[tuple[str, int]]) -> None:
        # Without ``authorize``: a token service that asks for a token in turn gets none.
        self._fetcher = Fetcher(client, allow_private=allow_private, trusted=trusted)

    def __call__(self, response: httpx.Response) -> dict[str, str] | None:
        """The header to try again with; None: the registry asks for something else. Raises StoreError."""
        scheme, _, rest = response.headers.get("www-authenticate", "").partition(" ")
        fields = dict(_CHALLENGE.findall(rest))
        if scheme.lower() != "bearer" or "realm" not in fields:
            return None
        query = {name: fields[name] for name in ("service", "scope") if name in fields}
        realm = fields["realm"]
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}" if query else realm
        try:
            answer = self._fetcher.get(url, what="token of the registry", limit=_TOKEN_BYTES)
            found = json.loads(answer.content)
            token = found.get("token") or found.get("access_token")
        except (ValueError, AttributeError, httpx.InvalidURL):
            token = None
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise StoreError(f"{response.request.url.host} wants a token, and there is none to be had at its service")
        return {"Authorization": f"Bearer {token}"}
