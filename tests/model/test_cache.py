"""The ragged cache: where documents lie, growing, and forgetting."""

from __future__ import annotations

import torch

from pipeline.kernels.segments import Segments
from pipeline.model.cache import NextSlots, RaggedCache


def stored(lengths=(3, 2), new_tokens=2):
    segments = Segments.of(lengths)
    keys = torch.arange(1.0, segments.total + 1)[:, None, None]
    cache = RaggedCache(new_tokens)
    cache.store(keys, -keys, segments)
    return cache


def test_each_document_has_room_of_its_own_and_the_room_is_zero():
    cache = stored()
    assert cache.keys[0].flatten().tolist() == [1, 2, 3, 0, 0, 4, 5, 0, 0]
    assert cache.values[0].flatten().tolist() == [-1, -2, -3, 0, 0, -4, -5, 0, 0]
    assert (cache.slots[0].starts, cache.slots[0].used) == ([0, 5], [3, 2])


def test_the_next_slot_moves_and_forgotten_documents_leave_no_gap():
    cache = stored()
    assert next_places(cache) == [3, 7]
    cache.advance()
    assert next_places(cache) == [4, 8]
    cache.keep([1])
    assert next_places(cache) == [8]
    cache.rewind()
    assert next_places(cache) == [3, 7]


def next_places(cache):
    return NextSlots(cache).at(0)[1].tolist()


def test_the_counts_of_device_and_host_move_alike_and_stop_at_the_room():
    cache = stored(new_tokens=3)
    following = NextSlots(cache)
    slots, places = following.at(0)
    seen = []
    for _step in range(5):
        assert slots.used == slots.used_B.tolist()
        assert slots.longest == 6
        seen.append((slots.used, places.tolist()))
        following.advance_()
        following.advance_host()
    assert seen[:3] == [([4, 3], [3, 8]), ([5, 4], [4, 9]), ([6, 5], [5, 10])]
    assert seen[3:] == [([6, 5], [5, 10])] * 2


def test_a_parked_document_stays_in_its_first_slot():
    following = NextSlots(stored(new_tokens=4))
    slots, places = following.at(0)
    following.park([1])
    for count in (4, 5):
        assert (slots.used, slots.used_B.tolist()) == ([count, 1], [count, 1])
        assert places.tolist() == [count - 1, 7]
        following.advance_()
        following.advance_host()


def test_layers_of_the_same_tokens_share_their_slots_and_others_do_not():
    cache = stored()
    for lengths in ((3, 2), (1, 2)):
        segments = Segments.of(lengths)
        keys = torch.ones(segments.total, 1, 1)
        cache.store(keys, keys, segments)
    assert len(cache.distinct_slots()) == 2
    cache.advance()
    assert [slots.used for slots in cache.slots] == [[4, 3], [4, 3], [2, 3]]
    assert cache.prompt_tokens() == [[3, 2], [3, 2], [1, 2]]
    assert cache.nbytes == 4 * 2 * (9 + 9 + 7)
