"""The ragged cache: where documents lie, growing, and forgetting."""

from __future__ import annotations

import torch

from pipeline.kernels.segments import Segments
from pipeline.model.cache import RaggedCache


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
    assert cache.slots[0].next_B().tolist() == [3, 7]
    cache.advance()
    assert cache.slots[0].next_B().tolist() == [4, 8]
    cache.keep([1])
    assert cache.slots[0].next_B().tolist() == [8]


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
