"""Attention of a pack's documents in a prefill, of the long ones block-sparse: see sparse.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pipeline.kernels import sparse
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.blocks.block_attention import block_sparse_attention, suits_whole_rows
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.query_pieces import QueryPart, QueryPiece
from pipeline.kernels.segments import Segments, end_to_end, on_device


@dataclass(frozen=True)
class SparsePrefill:
    """Causal attention within each document of a pack, of long ones block-sparse, of short ones whole."""

    attention: AttentionBackend
    segments: Segments
    width: int  # of all query heads together
    _slots: dict[tuple[QueryPart, ...], DecodeSlots] = field(default_factory=dict, compare=False)

    @cached_property
    def long(self) -> tuple[bool, ...]:
        """Of each document whether it is block-sparse."""
        device = self.segments.device
        least = self.attention.sparse_from
        return tuple(sparse.applies(length, self.width, device, least) for length in self.segments.lengths)

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, mass: float, sinks_H: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(T, H, d), and how many query-key pairs were computed of each document: (B,) mean over heads.

        None for all pairs. `mass` is the share of the attention that the blocks chosen are to reach, as
        estimated; with 0 nothing is estimated, and only those are attended to that always are. Sinks, see
        attention.py, change nothing of the choice.
        """
        whole = QueryPiece.whole(self.segments)
        attended_THd, listed_B = self.attend_piece(whole, q_THd, k_TKd, v_TKd, mass, sinks_H)
        return attended_THd, None if listed_B is None else self.pairs(listed_B, q_THd.shape[1])

    def attend_piece(
        self,
        piece: QueryPiece,
        q_QHd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        mass: float,
        sinks_H: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same of some of the queries, (Q, H, d), over the keys and values of the whole pack.

        In place of pairs it tells `listed_blocks` of each document, (B,), which `pairs` wants of all pieces.
        """
        if not any(self.long):
            return self.attention.prefill_piece(
                q_QHd, k_TKd, v_TKd, self.segments, piece, sinks_H=sinks_H
            ), None
        ranges = self.segments.ranges()
        of_short = iter(self._whole(piece, q_QHd, k_TKd, v_TKd, sinks_H))
        outputs: list[Tensor] = []
        listed = [torch.zeros((), dtype=torch.int64, device=q_QHd.device)] * len(ranges)
        asking: dict[QueryPart, slice] = {}  # whose last queries attend to everything, and are left out
        for part, rows in piece.placed():
            if not self.long[part.document]:
                outputs.append(next(of_short))
                continue
            assert part.first % sparse.BLOCK == 0, "a piece that begins within a block"
            start, end = ranges[part.document]
            q, k, v = q_QHd[rows], k_TKd[start:end], v_TKd[start:end]
            blocks = sparse.choose_blocks(q, k, mass, part.first // sparse.BLOCK)
            left_out = -(-max(0, part.end - _first_whole(part, end - start)) // sparse.BLOCK)
            if suits_whole_rows(q, k, v, blocks, sinks_H):
                left_out = 0
            elif left_out:
                asking[part] = rows
            outputs.append(block_sparse_attention(q, k, v, blocks, left_out, sinks_H))
            listed[part.document] = sparse.listed_blocks(blocks, end - start)
        attended_QHd = end_to_end(outputs)
        if asking:
            slots = self._seen_by_last(tuple(asking))
            counts = slots.known.queries
            last = [slice(r.stop - count, r.stop) for r, count in zip(asking.values(), counts, strict=True)]
            own_QHd = self.attention.decode(
                torch.cat([q_QHd[rows] for rows in last]), k_TKd, v_TKd, slots, sinks_H
            )
            for rows, own in zip(last, own_QHd.split(counts), strict=True):
                attended_QHd[rows] = own
        return attended_QHd, torch.stack(listed)

    def pairs(self, listed_B: Tensor, heads: int) -> Tensor:
        """(B,) query-key pairs of each document that are computed; see `attend_piece` for `listed_B`."""
        return listed_B * sparse.BLOCK**2 // heads + self._pairs_beside

    @cached_property
    def _pairs_beside(self) -> Tensor:
        """(B,) those that are not of whole blocks listed."""
        lengths = zip(self.segments.lengths, self.long, strict=True)
        pairs = [sparse.ragged_pairs(n) if is_long else n * (n + 1) // 2 for n, is_long in lengths]
        return on_device(pairs, self.segments.device)

    def _seen_by_last(self, parts: tuple[QueryPart, ...]) -> DecodeSlots:
        """What those tokens of each part attend to that are in a document's last `WHOLE_ROWS` blocks."""
        if parts not in self._slots:
            of_all = self.segments
            starts, used = [of_all.offsets[part.document] for part in parts], [part.end for part in parts]
            counts = [part.end - _first_whole(part, of_all.lengths[part.document]) for part in parts]
            self._slots[parts] = DecodeSlots.of(starts, used, of_all.total, of_all.device, counts)
        return self._slots[parts]

    def estimated_pairs(self, mass: float) -> tuple[int, ...]:
        """Query-key products, of all heads, by which `attend` chooses blocks, of each document."""
        if not 0 < mass < 1:
            return (0,) * len(self.segments)
        documents = zip(self.segments.lengths, self.long, strict=True)
        return tuple(sparse.estimated_pairs(length) if is_long else 0 for length, is_long in documents)

    def _whole(
        self, piece: QueryPiece, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Attention of a piece's short documents over all pairs, in one call."""
        placed = [(part, rows) for part, rows in piece.placed() if not self.long[part.document]]
        if not placed:
            return ()
        counts = [part.end - part.first for part, _ in placed]
        q = torch.cat([q_QHd[rows] for _, rows in placed])
        ranges = [self.segments.ranges()[part.document] for part, _ in placed]
        if counts != [end - start for start, end in ranges]:
            used = [part.end for part, _ in placed]
            slots = DecodeSlots.of([start for start, _ in ranges], used, len(k_TKd), q.device, counts)
            return self.attention.decode(q, k_TKd, v_TKd, slots, sinks_H).split(counts)
        k, v = (torch.cat([x[start:end] for start, end in ranges]) for x in (k_TKd, v_TKd))
        return self.attention.prefill(q, k, v, Segments.of(counts, q.device), sinks_H=sinks_H).split(counts)


def _first_whole(part: QueryPart, length: int) -> int:
    """The first token of a part of a long document that attends to everything."""
    return max(part.first, sparse.BLOCK * max(0, -(-length // sparse.BLOCK) - sparse.WHOLE_ROWS))
