"""Keys and values of all rows that are being decoded, in one pool that lives as long as the run.

A row has one extent of the pool; in it lie the slots of each layer one after the other, however many tokens
of the prompt a method has left in that layer. Letters: S slots of the pool, L layers, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.kernels.decoding import Fp8Scales
from pipeline.kernels.fused import FP8
from pipeline.kernels.kv_fp8 import KvTarget, put_prompts
from pipeline.kernels.segments import on_device
from pipeline.model.cache import KeysValues, RaggedCache
from pipeline.model.extents import Extents
from pipeline.pruning.shape import ModelShape
from pipeline.ranks.leading import OnEachRank, at_the_end, on_every_rank

# Attention kernels load tiles of keys and values that may reach beyond a row's last slot, and multiply by
# zero what they mask: a NaN there would reach the row's answer. FlashAttention-3 was seen to read fewer than
# 176 slots further. Generated tokens, whose values may be NaN, lie further behind their range's first slot.
# torch's own attention, which is all that a CPU has, reads what it is given and no more.
OVERSHOOT = {"cpu": 0, "cuda": 256}
MOVED_AT_ONCE = 1 << 16  # slots of an extent that slides, which bounds the memory that it takes


@dataclass(kw_only=True, eq=False)
class Extent(OnEachRank):
    """A row's part of the pool."""

    start: int  # changes when the pool is compacted
    offsets: tuple[int, ...]  # of each layer's first token
    stored: tuple[int, ...]  # prompt tokens of each layer
    size: int
    line: int = 0  # of the scales of a store in e4m3
    owns_line: bool = True  # if not, it is that of the extent before it

    @property
    def starts(self) -> list[int]:
        """Of each layer, the slot of the first token."""
        return [self.start + offset for offset in self.offsets]


def slots_needed(stored: Sequence[int], new_tokens: int, device: torch.device) -> int:
    """Slots of a row with so many prompt tokens in each layer, and room for `new_tokens` more in each."""
    return sum(max(tokens, OVERSHOOT[device.type]) + new_tokens for tokens in stored)


class KvStore(KeysValues):
    """The pool, and whose its parts are."""

    has_spare_slot = True
    moves = 0  # how often rows have been moved, after which their starts are others

    def __init__(
        self, slots: int, shape: ModelShape, *, dtype: torch.dtype, device: torch.device, extents: int = 0
    ) -> None:
        """Of `slots` for rows, behind those of nobody; in e4m3 for so many rows and documents at once.

        On a GPU the memory is taken here, on a CPU when rows first write to it.
        """
        self._overshoot = OVERSHOOT[device.type]
        first = max(1, self._overshoot)
        total = first + slots
        self._pool = [_zeros((total, shape.kv_heads, shape.head_dim), dtype, device) for _ in range(2)]
        self._extents = Extents(first, total)
        self._rows: dict[int, Extent] = {}  # by their starts
        lines = extents + 1 if dtype == FP8 else 0  # the first is of nobody
        self._lines = list(range(lines - 1, 0, -1))  # that are free
        self._scales: list[Fp8Scales] = []  # of each layer
        for _layer in range(shape.layers if lines else 0):
            self._scales.append(Fp8Scales.ones(lines, shape.kv_heads, shape.head_dim, device))

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._pool[0], self._pool[1]

    def scales(self, layer: int) -> Fp8Scales | None:
        return self._scales[layer] if self._scales else None

    @property
    def free(self) -> int:
        """Slots that rows can have, wherever they lie."""
        return self._extents.free

    @property
    def size(self) -> int:
        """Slots of all rows together."""
        return self._extents.size

    @property
    def nbytes(self) -> int:
        means = sum(scales.means_LKd.nbytes for scales in self._scales)
        return sum(tensor.nbytes for tensor in self._pool) + means

    @on_every_rank
    @torch.inference_mode()
    def adopt(
        self,
        cache: RaggedCache,
        rooms: Sequence[int] = (),
        *,
        shared: Sequence[Extent] = (),
        frees: bool = False,
    ) -> list[Extent]:
        """Copy a prefilled pack's keys and values; returns each document's extent.

        `rooms` says for how many new tokens of each there is to be room; without, for none. There must be as
        many free slots; rows that are there already may be moved. What the documents share with others is not
        copied: it is in the extents `shared`, one for each of them, by whose scales they are stored in e4m3,
        as few tokens tell no scale. With `frees` the cache loses each layer once it is copied.
        """
        stored = list(zip(*cache.own_tokens(), strict=True))  # of each document, by layer
        rooms = rooms or [0] * len(stored)
        lines: Sequence[int | None] = [extent.line for extent in shared] or [None] * len(stored)
        extents = [self._take(*each) for each in zip(stored, rooms, lines, strict=True)]
        starts_LB = on_device(list(zip(*(extent.starts for extent in extents), strict=True)), cache.device)
        lines_B = on_device([extent.line for extent in extents], cache.device)
        for layer, slots in enumerate(cache.slots):
            segments = slots.segments
            k_TKd, v_TKd = (
                source if not slots.new_tokens else source[slots.prompt_T] for source in cache.buffers(layer)
            )
            scales, (keys, values) = self.scales(layer), self._pool
            if scales is not None and not shared:
                put_prompts(k_TKd, v_TKd, segments, KvTarget(keys, values, starts_LB[layer], scales, lines_B))
            else:
                places_T = starts_LB[layer][segments.document_T] + segments.index_in_document_T
                KvTarget(keys, values, places_T, scales, lines_B[segments.document_T]).put(k_TKd, v_TKd)
            if frees:
                # not slices, which would keep the memory of what they are of
                cache.keys[layer], cache.values[layer] = (
                    x.new_empty((0, *x.shape[1:])) for x in (k_TKd, v_TKd)
                )
        return extents

    @at_the_end
    @torch.inference_mode()
    def release(self, extent: Extent, *, wipe: bool = False) -> None:
        """Give a row's slots back, and with `wipe` what is in them: NaN must not outlive its row."""
        del self._rows[extent.start]
        self._extents.give_back(extent.start)
        if self._scales and extent.owns_line:
            self._lines.append(extent.line)
        if wipe:
            for pool in self._pool:
                _bytes(pool)[extent.start : extent.start + extent.size].zero_()

    @on_every_rank
    def behind(self, extent: Extent, room: int) -> Extent:
        """Room for new tokens alone, of a row that reads what is in `extent` before them.

        In e4m3 they are stored by the same scales.
        """
        return self._take([0] * len(extent.stored), room, extent.line)

    @on_every_rank
    @torch.inference_mode()
    def copy_of(self, extent: Extent, room: int) -> Extent:
        """The same keys and values once more, with as much room behind them: `room` is that of the first."""
        copy = self._take(extent.stored, room, None if extent.owns_line else extent.line)
        for scales in self._scales if copy.owns_line else ():
            for values in (scales.keys_LK, scales.values_LK, scales.means_LKd):
                values[copy.line] = values[extent.line]
        source, target = (slice(each.start, each.start + each.size) for each in (extent, copy))
        for pool in map(_bytes, self._pool):
            pool[target] = pool[source]
        return copy

    def _take(self, stored: Sequence[int], new_tokens: int, line: int | None = None) -> Extent:
        """A row's extent, with a line of its own, or that of another extent."""
        rooms = [max(tokens, self._overshoot) + new_tokens for tokens in stored]
        size = sum(rooms)
        start = self._extents.take(size)
        if start is None:
            self._compact()
            start = self._extents.take(size)
        assert start is not None, "the store has no room for a row that was let in"
        firsts = (0, *accumulate(rooms[:-1]))
        offsets = tuple(
            first + max(0, self._overshoot - tokens) for first, tokens in zip(firsts, stored, strict=True)
        )
        owns_line = line is None
        if line is None:
            line = self._lines.pop() if self._scales else 0
        extent = Extent(
            start=start, offsets=offsets, stored=tuple(stored), size=size, line=line, owns_line=owns_line
        )
        self._rows[start] = extent
        return extent

    def _compact(self) -> None:
        self.moves += 1
        for move in self._extents.compact():
            for done in range(0, move.size, MOVED_AT_ONCE):
                count = min(MOVED_AT_ONCE, move.size - done)
                for pool in map(_bytes, self._pool):  # through a copy: the two places may overlap
                    part = pool[move.start + done : move.start + done + count].clone()
                    pool[move.to + done : move.to + done + count] = part
            extent = self._rows.pop(move.start)
            extent.start = move.to
            self._rows[move.to] = extent


