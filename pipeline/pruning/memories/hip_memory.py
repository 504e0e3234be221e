"""The memory of `hip`: all keys and values of a document, of which each block of queries reads a few.

Where the document and its answer fit into the model's context, keys are stored with RoPE at their own
positions, the last queries of the prompt attend to all of them, and so do generated tokens. Beyond the
context they are stored before RoPE. What a block reads is then numbered from 0, one key after the other as
if there were none between them, and the block's queries stand at its end: so no position exceeds the number
of keys that are read. Which keys these are is judged as if each were as far away as the window is long.
Letters beside those of segments.py: B blocks of queries, Q queries, N keys that are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.kernels import sparse
from pipeline.kernels.blocks.block_attention import block_sparse_attention
from pipeline.kernels.segments import end_to_end, on_device
from pipeline.pruning.memories.hip_choice import (
    AVERAGED,
    QUERY_BLOCK,
    ChunkStage,
    blocks_at_once,
    choose_chunks,
)
from pipeline.pruning.memories.key_memory import KeyMemory, MemoryNeeds, attended_by_last


class HipLayer(NamedTuple):
    """How a layer chooses."""

    stages: tuple[ChunkStage, ...]
    sink: int  # first keys that every query reads
    window: int  # last ones, before those of a query's own block

    @property
    def chunk(self) -> int:
        return self.stages[-1].chunk

    def chosen(self, stop: int) -> int:
        """How many chunks are chosen of the keys between the sink and `stop`."""
        return min(self.stages[-1].keep, max(0, stop - self.sink)) // self.chunk

    @property
    def most_read(self) -> int:
        """Keys that a query reads at most, those of its own block among them."""
        return self.sink + self.stages[-1].keep + self.window + QUERY_BLOCK

    def far(self, stop: int) -> int:
        """Keys before `stop`, where the window begins, that a query reads."""
        return min(self.sink, stop) + self.chosen(stop) * self.chunk


class _Held(NamedTuple):
    """What a generated token has chosen, for some that follow it."""

    position: int
    stop: int  # before which the chunks are
    start_HBC: Tensor


class HipMemory(KeyMemory):
    """Keys and values of a document, layer by layer, with room for those of its answer."""

    def __init__(
        self, needs: MemoryNeeds, layers: tuple[HipLayer, ...], *, dense_below: int, last: int, refresh: int
    ) -> None:
        """Prompts below `dense_below` attend to all, as the `last` queries do; within the context.

        Beyond it every `refresh`-th generated token chooses.
        """
        super().__init__(len(layers))
        self._layers, self._attention, self._device = layers, needs.attention, needs.device
        self._fits, self._refresh, self._prompt = needs.fits_context, refresh, needs.length
        first_whole = 0 if needs.length < dense_below else needs.length - last
        self._first_whole = max(0, first_whole) if self._fits else None
        shape, room = needs.shape, needs.length + needs.new_tokens
        most = max(layer.most_read for layer in layers) + refresh
        self._rotation = needs.rotation(room if self._fits else min(room, most))
        size = (len(layers), room, shape.kv_heads, shape.head_dim)
        # zeros, since kernels multiply what they mask
        self._keys, self._values = (
            torch.zeros(size, dtype=needs.dtype, device=needs.device) for _ in range(2)
        )
        self._used = [0] * len(layers)
        self._held: list[_Held | None] = [None] * len(layers)

    @property
    def stored(self) -> list[int]:
        return self._used.copy()

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def attend(self, layer: int, q_QHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        start, end = self._used[layer], self._used[layer] + len(k_NKd)
        assert end <= self._keys.shape[1], "the memory has no room for more tokens"
        self._keys[layer, start:end], self._values[layer, start:end] = k_NKd, v_NKd
        if self._fits:
            self._rotation.turn_keys_(layer, self._keys[layer, start:end], self._places(start, end))
        self._used[layer] = end
        first = end - len(q_QHd)
        if self._first_whole is None:
            return self._beyond_context(layer, q_QHd, first, end)
        q_QHd = self._rotation.queries(layer, q_QHd, self._places(first, end))
        between = min(max(first, self._first_whole), end)
        outputs = []
        if first < between:
            outputs.append(self._chosen(layer, q_QHd[: between - first], first, between))
        if between < end:
            outputs.append(self._whole(layer, q_QHd[between - first :], between, end))
        return end_to_end(outputs)

    def _beyond_context(self, layer: int, q_QHd: Tensor, first: int, end: int) -> Tensor:
        """Attention of the prompt's queries by blocks, and of the answer's one by one, as they are generated.

        Several of these come together where an answer is given: they must choose no otherwise than without
        the tokens behind them.
        """
        asked = min(max(first, self._prompt), end)
        parts = [(first, asked)] if first < asked else []
        parts += [(at, at + 1) for at in range(asked, end)]
        outputs = [self._chosen(layer, q_QHd[a - first : b - first], a, b) for a, b in parts]
        return end_to_end(outputs)

    def _places(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self._device)

    def _whole(self, layer: int, q_QHd: Tensor, first: int, end: int) -> Tensor:
        """Attention of the queries from `first` to `end` to all keys before them."""
        keys, values = self._keys[layer, :end], self._values[layer, :end]
        self.pairs[layer] += _causal_pairs(end) - _causal_pairs(first)
        return attended_by_last(self._attention, q_QHd, keys, values)

    def _chosen(self, layer: int, q_QHd: Tensor, first: int, end: int) -> Tensor:
        """Attention of queries without RoPE, or with it within the context, to what their blocks choose."""
        of = self._layers[layer]
        own = range(first // QUERY_BLOCK, -(-end // QUERY_BLOCK))
        # of a block that is not whole the first or the last query stands for those that lack
        place_BQ = self._places(own.start * QUERY_BLOCK, own.stop * QUERY_BLOCK).view(-1, QUERY_BLOCK)
        before = first - own.start * QUERY_BLOCK
        if end - first == 1:
            place_BQ, before = place_BQ[:, :AVERAGED], 0
        place_BQ = place_BQ.clamp(first, end - 1)
        q_BQHd = q_QHd[place_BQ - first]
        stops = [max(0, block * QUERY_BLOCK - of.window) for block in own]
        start_HBC = self._choice(layer, q_BQHd, place_BQ, stops, first, end)
        held = self._held[layer]
        if held is not None:  # by which the stop is that of the token that has chosen
            stops = [held.stop]
        ends = [min(end, (block + 1) * QUERY_BLOCK) for block in own]
        self._count(layer, stops, ends, end - first)
        if self._reads_blocks(of, q_QHd, first):
            return self._by_blocks(layer, q_QHd, own, start_HBC, stops, end)
        heads, head_dim = q_QHd.shape[1:]
        at_once = blocks_at_once(heads, min(of.most_read, end), head_dim)
        parts = [
            self._read(layer, q_BQHd[b:c], place_BQ[b:c], start_HBC[:, b:c], stops[b:c], ends[b:c])
            for b, c in ((b, b + at_once) for b in range(0, len(own), at_once))
        ]
        return torch.cat(parts).flatten(0, 1)[before : before + end - first]

    def _queries_at(self, layer: int, q_BQHd: Tensor, positions_BQ: Tensor) -> Tensor:
        turned = self._rotation.queries(layer, q_BQHd.flatten(0, 1), positions_BQ.flatten())
        return turned.unflatten(0, positions_BQ.shape)

    def _choice(
        self, layer: int, q_BQHd: Tensor, place_BQ: Tensor, stops: list[int], first: int, end: int
    ) -> Tensor:
        """See `choose_chunks`; of a generated token that of one shortly before it, where there is one."""
        of = self._layers[layer]
        is_generated = first >= self._prompt and not self._fits
        held = self._held[layer] if is_generated else None
        if held is not None and held.position < first < held.position + self._refresh:
            return held.start_HBC
        if not self._fits:
            q_BQHd = self._queries_at(layer, q_BQHd, torch.full_like(place_BQ, of.window + 1))
        keys = self._keys[layer, :end]
        self.estimated_pairs[layer] += sum(_estimated(of, stop) for stop in stops)
        start_HBC = choose_chunks(q_BQHd, keys, of.sink, stops, of.stages)
        self._held[layer] = _Held(first, stops[0], start_HBC) if is_generated else None
        return start_HBC

    def _count(self, layer: int, stops: list[int], ends: list[int], queries: int) -> None:
        """Add the query-key pairs of blocks that end there; the first may begin within its block."""
        of, left = self._layers[layer], queries
        for stop, end in zip(reversed(stops), reversed(ends), strict=True):
            asked = min(left, (end - 1) % QUERY_BLOCK + 1)
            self.pairs[layer] += asked * (of.far(stop) + end - stop) - asked * (asked - 1) // 2
            left -= asked

    def _read(
        self,
        layer: int,
        q_BQHd: Tensor,
        place_BQ: Tensor,
        start_HBC: Tensor,
        stops: list[int],
        ends: list[int],
    ) -> Tensor:
        """(B, Q, H, d) attention of some blocks of queries to the keys that are gathered for them."""
        of, (heads, blocks, _) = self._layers[layer], start_HBC.shape
        most = max(map(of.chosen, stops))
        stop_B1 = on_device(stops, self._device)[:, None]
        sink_B1 = stop_B1.clamp(max=of.sink)
        chosen_B1 = on_device([of.chosen(stop) * of.chunk for stop in stops], self._device)[:, None]
        sink_N, chosen_N = self._places(0, of.sink), self._places(0, most * of.chunk)
        near_N = self._places(0, max(end - stop for end, stop in zip(ends, stops, strict=True)))
        place_HBC = (start_HBC[..., :most, None] + self._places(0, of.chunk)).flatten(2)
        shared_BN = stop_B1 + near_N
        place_HBN = torch.cat(
            (sink_N.expand(heads, blocks, -1), place_HBC, shared_BN.expand(heads, -1, -1)), dim=2
        )
        group = heads // self._keys.shape[2]
        head_H11 = torch.arange(heads, device=self._device)[:, None, None] // group
        keys, values = (
            held[layer].transpose(0, 1)[head_H11, place_HBN.clamp(max=ends[-1] - 1)]
            for held in (self._keys, self._values)
        )
        seen_BQN = torch.cat(
            (
                (sink_N < sink_B1)[:, None].expand(-1, place_BQ.shape[1], -1),
                (chosen_N < chosen_B1)[:, None].expand(-1, place_BQ.shape[1], -1),
                shared_BN[:, None] <= place_BQ[..., None],
            ),
            dim=2,
        )
        if not self._fits:
            rank_BN = torch.cat(
                (sink_N.expand(blocks, -1), sink_B1 + chosen_N, sink_B1 + chosen_B1 + near_N), dim=1
            )
            self._rotation.turn_keys_(layer, keys.flatten(1, 2).transpose(0, 1), rank_BN.flatten())
            q_BQHd = self._queries_at(layer, q_BQHd, place_BQ - stop_B1 + sink_B1 + chosen_B1)
        attended_BHQd = scaled_dot_product_attention(
            q_BQHd.transpose(1, 2), keys.transpose(0, 1), values.transpose(0, 1), attn_mask=seen_BQN[:, None]
        )
        return attended_BHQd.transpose(1, 2)

    def _reads_blocks(self, of: HipLayer, q_QHd: Tensor, first: int) -> bool:
        """Whether the kernel of block-sparse attention serves, whose blocks of keys are those of queries."""
        aligned = first % QUERY_BLOCK == 0 and of.chunk == QUERY_BLOCK
        return self._fits and aligned and sparse.has_kernels(q_QHd)

    def _by_blocks(
        self, layer: int, q_QHd: Tensor, own: range, start_HBC: Tensor, stops: list[int], end: int
    ) -> Tensor:
        """The same by the kernel of block-sparse attention."""
        of = self._layers[layer]
        heads, blocks, _ = start_HBC.shape
        stop_B1 = on_device(stops, self._device)[:, None] // QUERY_BLOCK
        own_B1 = torch.arange(own.start, own.stop, device=self._device)[:, None]
        missing = own.stop
        sink_BN = self._places(0, of.sink // QUERY_BLOCK).expand(blocks, -1)
        near_BN = stop_B1 + self._places(0, of.window // QUERY_BLOCK + 1)
        beside_BN = torch.cat(
            (
                sink_BN.masked_fill(sink_BN >= stop_B1, missing),
                near_BN.masked_fill(near_BN > own_B1, missing),
            ),
            dim=1,
        )
        is_chosen_HBC = start_HBC < stop_B1 * QUERY_BLOCK
        chosen_HBC = (start_HBC // QUERY_BLOCK).masked_fill(~is_chosen_HBC, missing)
        listed_HBN = torch.cat((beside_BN.expand(heads, -1, -1), chosen_HBC), dim=2).sort(dim=-1).values
        counts_HB = (listed_HBN < missing).sum(-1, dtype=torch.int32)
        lists = sparse.BlockLists(listed_HBN.int().contiguous(), counts_HB, own.start)
        keys, values = self._keys[layer, :end], self._values[layer, :end]
        return block_sparse_attention(q_QHd, keys, values, lists, block=QUERY_BLOCK)


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def attended_pairs(of: HipLayer, tokens: int) -> int:
    """Query-key pairs of so many first queries of a document that all choose, of each head."""
    pairs = 0
    for start in range(0, tokens, QUERY_BLOCK):
        asked, stop = min(QUERY_BLOCK, tokens - start), max(0, start - of.window)
        pairs += asked * (of.far(stop) + start - stop) + _causal_pairs(asked)
    return pairs


def _estimated(of: HipLayer, stop: int) -> int:
    """Products of a block's queries with keys by which it chooses, of each head."""
    left, pairs = max(0, stop - of.sink), 0
    for number, stage in enumerate(of.stages):
        queries = QUERY_BLOCK if number + 1 == len(of.stages) else QUERY_BLOCK // 4
        if left > stage.keep:
            pairs += queries * 2 * (stage.chunk - 1).bit_length() * -(-left // stage.chunk)
        left = min(left, stage.keep)
    return pairs
