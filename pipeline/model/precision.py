"""Which tokens of a prefill keep the model's dtype where its large matrix products are in fp8.

An answer feels the rounding of the tokens that ask for it far more than that of the document before them: on
Qwen2.5-Coder-1.5B the divergence from the model's own answers falls fivefold where the last 64 tokens and the
answer are kept, and by half again where queries, keys and values are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

import torch
from torch import Tensor

from pipeline.kernels.segments import Segments
from pipeline.pruning.shape import ModelShape

WINDOW = 64  # last tokens of each document
LEAST_WORK = 1 << 38  # products of a layer, below which fp8 costs a GPU more launches than it saves


@dataclass(frozen=True)
class Kept:
    """Tokens of a pack that keep the model's dtype, and the others: some of both."""

    ranges: tuple[tuple[int, int], ...]  # half-open, ascending, none empty, with gaps between them
    total: int
    device: torch.device

    @cached_property
    def parts(self) -> tuple[tuple[slice, bool], ...]:
        """The pack in pieces, and whether each is computed in fp8.

        They are few: who is not kept belongs to a document that is long.
        """
        cuts = sorted({0, self.total, *chain.from_iterable(self.ranges)})
        starts = {start for start, _ in self.ranges}
        return tuple((slice(start, end), start not in starts) for start, end in pairwise(cuts))

    @cached_property
    def rows(self) -> Tensor:
        """(W,) ascending."""
        return self._places(in_fp8=False)

    @cached_property
    def others(self) -> Tensor:
        """(T - W,) ascending."""
        return self._places(in_fp8=True)

    @cached_property
    def _mask_T(self) -> Tensor:
        mask_T = torch.zeros(self.total, dtype=torch.bool, device=self.device)
        mask_T[self.rows] = True
        return mask_T

    def split(self, passes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the tokens `passes` (None: all) those that are kept, and the others."""
        if passes is None:
            return self.rows, self.others
        kept_C = self._mask_T.index_select(0, passes)
        return passes[kept_C], passes[~kept_C]

    def _places(self, *, in_fp8: bool) -> Tensor:
        chosen = [rows for rows, low in self.parts if low == in_fp8]
        return torch.cat([torch.arange(rows.start, rows.stop, device=self.device) for rows in chosen])


def kept_of(segments: Segments, shape: ModelShape) -> Kept | None:
    """Each document's last `WINDOW` tokens, and all of those that are too short to gain; None if that is all.

    Each document, or what is left of it, is judged by itself, so that it is computed alike whatever its pack.
    """
    ranges: list[tuple[int, int]] = []
    for start, end in segments.ranges():
        first = max(start, end - WINDOW) if worthwhile(end - start, shape, segments.device) else start
        if first == end:
            continue
        if ranges and ranges[-1][1] == first:
            first = ranges.pop()[0]
        ranges.append((first, end))
    if sum(end - start for start, end in ranges) == segments.total:
        return None
    return Kept(tuple(ranges), segments.total, segments.device)


def worthwhile(length: int, shape: ModelShape, device: torch.device) -> bool:
    """Whether fp8 makes a document of so many tokens faster."""
    weights = shape.hidden * (shape.heads * shape.head_dim + 3 * shape.ffn_per_token)
    return length * weights >= LEAST_WORK or device.type != "cuda"
