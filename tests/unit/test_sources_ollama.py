"""``ollama:`` against a local registry: manifest, layers, tokens, redirects, damage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hub_support import LocalServer, Registry
from models_support import make_gguf

from mullama.errors import ReferenceNotFound, StoreError
from mullama.models.parse import parse_reference, parse_spec
from mullama.models.sources import download, private_addresses
from mullama.models.store.pulling import pull
from mullama.models.store.store import Store

DATA = make_gguf(tensors=[("token_embd.weight", (32, 4000), 8, 4000 * 34)])
TEMPLATE = "{{ range .Messages }}{{ .Content }}{{ end }}"
PARAMS = {"temperature": 0.6, "stop": ["<|end|>"], "num_ctx": 4096}
LAYERS = {
    "model": DATA,
    "template": TEMPLATE.encode(),
    "system": b"Be brief.",
    "params": json.dumps(PARAMS).encode(),
    "license": b"\n  Tiny Licence 1.0\x1b[2J\nYou may.\n",
}

Start = Callable[..., Registry]


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No proxy of the machine's, and waits that take no time."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(private_addresses, "_allowed", False)
    waits: list[float] = []
    monkeypatch.setattr(download, "pause", waits.append)
    return waits


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """``start(name, tag, layers)``: a registry, and the server it runs on as ``.server``; it is $OLLAMA_REGISTRY."""
    with ExitStack() as stack:

        def run(name: str = "library/tiny", tag: str = "1b", layers: Any = None, **options: Any) -> Registry:
            registry = Registry(name, tag, LAYERS if layers is None else layers, **options)
            registry.server = stack.enter_context(LocalServer(registry))  # type: ignore[attr-defined]
            registry.url = registry.server.url  # type: ignore[attr-defined]
            monkeypatch.setenv("OLLAMA_REGISTRY", registry.url)
            return registry

        yield run


def test_every_layer_is_kept(store: Store, start: Start) -> None:
    start()
    entry = pull(store, parse_reference("ollama:tiny:1b"))
    assert store.path_of(entry).read_bytes() == DATA
    assert (entry.template, entry.system, entry.defaults) == (TEMPLATE, "Be brief.", PARAMS)
    assert entry.license == "Tiny Licence 1.0[2J"
    assert entry.license_text is not None
    assert "You may." in entry.license_text
    assert store.find("ollama:tiny:1b") == entry
    assert parse_spec("ollama:tiny:1b", store.lookup).served_name(entry.filename) == "tiny:1b"


def test_a_namespace_and_a_quant_in_the_tag(store: Store, start: Start) -> None:
    registry = start("me/tiny", "1b-q4_K_M")
    entry = pull(store, parse_reference("ollama:me/tiny:1b-q4_K_M"))
    assert entry.quant == "Q4_K_M"
    assert "/v2/me/tiny/manifests/1b-q4_K_M" in registry.server.paths()  # type: ignore[attr-defined]


def test_a_host_of_the_references_own(store: Store, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = start()
    monkeypatch.delenv("OLLAMA_REGISTRY")
    text = f"ollama:{registry.url}/library/tiny:1b"
    with pytest.raises(StoreError, match="--allow-private-sources"):
        pull(store, parse_reference(text))
    monkeypatch.setattr(private_addresses, "_allowed", True)
    assert pull(store, parse_reference(text)).size == len(DATA)


def test_a_token_is_fetched_where_one_is_wanted(store: Store, start: Start) -> None:
    registry = start(wants_token=True)
    pull(store, parse_reference("ollama:tiny:1b"))
    seen = registry.server.seen  # type: ignore[attr-defined]
    assert [request.path.partition("?")[0] for request in seen[:3]] == [
        "/v2/library/tiny/manifests/1b",
        "/token",
        "/v2/library/tiny/manifests/1b",
    ]
    assert "authorization" not in seen[1].headers
    assert sum(request.path.startswith("/token") for request in seen) == 1  # and kept for the blobs


def test_no_token_goes_to_another_host(store: Store, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = start(wants_token=True)
    monkeypatch.setattr(private_addresses, "_allowed", True)  # the second host is on loopback as well
    with LocalServer(registry) as storage:
        registry.blob_host = storage.url
        pull(store, parse_reference("ollama:tiny:1b"))
        assert storage.seen
        assert all("authorization" not in request.headers for request in storage.seen)


def test_a_redirect_to_a_private_host_is_refused(store: Store, start: Start) -> None:
    registry = start()
    with LocalServer(registry) as storage:
        registry.blob_host = storage.url
        with pytest.raises(StoreError, match="--allow-private-sources"):
            pull(store, parse_reference("ollama:tiny:1b"))
        assert storage.seen == []


def test_a_broken_download_is_resumed(store: Store, start: Start) -> None:
    registry = start()
    registry.cut = 50_000
    assert store.path_of(pull(store, parse_reference("ollama:tiny:1b"))).read_bytes() == DATA
    asked = [request.headers.get("range") for request in registry.server.seen]  # type: ignore[attr-defined]
    assert "bytes=50000-" in asked


def test_rate_limits_are_waited_for(store: Store, start: Start, calm: list[float]) -> None:
    start().limited = 2
    pull(store, parse_reference("ollama:tiny:1b"))
    assert calm == [3.0, 3.0]


def test_the_same_weights_are_fetched_once(store: Store, start: Start) -> None:
    registry = start()
    first = pull(store, parse_reference("ollama:tiny:1b"))
    registry.tag = "latest"
    again = pull(store, parse_reference("ollama:tiny"))
    assert (again.key, again.sha256) == ("ollama:tiny:latest", first.sha256)
    blob = f"/cdn/{first.sha256}"
    assert [path for path in registry.server.paths() if path == blob] == [blob]  # type: ignore[attr-defined]
    assert store.path_of(again).read_bytes() == DATA


def test_force_takes_what_the_tag_means_now(store: Store, start: Start) -> None:
    registry = start()
    reference = parse_reference("ollama:tiny:1b")
    old = pull(store, reference)
    registry.layers = {**LAYERS, "model": make_gguf(seed=3)}
    assert pull(store, reference) == old
    found = store.lookup(reference.key)
    assert found is not None
    assert pull(store, found, force=True).sha256 == Registry.digest(make_gguf(seed=3))


def test_a_spoiled_layer_is_refused(store: Store, start: Start) -> None:
    for kind, says in (("model", "sha256 is .*, expected"), ("params", "is not the one that the manifest names")):
        registry = start()
        data = LAYERS[kind]
        registry.spoiled[Registry.digest(data)] = data[:-1] + b"?"
        with pytest.raises(StoreError, match=says):
            pull(store, parse_reference("ollama:tiny:1b"))
    assert store.list() == []
    assert not list((store.root / "blobs").iterdir())


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (b"<html>", "damaged"),
        (b"[]", "damaged"),
        (b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../x", "size": 1}]}',
         "damaged"),
        (b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:%s", "size": -1}]}'
         % (b"a" * 64), "damaged"),
        (b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:%s", "size": 1}]}'
         % (b"A" * 64), "damaged"),
        (b'{"layers": []}', "0 model layers"),
        (b" " * (5 << 20), "longer than"),
    ],
)  # fmt: skip
def test_manifests_that_are_none(store: Store, start: Start, manifest: bytes, says: str) -> None:
    start().manifest = manifest
    with pytest.raises(StoreError, match=says):
        pull(store, parse_reference("ollama:tiny:1b"))
    assert not list((store.root / "blobs").iterdir())


def test_a_manifest_that_is_not_the_announced_one(store: Store, start: Start) -> None:
    start().digest_header = "sha256:" + "0" * 64
    with pytest.raises(StoreError, match="not the one that its registry announces"):
        pull(store, parse_reference("ollama:tiny:1b"))


def test_what_the_registry_does_not_have(store: Store, start: Start) -> None:
    start()
    for text in ("ollama:tiny:70b", "ollama:huge"):
        with pytest.raises(ReferenceNotFound, match=text.removeprefix("ollama:")):
            pull(store, parse_reference(text))


def test_an_adapter_is_not_silently_left_out(store: Store, start: Start) -> None:
    start(layers={**LAYERS, "adapter": b"x"})
    with pytest.raises(StoreError, match="adapter"):
        pull(store, parse_reference("ollama:tiny:1b"))


def test_parameters_must_be_an_object(store: Store, start: Start) -> None:
    start(layers={**LAYERS, "params": b"[1]"})
    with pytest.raises(StoreError, match="not a JSON object"):
        pull(store, parse_reference("ollama:tiny:1b"))
