"""The ragged cache: where documents lie, what it counts, and where the next tokens go."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from pipeline.generation.decode_batch import DecodeBatch
from pipeline.generation.graphs import StepSize
from pipeline.generation.step_tables import Seat
from pipeline.kernels.attention import SdpaAttention
from pipeline.kernels.segments import Segments
from pipeline.model.cache import RaggedCache


def stored(lengths=(3, 2), new_tokens=2, layers=1):
    segments = Segments.of(lengths)
    keys = torch.arange(1.0, segments.total + 1)[:, None, None]
    cache = RaggedCache(new_tokens)
    for _layer in range(layers):
        cache.store(keys, -keys, segments)
    return cache


def test_each_document_has_room_of_its_own_and_the_room_is_zero():
    cache = stored()
    assert cache.keys[0].flatten().tolist() == [1, 2, 3, 0, 0, 4, 5, 0, 0]
    assert cache.values[0].flatten().tolist() == [-1, -2, -3, 0, 0, -4, -5, 0, 0]
    assert (cache.slots[0].starts, cache.slots[0].used) == ([0, 5], [3, 2])
    assert [(cache.starts(b), cache.used(b)) for b in (0, 1)] == [([0], [3]), ([5], [2])]


def test_of_a_document_alone_too():
    cache = stored(lengths=(3,))
    assert cache.keys[0].flatten().tolist() == [1, 2, 3, 0, 0]
    assert cache.values[0].flatten().tolist() == [-1, -2, -3, 0, 0]


def batch_of(cache):
    """A batch of the cache's documents, which have one token each that is to be stored next."""
    decoder = tiny_model("llama")
    documents = range(len(cache.slots[0].used))
    batch = DecodeBatch(decoder, SdpaAttention(), cache, capacity=len(documents), longest=9, new_tokens=9)
    seats = [Seat(starts=cache.starts(b), used=cache.used(b), position=7 + b) for b in documents]
    batch.join(seats, [40 + b for b in documents])
    return batch


def step(batch, monkeypatch):
    """A step of which nothing is computed: the counts alone move."""
    with monkeypatch.context() as patched:
        patched.setattr(batch._decoder, "step_layer_", lambda *_: None)
        patched.setattr(batch, "_slots", lambda *_: None)
        batch.step(StepSize(batch.rows, batch.rows))


def next_places(batch):
    """The same in every layer."""
    places = batch._queries(batch.rows, None).places_LQ
    assert (places == places[0]).all()
    return places[0].tolist()


@pytest.mark.parametrize(
    ("dtype", "size", "before"),
    [(torch.bfloat16, 16, 0), (torch.bfloat16, 16, 4), (torch.bfloat16, 4, 0), (torch.float32, 20, 0)],
)
def test_what_lies_between_queries_and_others_is_copied_bit_for_bit(dtype, size, before):
    """Whether or not its heads consist of 16 bytes, and begin at such places."""
    joined = torch.randn(5, before + 3 * 2 * size).to(dtype)[:, before:].unflatten(1, (-1, size))
    keys, values = joined[:, 2:4], joined[:, 4:]
    keys[1, 1, 0], values[2, 0, 1] = float("nan"), float("-inf")
    cache = RaggedCache(3)
    cache.store(keys, values, Segments.of((5,)))
    for found, source in ((cache.keys[0], keys), (cache.values[0], values)):
        assert torch.equal(found[:5].view(torch.uint8), source.contiguous().view(torch.uint8))
        assert not found[5:].any()


def test_the_next_slot_moves_and_documents_that_leave_make_no_gap(monkeypatch):
    batch = batch_of(stored(layers=4))
    assert next_places(batch) == [3, 7]
    step(batch, monkeypatch)
    assert next_places(batch) == [4, 8]
    batch.keep([1])
    assert next_places(batch) == [8]
    assert batch._position_C[:2].tolist() == [9, 0]


def test_the_counts_of_device_and_host_move_alike(monkeypatch):
    batch, seen = batch_of(stored(new_tokens=3, layers=4)), []
    for _step in range(3):
        slots = batch._slots(0, 2, batch._queries(2, None), None)
        assert slots.known.used == slots.used_B.tolist()
        assert list(slots.known.starts) == slots.bounds_B1[:2].tolist()
        assert slots.longest == 9
        seen.append((slots.known.used, next_places(batch)))
        step(batch, monkeypatch)
    assert seen == [([4, 3], [3, 8]), ([5, 4], [4, 9]), ([6, 5], [5, 10])]


def test_a_column_of_nobody_stays_in_the_first_slot(monkeypatch):
    batch = batch_of(stored(new_tokens=4, layers=4))
    batch.keep([0])
    for count in (4, 5):
        asked = batch._queries(2, None)
        slots = batch._slots(0, 2, asked, None)
        assert (slots.known.used, slots.used_B.tolist()) == ([count, 1], [count, 1])
        assert asked.places_LQ[0].tolist() == [count - 1, 0]
        with monkeypatch.context() as patched:
            patched.setattr(batch, "_slots", lambda *_: None)
            patched.setattr(batch._decoder, "step_layer_", lambda *_: None)
            batch.step(StepSize(2, 2))


def test_layers_of_the_same_tokens_share_their_slots_and_others_do_not():
    cache = stored()
    for lengths in ((3, 2), (1, 2)):
        segments = Segments.of(lengths)
        keys = torch.ones(segments.total, 1, 1)
        cache.store(keys, keys, segments)
    assert len(cache.distinct_slots()) == 2
    cache.advance([1, 1])
    assert [slots.used for slots in cache.slots] == [[4, 3], [4, 3], [2, 3]]
    assert [cache.used(b) for b in (0, 1)] == [[4, 4, 2], [3, 3, 3]]
    assert [cache.starts(b) for b in (0, 1)] == [[0, 0, 0], [5, 5, 3]]
    assert cache.prompt_tokens() == [[3, 2], [3, 2], [1, 2]]
    assert cache.nbytes == 4 * 2 * (9 + 9 + 7)


def test_a_batch_takes_no_more_rows_than_it_has_columns():
    cache = stored(layers=4)
    batch = batch_of(cache)
    with pytest.raises(AssertionError, match="more rows than the batch has columns"):
        batch.join([Seat(starts=cache.starts(0), used=cache.used(0), position=3)], [1])
