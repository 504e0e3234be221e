"""The pool of keys and values: where rows lie in it, that moving changes nothing, what is left of them."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest
import torch
from conftest import document, pack_of, tiny_model
from decode_steps import METHODS
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.model.store as store_module
from pipeline.kernels.decoding import dequantised
from pipeline.kernels.fused import FP8
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.kernels.segments import Segments
from pipeline.model.cache import RaggedCache
from pipeline.model.extents import Extents
from pipeline.model.prefill import prefill
from pipeline.model.store import OVERSHOOT, KvStore, slots_needed
from pipeline.pruning.registry import make_method
from pipeline.pruning.shape import ModelShape

CPU = torch.device("cpu")
FAR = OVERSHOOT["cuda"]  # what a CPU has no need of is tried here on one
SMALL = ModelShape(layers=3, hidden=4, ffn=4, heads=2, kv_heads=1, head_dim=2, vocab=9, context=4096)


@pytest.fixture(params=[0, FAR])
def overshoot(request, monkeypatch):
    monkeypatch.setitem(OVERSHOOT, "cpu", request.param)
    return request.param


def small_store(slots):
    return KvStore(slots, SMALL, dtype=torch.float32, device=CPU)


def cache_of(*documents, new_tokens=0, seed=0):
    """Random keys and values of documents, each given by its tokens in the three layers."""
    generator, cache = torch.Generator().manual_seed(seed), RaggedCache(new_tokens)
    for lengths in zip(*documents, strict=True):
        shape = (sum(lengths), SMALL.kv_heads, SMALL.head_dim)
        keys, values = (torch.randn(shape, generator=generator) for _ in "kv")
        cache.store(keys, values, Segments.of(lengths))
    return cache


def rows_of(cache, document):
    """Of each layer, a document's keys and values."""
    return [
        [
            buffer[start : start + used].clone()
            for buffer, start, used in zip(buffers, cache.starts(document), cache.used(document), strict=True)
        ]
        for buffers in (cache.keys, cache.values)
    ]


def rows_at(store, extent):
    return [
        [
            store.buffers(layer)[which][start : start + stored]
            for layer, (start, stored) in enumerate(zip(extent.starts, extent.stored, strict=True))
        ]
        for which in (0, 1)
    ]


def assert_equal(rows, expected):
    for mine, other in zip(rows, expected, strict=True):
        assert len(mine) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def needed_by(*documents, new_tokens):
    return sum(slots_needed(layers, new_tokens, CPU) for layers in documents)


def ranges(extent, new_tokens, overshoot):
    """Of each layer, the slots that are its own."""
    sizes = [max(tokens, overshoot) + new_tokens for tokens in extent.stored]
    return [
        range(a, b) for a, b in pairwise(extent.start + offset for offset in accumulate(sizes, initial=0))
    ]


@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize(
    ("name", "options"),
    [*METHODS.items(), ("fastkv", {"layer": 1, "share": 0.4, "kv_share": 1.0})],
    ids=[*METHODS, "fastkv-whole"],
)
def test_each_layer_of_a_document_lies_where_its_extent_says(name, options, room, sdpa, overshoot):
    model, documents = tiny_model("qwen2"), [document(n, seed=n) for n in (61, 300, 17)]
    prefilled = prefill(model, sdpa, make_method(name, options), pack_of(*documents), room)
    by_document = list(zip(*prefilled.cache.prompt_tokens(), strict=True))
    needed = [needed_by(layers, new_tokens=7) for layers in by_document]
    store = KvStore(sum(needed), model.shape, dtype=model.dtype, device=CPU)
    extents = store.adopt(prefilled.cache, [7] * len(by_document))
    assert store.free == 0
    assert [extent.stored for extent in extents] == by_document
    assert [extent.size for extent in extents] == needed
    for b, extent in enumerate(extents):
        assert_equal(rows_at(store, extent), rows_of(prefilled.cache, b))
        assert rows_at(store, extent)[0][3].abs().sum() > 0  # not vacuous
    if name == "sliminfer" or options.get("kv_share") == 1.0:
        assert len({extents[1].stored[layer] for layer in range(4)}) > 1
    # nothing but that was written
    written = torch.zeros(len(store.buffers(0)[0]), dtype=torch.bool)
    for extent in extents:
        for start, stored in zip(extent.starts, extent.stored, strict=True):
            written[start : start + stored] = True
    assert all((pool[~written] == 0).all() for pool in store.buffers(0))