def store_for(decoder: Decoder, slots: int, *, dtype: torch.dtype, extents: int) -> KvStore:
    """A store for rows of a model, of several ranks each with its own heads.

    Raises torch.OutOfMemoryError where a device has no room for it.
    """
    store = _store_if_room(decoder, slots, dtype, extents)
    if store is None:
        raise torch.OutOfMemoryError("a device with a part of the model has no room for the keys and values")
    return store


@on_every_rank
def _store_if_room(decoder: Decoder, slots: int, dtype: torch.dtype, extents: int) -> KvStore | None:
    """None where a rank has no room."""
    ranks, store = decoder.ranks, None
    try:
        store = KvStore(slots, decoder.own, dtype=dtype, device=decoder.device, extents=extents)
    except torch.OutOfMemoryError:
        if ranks is None:
            raise
    return store if ranks is None or ranks.all(store is not None) else None


def rows_in(
    cache: RaggedCache, decoder: Decoder, new_tokens: int, *, dtype: torch.dtype, converts: bool, frees: bool
) -> tuple[KeysValues, list[Extent], list[Extent]]:
    """Where rows of a prefill are decoded, the place of each there, and those of documents that they share.

    `dtype` is what they are kept in, and `converts` whether that is another type than the cache's, which with
    `frees` loses what is copied. A single row that shares nothing, and keeps its type, stays where it is,
    without an extent; others go where a batch can be padded.
    """
    own = list(zip(*cache.own_tokens(), strict=True))
    if len(own) == 1 and cache.shared is None and not converts:
        assert new_tokens <= cache.new_tokens + 1, "the cache has no room for the answer"
        return cache, [], []
    before = None if cache.shared is None else cache.shared.cache
    documents = [] if before is None else list(zip(*before.own_tokens(), strict=True))
    assert cache.dtype != FP8, "keys and values in e4m3 stay where they are"
    slots = sum(slots_needed(layers, new_tokens, cache.device) for layers in own)
    slots += sum(slots_needed(layers, 0, cache.device) for layers in documents)
    extents = len(own) + len(documents)
    store = store_for(decoder, slots, dtype=dtype, extents=extents)
    shared = [] if before is None else store.adopt(before)
    of_rows = [] if cache.shared is None else [shared[document] for document in cache.shared.of_row]
    return store, store.adopt(cache, [new_tokens] * len(own), shared=of_rows, frees=frees), shared


def _bytes(pool: Tensor) -> Tensor:
    """A pool in e4m3 as bytes, in which zeros are zeros too."""
    return pool.view(torch.uint8) if pool.dtype == FP8 else pool


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU from pages that the system provides when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = shape[0] * shape[1] * shape[2]
    return torch.from_numpy(np.zeros(count * dtype.itemsize, np.uint8)).view(dtype).view(shape)
