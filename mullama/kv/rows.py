"""Keys and values of the KV cache as NumPy arrays, out of it and back into it. Engine thread only.

A token's rows lie as ``Cells.layers`` says. KV that somebody wrote is not what the model computes of its tokens, so
that what else begins like it is forgotten, and it is never written to disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mullama.errors import InvalidRequest, ModelBusy
from mullama.kv.events import KvTier
from mullama.kv.index.payload import Rows
from mullama.kv.index.tree import pack, unpack

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mullama.kv.cache import KvCache
    from mullama.kv.native import Cells

    Bytes = npt.NDArray[np.uint8]

#: Architectures that leave the rotation out in some of their layers.
_ROPE_IN_SOME = {
    "afmoe", "cohere2", "cohere2moe", "exaone-moe", "exaone4", "granite-swa", "llama4", "muse-glimmer", "smallthinker",
    "smollm3",
}  # fmt: skip


def export(kv: KvCache, slot: int) -> dict[str, Any]:
    """Keys and values of a slot (see KvControl.export)."""
    n_past, _ = kv.core.slot_fill(slot)
    if n_past == 0 or not kv.cells.has_rows:
        return _described(kv, [], None)
    rows = _array(kv.cells.save(slot, 0, n_past), n_past, kv.cells.token_bytes)
    return _described(kv, unpack(kv.core.packed(slot)), rows)


def read(kv: KvCache, namespace: bytes, tokens: Sequence[int]) -> dict[str, Any]:
    """Keys and values of as much of a prefix as is in a slot or in host memory (see KvControl.read)."""
    rows = _cached(kv, namespace, tokens)
    return _described(kv, list(tokens[: len(rows)]) if rows is not None else [], rows)


def write(
    kv: KvCache, running: Sequence[bool], namespace: bytes, tokens: Sequence[int], layers: Sequence[Mapping[str, Any]]
) -> int:
    """Put KV of a prefix into the cache (see KvControl.write). Returns the slot that retains it."""
    cells = kv.cells
    if not cells.has_rows or cells.needs_checkpoint:
        raise InvalidRequest(
            "KV can be written for models with full attention in every layer; this one keeps a window or a state"
        )
    n = len(tokens)
    if not 1 <= n <= kv.core.n_ctx:
        raise InvalidRequest(f"a prefix has 1 to {kv.core.n_ctx} tokens, not {n}", param="tokens")
    vocabulary = kv.core.model.n_vocab
    if any(type(token) is not int or not 0 <= token < vocabulary for token in tokens):
        raise InvalidRequest(f"tokens must be whole numbers from 0 to {vocabulary - 1}", param="tokens")
    parts = _parts(cells, layers, n)
    rows = _base(kv, namespace, tokens, parts)
    for (at, size), part in parts.items():
        rows[:, at : at + size] = part
    _forget_like(kv, running, namespace, tokens)
    if all(running):
        raise ModelBusy("every slot has a running request; write when one has ended")
    slot = kv.allocate_empty(namespace, running, None).slot
    if not cells.extend(slot, list(tokens), [rows.tobytes()]):
        raise ModelBusy("llama.cpp has no cells for these tokens now")
    kv.resumed(slot, namespace, pack(tokens), mixed=True)
    return slot


def _described(kv: KvCache, tokens: list[int], rows: Bytes | None) -> dict[str, Any]:
    import numpy as np

    model = kv.core.model
    facts, meta = model.facts(), model.metadata()
    arch = facts["architecture"]
    n_heads = _number(meta, f"{arch}.attention.head_count")
    width = _number(meta, f"{arch}.attention.key_length") or (facts["n_embd"] // n_heads if n_heads else 0)
    found = []
    for layer in kv.cells.layers() if rows is not None else ():
        entry: dict[str, Any] = {"layer": layer["layer"]}
        for name in ("k", "v"):
            at, size = layer[name]
            part = np.ascontiguousarray(rows[:, at : at + size]) if rows is not None else np.empty((0, size), np.uint8)
            kind = _dtype(layer[f"type_{name}"])
            entry[name] = part.view(kind) if kind is not None else part
            entry[f"type_{name}"] = layer[f"type_{name}"]
        is_plain = entry["k"].dtype != np.uint8
        entry["heads"] = entry["k"].shape[1] // width if width and is_plain else None
        entry["k_has_rope"] = _has_rope(facts["rope"], arch)
        found.append(entry)
    rope = None
    if facts["rope"] != "none":
        rope = {
            "type": facts["rope"],
            "dims": _number(meta, f"{arch}.rope.dimension_count") or width,
            "freq_base": float(meta.get(f"{arch}.rope.freq_base", 10000.0)),
            "scaling": meta.get(f"{arch}.rope.scaling.type"),
        }
    return {"tokens": tokens, "layers": found, "rope": rope}


def _has_rope(kind: str, arch: str) -> bool | None:
    """None: in some layers, and which ones is not known here."""
    if kind == "none":
        return False
    return None if arch in _ROPE_IN_SOME else True


def _number(meta: Mapping[str, str], key: str) -> int:
    try:
        return int(meta.get(key, 0))
    except ValueError:
        return 0  # a list, one number a layer


def _dtype(kind: str | None) -> Any:
    import numpy as np

    return {"f16": np.float16, "f32": np.float32}.get(kind or "")


def _array(chunks: Sequence[bytes], n_tokens: int, token_bytes: int) -> Bytes:
    import numpy as np

    return np.frombuffer(b"".join(chunks), dtype=np.uint8).reshape(n_tokens, token_bytes)


def _cached(kv: KvCache, namespace: bytes, tokens: Sequence[int]) -> Bytes | None:
    """The rows of as much of a prefix as a slot or host memory holds; None: of nothing."""
    cells, match = kv.cells, kv.tree.match(namespace, pack(tokens))
    held = {slot: min(shared, kv.core.slot_fill(slot)[0]) for slot, shared in match.slots.items()}
    slot = max(held, key=lambda one: (held[one], -one), default=-1)
    if not cells.has_rows or max(held.get(slot, 0), match.n_host) == 0:
        return None
    if held.get(slot, 0) >= match.n_host:
        return _array(cells.save(slot, 0, held[slot]), held[slot], cells.token_bytes)
    chunks: list[bytes] = []
    for node in match.nodes:
        end = min(node.end, match.n_host)
        if node.start < end and isinstance(node.host, Rows):
            chunks += node.host.part(0, end - node.start)
    return _array(chunks, match.n_host, cells.token_bytes)


def _parts(cells: Cells, layers: Sequence[Mapping[str, Any]], n: int) -> dict[tuple[int, int], Bytes]:
    """Where each given array lies in a token's rows, and its bytes. Raises InvalidRequest."""
    import numpy as np

    places = {layer["layer"]: layer for layer in cells.layers()}
    found: dict[tuple[int, int], Bytes] = {}
    for given in layers:
        number = given.get("layer") if isinstance(given, Mapping) else None
        if number not in places:
            raise InvalidRequest(
                f"layers: each is a dict with 'layer', one of {', '.join(map(str, places))}, and 'k', 'v' or both; "
                f"got {number!r}",
                param="layers",
            )
        for name in ("k", "v"):
            if given.get(name) is None:
                continue
            (at, size), kind = places[number][name], _dtype(places[number][f"type_{name}"])
            array = np.asarray(given[name])
            if kind is None and array.dtype != np.uint8:
                cells_are = places[number][f"type_{name}"]
                raise InvalidRequest(
                    f"layer {number}, {name}: its cells are {cells_are}; bytes (uint8) are needed, not {array.dtype}",
                    param="layers",
                )
            if kind is not None and not np.issubdtype(array.dtype, np.floating):
                raise InvalidRequest(
                    f"layer {number}, {name}: numbers ({kind.__name__}) are needed, not {array.dtype}", param="layers"
                )
            width = size // np.dtype(kind or np.uint8).itemsize
            if array.size != n * width or array.shape[0] != n:
                raise InvalidRequest(
                    f"layer {number}, {name}: its shape is {array.shape}; ({n}, {width}) is needed, or heads apart",
                    param="layers",
                )
            plain = np.ascontiguousarray(array.astype(kind or np.uint8, copy=False)).reshape(n, width)
            if kind is not None and not np.isfinite(plain).all():
                raise InvalidRequest(
                    f"layer {number}, {name}: it holds numbers that are not finite as {kind.__name__}", param="layers"
                )
            found[at, size] = plain.view(np.uint8)
    if not found:
        raise InvalidRequest("layers: nothing is to be written", param="layers")
    return found