TOKENS = st.integers(1, 2 * FAR)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TOKENS, TOKENS, TOKENS), min_size=1, max_size=5),
    st.integers(1, 40),
    st.integers(0, 3),
    st.sampled_from([0, FAR]),
)
def test_generated_tokens_lie_far_behind_the_first_slot_of_their_range(
    documents, new_tokens, room, overshoot
):
    """What lies before a range reads beyond its end, where nothing may be NaN."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(OVERSHOOT, "cpu", overshoot)
        store = small_store(needed_by(*documents, new_tokens=new_tokens))
        extents = store.adopt(cache_of(*documents, new_tokens=room), [new_tokens] * len(documents))
    first = max(1, overshoot)  # behind the slots of nobody, of which there is one at least
    taken = [layer for extent in extents for layer in ranges(extent, new_tokens, overshoot)]
    assert sorted(slot for part in taken for slot in part) == list(range(first, first + store.size))
    assert len(store.buffers(0)[0]) == first + store.size
    for extent in extents:
        own = ranges(extent, new_tokens, overshoot)
        assert extent.size == sum(len(layer) for layer in own)
        for layer, start, stored in zip(own, extent.starts, extent.stored, strict=True):
            generated = range(start + stored, start + stored + new_tokens)
            assert layer.start <= start
            assert generated.start - layer.start >= overshoot
            assert generated.stop == layer.stop  # room for all new tokens, and none for more


class Watched(Extents):
    """Notes the moves."""

    def compact(self):
        moves = super().compact()
        self.moves = [*getattr(self, "moves", []), *moves]
        return moves


@pytest.mark.slow
@pytest.mark.parametrize("moved_at_once", [1, 7, 1 << 16])
@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_rows_stay_as_they_are_wherever_they_are_moved(seed, few, moved_at_once, monkeypatch):
    monkeypatch.setitem(OVERSHOOT, "cpu", few)
    monkeypatch.setattr(store_module, "MOVED_AT_ONCE", moved_at_once)
    monkeypatch.setattr(store_module, "Extents", Watched)
    random_ = random.Random(seed)
    store, new_tokens, rows = small_store(150), 3, []
    for turn in range(150):
        documents = [[random_.randint(1, 12) for _layer in range(3)] for _ in range(random_.randint(1, 2))]
        needed = needed_by(*documents, new_tokens=new_tokens)
        if needed <= store.free:  # wherever the free slots lie
            before = store.moves
            cache = cache_of(*documents, new_tokens=random_.choice((0, 2)), seed=turn)
            starts = [extent.starts for extent, _ in rows]
            for b, extent in enumerate(store.adopt(cache, [new_tokens] * len(documents))):
                # tokens that are generated later move too
                room = [extent.starts[layer] + extent.stored[layer] for layer in range(3)]
                for pool in store.buffers(0):
                    for start in room:
                        pool[start : start + new_tokens] = turn + 1
                rows.append((extent, (rows_of(cache, b), turn + 1)))
            moved = [extent.starts for extent, _ in rows[: len(starts)]] != starts
            assert store.moves > before or not moved
        else:
            extent, _ = rows.pop(random_.randrange(len(rows)))
            store.release(extent, wipe=random_.random() < 0.5)
        taken = needed_by(*(extent.stored for extent, _ in rows), new_tokens=new_tokens)
        assert store.size - store.free == taken
        for extent, (expected, mark) in rows:
            assert_equal(rows_at(store, extent), expected)
            for start, stored in zip(extent.starts, extent.stored, strict=True):
                for pool in store.buffers(0):
                    assert (pool[start + stored : start + stored + new_tokens] == mark).all()
        slots = [n for extent, _ in rows for n in range(extent.start, extent.start + extent.size)]
        assert len(set(slots)) == len(slots)
    assert store.moves > 2
    overlapping = [move for move in store._extents.moves if move.start - move.to < move.size]
    assert len(overlapping) > 2


def test_a_row_that_is_let_in_makes_room_by_moving_others(overshoot):
    """As many free slots as it needs, in two holes."""
    layers, new_tokens, first = (5, 6, 7), 2, max(1, overshoot)
    size = needed_by(layers, new_tokens=new_tokens)
    store = small_store(4 * size)
    extents = [store.adopt(cache_of(layers, seed=seed), [new_tokens])[0] for seed in range(4)]
    for extent in extents[::2]:
        store.release(extent)
    twice = (overshoot + 8,) * 3
    needed = needed_by(twice, new_tokens=new_tokens)
    assert size < needed <= store.free == 2 * size
    cache = cache_of(twice, seed=9)
    (large,) = store.adopt(cache, [new_tokens])
    assert store.moves == 1
    assert [extent.start for extent in extents[1::2]] == [first, first + size]
    assert large.start == first + 2 * size
    assert_equal(rows_at(store, large), rows_of(cache, 0))
    for seed in (1, 3):
        assert_equal(rows_at(store, extents[seed]), rows_of(cache_of(layers, seed=seed), 0))


def test_a_cache_that_is_freed_while_it_is_copied_holds_no_memory():
    cache = cache_of((5, 6, 7), new_tokens=2)
    small_store(200).adopt(cache, [2], frees=True)
    assert {x.untyped_storage().nbytes() for x in (*cache.keys, *cache.values)} == {0}


def test_a_row_without_room_is_an_error_of_the_caller():
    store = small_store(needed_by((5, 6, 7), new_tokens=2) - 1)
    with pytest.raises(AssertionError, match="no room"):
        store.adopt(cache_of((5, 6, 7)), [2])


@pytest.mark.parametrize("wipe", [False, True])
def test_a_row_is_wiped_where_that_is_asked_for_and_its_neighbours_are_not(wipe, overshoot):
    documents, new_tokens = [(5, 6, 300), (7, 7, 7), (1, 1, 400)], 4
    store = small_store(needed_by(*documents, new_tokens=new_tokens))
    cache = cache_of(*documents)
    extents = store.adopt(cache, [new_tokens] * len(documents))
    spoilt = extents[1]
    for pool in store.buffers(0):
        pool[spoilt.start : spoilt.start + spoilt.size] = float("nan")
    store.release(spoilt, wipe=wipe)
    assert store.free == spoilt.size
    for pool in store.buffers(0):
        part = pool[spoilt.start : spoilt.start + spoilt.size]
        assert (part == 0).all() if wipe else part.isnan().all()
    for b in (0, 2):
        assert_equal(rows_at(store, extents[b]), rows_of(cache, b))


def test_the_memory_is_that_of_the_slots_and_of_those_of_nobody(overshoot):
    store = small_store(100)
    assert (store.size, store.free) == (100, 100)
    assert store.nbytes == 2 * (100 + max(1, overshoot)) * SMALL.kv_heads * SMALL.head_dim * 4
    assert all((pool == 0).all() for pool in store.buffers(2))
    assert store.has_spare_slot
    assert store.on_device_alone


def test_in_e4m3_what_stands_behind_a_document_has_its_scales():
    """By the scale of one token, which is its own mean, all that follow it would be as it is."""
    store = KvStore(200, SMALL, dtype=FP8, device=CPU, extents=3)
    lines = sorted(store._lines)
    (document,) = store.adopt(cache_of((40, 40, 40)))
    (own,) = store.adopt(cache_of((1, 1, 1), seed=1), [1], shared=[document])
    copy, line = store.copy_of(own, 1), torch.tensor([document.line])
    following = torch.randn(2, 1, 1, SMALL.head_dim, generator=torch.Generator().manual_seed(2))
    for extent in (own, copy):
        assert extent.line == document.line
        for layer, start in enumerate(extent.starts):
            scales, place = store.scales(layer), torch.tensor([start + 1])
            KvTarget(*store.buffers(layer), place, scales, line).put(*following)
            near = dequantised(*(buffer[place] for buffer in store.buffers(layer)), scales, line)
            torch.testing.assert_close(torch.stack(near), following, rtol=1 / 16, atol=0.1)
    for extent in (own, copy, document):
        store.release(extent)
    assert sorted(store._lines) == lines
