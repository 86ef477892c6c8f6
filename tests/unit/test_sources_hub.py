"""``hf:`` through the real ``huggingface_hub`` against a local hub."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_support import COMMIT, Hub, LocalServer, Reply
from models_support import METADATA, make_gguf

from mullama.errors import ReferenceNotFound, StoreError
from mullama.models.parse import parse_reference, parse_spec
from mullama.models.resolve import resolve_model
from mullama.models.store.pulling import pull
from mullama.models.store.store import Store

REPO = "Qwen/Qwen2.5-7B-Instruct-GGUF"
STEM = "qwen2.5-7b-instruct"


def model(seed: int) -> bytes:
    return make_gguf(tensors=[("token_embd.weight", (32, 4000), 8, 4000 * 34)], seed=seed)


def split(quant: str, count: int = 2) -> dict[str, bytes]:
    keys = {"split.count": count, "split.tensors.count": count}
    return {
        f"{STEM}-{quant}-{n:05}-of-{count:05}.gguf": make_gguf(
            {**(METADATA if n == 1 else {}), "split.no": n - 1, **keys},
            [(f"blk.{n}.x", (32, 4000), 8, 4000 * 34)],
            seed=n,
        )
        for n in range(1, count + 1)
    }


FILES = {
    "README.md": b"# a model",
    f"{STEM}-q8_0.gguf": model(8),
    f"{STEM}-q2_k.gguf": model(2),
    "mmproj-Q4_K_M.gguf": model(99),
    **split("q4_k_m"),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client takes for its own, with an empty cache. ``hub.server`` is the server."""
    from huggingface_hub import constants

    hub = Hub(REPO, FILES)
    with LocalServer(hub) as server:
        hub.server = server  # type: ignore[attr-defined]
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        # The client sleeps between its own retries.
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_split_model_by_its_quant(hub: Hub, store: Store, cache: Path) -> None:
    steps: list[tuple[str, int, int | None]] = []
    found = resolve_model(REPO, store=store, quant="q4_k_m", progress=lambda *step: steps.append(step))
    assert found.name == STEM
    assert found.path.name == f"{STEM}-q4_k_m-00001-of-00002.gguf"
    assert found.path.is_relative_to(cache)
    assert found.path.with_name(f"{STEM}-q4_k_m-00002-of-00002.gguf").exists()
    entry = found.entry
    assert entry is not None
    assert (entry.quant, entry.revision, entry.key) == ("Q4_K_M", COMMIT, f"hf:{REPO}:Q4_K_M")
    assert [part.sha256 for part in entry.parts] == [
        hashlib.sha256(data).hexdigest() for data in split("q4_k_m").values()
    ]
    assert store.list() == [entry]
    # In place: no second copy.
    assert not list((store.root / "blobs").iterdir())
    size = len(FILES[found.path.name])
    assert ("downloading part 1 of 2", size, size) in steps
    second = len(FILES[f"{STEM}-q4_k_m-00002-of-00002.gguf"])
    assert ("verifying part 2 of 2", second, second) in steps


def test_a_later_start_asks_nobody(hub: Hub, store: Store) -> None:
    resolve_model(REPO, store=store)
    asked = len(hub.server.seen)  # type: ignore[attr-defined]
    found = resolve_model(REPO, store=store)
    assert found.entry is not None
    assert len(hub.server.seen) == asked  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "file"),
    [
        (REPO, f"{STEM}-q4_k_m-00001-of-00002.gguf"),
        (f"hf:{REPO}:Q8_0", f"{STEM}-q8_0.gguf"),
        (f"{REPO}:q2_K@main", f"{STEM}-q2_k.gguf"),
        (f"hf:{REPO}:{STEM}-q2_k.gguf@v1", f"{STEM}-q2_k.gguf"),
        (f"hf:{REPO}@{COMMIT}", f"{STEM}-q4_k_m-00001-of-00002.gguf"),
        (f"{REPO}:{STEM}-q4_k_m-00001-of-00002.gguf", f"{STEM}-q4_k_m-00001-of-00002.gguf"),
    ],
)
def test_which_file_is_meant(hub: Hub, store: Store, text: str, file: str) -> None:
    assert resolve_model(text, store=store).path.name == file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{REPO}:Q6_K", r"no model in Q6_K; there are qwen2\.5-7b-instruct-q2_k\.gguf"),
        (f"{REPO}:nosuch.gguf", "no file 'nosuch.gguf'"),
        (f"{REPO}@v9", "no revision 'v9'"),
        ("some/other", "no repository some/other, or it is private"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, store: Store, text: str, says: str) -> None:
    with pytest.raises(ReferenceNotFound, match=says) as raised:
        pull(store, parse_reference(text))
    assert "\n" not in str(raised.value)
    assert store.list() == []


def test_a_token_is_sent(hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(ReferenceNotFound, match="HF_TOKEN"):
        pull(store, parse_reference(REPO))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert pull(store, parse_reference(REPO)).parts


def test_a_gated_repository(hub: Hub, store: Store) -> None:
    hub.is_gated = True
    with pytest.raises(StoreError, match="is gated: accept its terms"):
        pull(store, parse_reference(REPO))


def test_a_rate_limit(hub: Hub, store: Store) -> None:
    hub.limited = 10**6
    with pytest.raises(StoreError, match="limits how much you may fetch"):
        pull(store, parse_reference(REPO))


def test_a_hub_that_is_away(hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="cannot be reached"):
        pull(store, parse_reference(REPO))


def test_a_hub_that_is_broken(hub: Hub, store: Store) -> None:
    hub.server.routes.insert(0, lambda seen: Reply(500))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="HTTP 500"):
        pull(store, parse_reference(REPO))