def _base(kv: KvCache, namespace: bytes, tokens: Sequence[int], parts: Mapping[tuple[int, int], Bytes]) -> Bytes:
    """Rows to write into: what is cached where not all is given. Raises InvalidRequest."""
    import numpy as np

    n, token_bytes = len(tokens), kv.cells.token_bytes
    if sum(size for _, size in parts) == token_bytes:
        return np.empty((n, token_bytes), dtype=np.uint8)
    for name in dict.fromkeys((namespace, b"")):
        rows = _cached(kv, name, tokens)
        if rows is not None and len(rows) == n:
            return rows.copy()
    raise InvalidRequest(
        "layers: some are left out, and what they hold of these tokens is not in the cache; write all of them",
        param="layers",
    )


def _forget_like(kv: KvCache, running: Sequence[bool], namespace: bytes, tokens: Sequence[int]) -> None:
    """Forget what begins with the same token: what was computed of these tokens must not be mixed with what is written.

    Raises ModelBusy where a running request begins so.
    """
    match = kv.tree.match(namespace, pack(tokens))
    if not match.nodes:
        return
    scope = set(match.nodes[0].subtree())
    if any(runs and kv.tree.end_of(slot) in scope for slot, runs in enumerate(running)):
        raise ModelBusy(
            "a running request begins with the same token; give what is written a cache_salt of its own, or wait"
        )
    for slot, runs in enumerate(running):
        if not runs and kv.tree.end_of(slot) in scope:
            kv.forget(slot)
    kv.drop_nodes([node for node in scope if node.parent is not None], {KvTier.HOST, KvTier.DISK})
