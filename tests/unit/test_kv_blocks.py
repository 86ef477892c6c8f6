"""KV events as blocks: whatever happens, a router knows exactly the blocks that are held."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_block_support import Router, World

from mullama.kv.events import KvEvent, KvEventKind, KvTier
from mullama.kv.index.namespaces import short_namespace
from mullama.kv.index.tree import pack
from mullama.observe.kv_blocks import AllBlocksCleared, BlockIndex, BlockStored, EventBatch

NAMESPACES = (b"", b"salt")
SPACES = {short_namespace(space): space for space in NAMESPACES}

sizes = st.integers(1, 6)
# Few tokens: paths that part late and at odd places. A long common beginning makes that likely.
stems = st.sampled_from([(), (1, 1, 1, 1, 1), (1, 1, 1, 2, 1, 2, 1), (2,) * 11])
paths = st.tuples(
    st.sampled_from(NAMESPACES),
    st.builds(lambda stem, rest: (*stem, *rest), stems, st.lists(st.integers(1, 2), min_size=1, max_size=9).map(tuple)),
)
holders = st.sampled_from(["slot 0", "slot 1", "host 0", "host 1", "disk"])
operations = st.one_of(
    st.tuples(st.just("hold"), holders, paths),
    st.tuples(st.just("free"), holders, st.integers(0, 12)),
    st.tuples(st.just("free"), holders),
    st.tuples(st.just("reuse"), holders, st.integers(1, 20)),
    st.tuples(st.just("move")),
)


def wire(*events: object) -> list[list[object]]:
    """What a subscriber decodes."""
    decoded: list[list[object]] = msgspec.msgpack.decode(msgspec.msgpack.encode(EventBatch(0.0, list(events))))[1]  # type: ignore[arg-type]
    return decoded


@given(size=sizes, steps=st.lists(operations, max_size=25))
@settings(deadline=None)
def test_a_router_knows_the_blocks_that_are_held(size: int, steps: list[tuple[object, ...]]) -> None:
    world, index, router = World(), BlockIndex(size), Router(size)
    seq = 0
    for name, *arguments in steps:
        getattr(world, str(name))(*arguments)
        for event in world.log.since(seq)[0]:
            change = index.apply(event)
            if change is not None:
                router.take(wire(change), SPACES)
            seq = event.seq
        assert router.known == world.blocks(size)
        assert index.n_blocks == len(router.blocks)
        late = Router(size)
        late.take(wire(*index.stored()), SPACES)
        assert late.blocks == router.blocks


@given(size=sizes, steps=st.lists(operations, max_size=25), lost=st.sets(st.integers(0, 24)))
@settings(deadline=None)
def test_lost_events_never_leave_a_block_too_many(size: int, steps: list[tuple[object, ...]], lost: set[int]) -> None:
    """Forgetting all blocks after a loss leaves some that are held unknown, and none known that is not held."""
    world, index, router = World(), BlockIndex(size), Router(size)
    seq = 0
    for number, (name, *arguments) in enumerate(steps):
        getattr(world, str(name))(*arguments)
        events = world.log.since(seq)[0]
        seq = world.log.last_seq
        if number in lost:
            index.clear()
            router.take(wire(AllBlocksCleared()), SPACES)
            continue
        for event in events:
            change = index.apply(event)
            if change is not None:
                router.take(wire(change), SPACES)
        assert router.known <= world.blocks(size)


def test_the_form_of_the_messages() -> None:
    """Positions and types, as subscribers of vLLM's events read them."""
    index = BlockIndex(2)
    tokens = pack([5, 70_000, 7, 8, 9])
    stored = index.apply(KvEvent(1, 0, KvEventKind.STORED, KvTier.HOST, 0, 5, b"", tokens))
    removed = index.apply(KvEvent(2, 0, KvEventKind.EVICTED, KvTier.HOST, 3, 5, b"", tokens, gone=True))
    batch = EventBatch(12.5, [stored, removed, AllBlocksCleared()])  # type: ignore[list-item]
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(batch))
    first, second = decoded[1][0][1]
    assert decoded == [
        12.5,
        [
            ["BlockStored", [first, second], None, [5, 70_000, 7, 8], 2, None, None, None, None],
            ["BlockRemoved", [second], None],
            ["AllBlocksCleared"],
        ],
        0,
    ]
    assert 2**32 < max(first, second) < 2**64


def test_a_hash_by_hand() -> None:
    """SHA-256 of eight zero bytes and the tokens 1 and 2 as little-endian integers."""
    change = BlockIndex(2).apply(KvEvent(1, 0, KvEventKind.STORED, KvTier.DEVICE, 0, 2, b"", pack([1, 2])))
    assert isinstance(change, BlockStored)
    assert change.block_hashes == [10361080361724392301]


def test_a_block_begins_where_its_parent_is_told() -> None:
    index = BlockIndex(2)
    index.apply(KvEvent(1, 0, KvEventKind.STORED, KvTier.DEVICE, 0, 3, b"s", pack([1, 2, 3])))
    change = index.apply(KvEvent(2, 0, KvEventKind.STORED, KvTier.DEVICE, 3, 6, b"s", pack([1, 2, 3, 4, 5, 6])))
    assert isinstance(change, BlockStored)
    assert (change.token_ids, change.extra_keys) == ([3, 4, 5, 6], [None, None])
    assert change.parent_block_hash is not None
    assert index.apply(KvEvent(3, 0, KvEventKind.REUSED, KvTier.DEVICE, 0, 6, b"s", pack(range(1, 7)))) is None


def test_a_block_has_a_size() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        BlockIndex(0)