def test_a_broken_download_is_resumed(hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # The client writes 10 MB at a time, which is more than these files have.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut = 50_000
    entry = pull(store, parse_reference(f"{REPO}:Q8_0"))
    assert store.path_of(entry).read_bytes() == FILES[f"{STEM}-q8_0.gguf"]
    assert "bytes=50000-" in [seen.headers.get("range") for seen in hub.server.seen]  # type: ignore[attr-defined]


def test_a_file_that_is_not_the_listed_one(hub: Hub, store: Store, cache: Path) -> None:
    """The client compares sizes; we compare digests, and a wrong file does not stay in its cache."""
    name = f"{STEM}-q8_0.gguf"
    hub.lies[name] = model(7)
    reference = parse_reference(f"{REPO}:Q8_0")
    with pytest.raises(StoreError, match="is not the file that the hub lists"):
        pull(store, reference)
    assert store.list() == []
    assert not [path for path in cache.rglob("*.gguf") if path.exists()]
    hub.lies.clear()
    assert store.path_of(pull(store, reference)).read_bytes() == FILES[name]


def test_offline_what_is_cached_is_found(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also what another program fetched."""
    huggingface_hub.hf_hub_download(REPO, f"{STEM}-q8_0.gguf")
    hub.server.routes.clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    entry = pull(store, parse_reference(REPO))
    assert (entry.filename, entry.revision, entry.is_borrowed) == (f"{STEM}-q8_0.gguf", COMMIT, True)
    with pytest.raises(ReferenceNotFound, match="no model in Q4_K_M"):
        pull(store, parse_reference(f"{REPO}:Q4_K_M"))
    with pytest.raises(StoreError, match="not cached"):
        pull(store, parse_reference("some/other"))


def test_removing_takes_out_of_the_cache_what_was_put_there(hub: Hub, store: Store, cache: Path) -> None:
    entry = pull(store, parse_reference(f"{REPO}:Q8_0"))
    store.copy(entry.key, "mine")
    assert store.remove("mine") == 0
    assert store.path_of(entry).exists()
    assert store.remove(entry.key) == entry.size
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size >= entry.size]


def test_removing_leaves_what_another_program_put_there(hub: Hub, store: Store) -> None:
    path = Path(str(huggingface_hub.hf_hub_download(REPO, f"{STEM}-q8_0.gguf")))
    entry = pull(store, parse_reference(f"{REPO}:Q8_0"))
    assert store.path_of(entry) == path
    assert store.remove(entry.key) == 0
    assert path.read_bytes() == FILES[f"{STEM}-q8_0.gguf"]


def test_a_file_that_changed_in_the_cache_is_not_used(hub: Hub, store: Store) -> None:
    reference = parse_reference(f"{REPO}:Q8_0")
    path = store.path_of(pull(store, reference))
    blob = path.resolve()
    blob.chmod(0o644)
    blob.write_bytes(model(5))
    os.utime(blob, ns=(1, 1))
    with pytest.raises(StoreError, match=r"damaged.*mullama pull --force"):
        resolve_model(f"{REPO}:Q8_0", store=store)
    with pytest.raises(StoreError, match="damaged"):  # and stays so, whatever the file is then
        store.resolve(reference)
    assert pull(store, reference, force=True)
    assert resolve_model(f"{REPO}:Q8_0", store=store).path.read_bytes() == FILES[f"{STEM}-q8_0.gguf"]


def test_names(hub: Hub, store: Store) -> None:
    assert resolve_model(f"Mine={REPO}:Q8_0", store=store).name == "Mine"
    assert resolve_model(f"{REPO}:{STEM}-q2_k.gguf", store=store).name == f"{STEM}-q2_k"
    assert parse_spec("qwen2.5:7b", quant="Q8_0").reference.key == f"hf:{REPO}:Q8_0"
    assert resolve_model("qwen2.5:7b", store=store, quant="Q8_0").name == "qwen2.5:7b"


def test_two_quants_of_one_repository_share_nothing_but_the_name(hub: Hub, store: Store) -> None:
    from mullama.models.store.upkeep import usage, verify

    first, second = pull(store, parse_reference(REPO)), pull(store, parse_reference(f"{REPO}:Q4_K_M"))
    third = pull(store, parse_reference(f"{REPO}:Q8_0"))
    assert first.sha256 == second.sha256 != third.sha256
    found: Any = usage(store)
    assert found.total == found.elsewhere == first.size + third.size
    assert {entry.key: own for entry, _, own in found.models} == {first.key: 0, second.key: 0, third.key: third.size}
    assert {verify(store, entry, lambda *_: None) for entry in store.list()} == {"ok"}
    # Both names are ours, so the files go with the last of them, whichever that is.
    assert store.remove(first.key) == 0
    assert store.remove(second.key) == second.size
