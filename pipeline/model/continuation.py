"""Known tokens behind a prefill, several of each document in one short forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.kernels import decoding
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.decoding import Ranges, own_ranges, queries_of_a_range, shared_ranges
from pipeline.kernels.segments import Segments, on_device
from pipeline.model.cache import MemoryCache, RaggedCache, Slots


@torch.inference_mode()
def continue_with(
    decoder: Decoder,
    attention: AttentionBackend,
    cache: RaggedCache,
    tokens: Sequence[Sequence[int]],
    first_positions: Sequence[int],
    check: Callable[[], None] = lambda: None,
    last_only: bool = False,
) -> Tensor:
    """Run `tokens`, at least one of each document, through the layers that the cache has, and into it.

    `first_positions` are those of each document's first token. Returns the last layer's residual stream,
    (N, D), document by document: `decoder.logits` of that of the model's last layer predicts the tokens that
    follow each. The cache must be one that keeps all its blocks on the device, with room for the tokens.
    `check` is called before every layer, and may raise. With `last_only` the last layer computes, beyond keys
    and values, each document's last token alone, and that is returned: (B, D).
    """
    device = decoder.device
    asked = Segments.of([len(part) for part in tokens], device)
    hidden_ND = decoder.embed(on_device([token for part in tokens for token in part], device))
    if isinstance(cache, MemoryCache):
        for layer in range(decoder.shape.layers):
            cache.layer_(decoder, layer, hidden_ND, asked.lengths, check)
        return hidden_ND[asked.last_indices()] if last_only else hidden_ND
    first_B, document_N = on_device(first_positions, device), asked.document_T
    reach_N = on_device(cache.reaches, device)[document_N] if cache.reaches else None
    rope = decoder.rope(hidden_ND, first_B[document_N] + asked.index_in_document_T, reach_N)
    places = {id(slots): _places(slots, asked) for slots in cache.distinct_slots()}
    assert cache.shared is None or not decoder.shape.slides, "a window that begins in a shared document"
    behind = None if cache.shared is None else _Behind.of(decoder, cache, places[id(cache.slots[0])][0])
    for layer in range(len(cache.slots)):
        check()
        at, places_N = places[id(cache.slots[layer])]
        keys, values, window = cache.keys[layer], cache.values[layer], decoder.shape.window(layer)
        if last_only and layer == len(cache.slots) - 1:
            k_NKd, v_NKd = decoder.keys_values(layer, hidden_ND, rope)
            last_B = asked.last_indices()
            hidden_ND, rope = hidden_ND[last_B], rope.at(last_B)
            q_NHd, _, _ = decoder.qkv(layer, hidden_ND, rope)
            at = DecodeSlots.of(*at.known[:2], len(keys), device)
            behind = None if behind is None else _Behind.of(decoder, cache, at)
        else:
            q_NHd, k_NKd, v_NKd = decoder.qkv(layer, hidden_ND, rope)
        keys.index_copy_(0, places_N, k_NKd)
        values.index_copy_(0, places_N, v_NKd)
        if behind is None:
            attended_NHd = attention.decode(q_NHd, keys, values, at.within(window), decoder.sinks(layer))
        else:
            attended_NHd = behind.attend(layer, q_NHd, keys, values, decoder.sinks(layer))
        decoder.add_attention_(layer, hidden_ND, attended_NHd)
        decoder.add_feed_forward_(layer, hidden_ND)
    cache.advance(asked.lengths)
    return hidden_ND


@dataclass(frozen=True)
class _Behind:
    """How tokens of a cache attend, whose documents stand in another: to both, merged."""

    shared: RaggedCache
    own: Ranges
    before: Ranges  # of the documents' slots, the same in every layer

    @classmethod
    def of(cls, decoder: Decoder, cache: RaggedCache, at: DecodeSlots) -> Self:
        """For the queries of `at`."""
        assert cache.shared is not None
        documents, device = cache.shared.cache.slots[0], decoder.device
        most = queries_of_a_range(decoder.own.heads, decoder.own.kv_heads)
        firsts = [0, *accumulate(at.known.queries)]
        queries = [
            [query for row in rows for query in range(firsts[row], firsts[row + 1])]
            for rows in cache.shared.members()
        ]
        return cls(
            shared=cache.shared.cache,
            own=own_ranges(*at.known, most, device),
            before=shared_ranges(documents.starts, documents.used, queries, most, device),
        )

    def attend(
        self, layer: int, q_NHd: Tensor, k_SKd: Tensor, v_SKd: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """(N, H, d) of a layer, with the tokens' own keys and values."""
        attended = [(k_SKd, v_SKd, self.own), (*self.shared.buffers(layer), self.before)]
        return decoding.attention(q_NHd, attended, sinks_H)


def _places(slots: Slots, asked: Segments) -> tuple[DecodeSlots, Tensor]:
    """What the new tokens of all documents attend to in a layer's buffers, and where they go, (N,)."""
    used = [before + new for before, new in zip(slots.used, asked.lengths, strict=True)]
    assert all(n <= room for n, room in zip(used, slots.room, strict=True)), "a document's slots are full"
    free_B = on_device([start + n for start, n in zip(slots.starts, slots.used, strict=True)], asked.device)
    at = DecodeSlots.of(slots.starts, used, slots.capacity, asked.device, asked.lengths)
    return at, free_B[asked.document_T] + asked.index_in_document_T
