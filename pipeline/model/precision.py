"""Which tokens of a prefill keep the model's dtype where its large matrix products are in fp8.

An answer feels the rounding of the tokens that ask for it far more than that of the document before them: on
Qwen2.5-Coder-1.5B the divergence from the model's own answers falls fivefold where the last 64 tokens and the
answer are kept, and by half again where queries, keys and values are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipeline.kernels.segments import Segments
from pipeline.model.shape import ModelShape

WINDOW = 64  # last tokens of each document
LEAST_WORK = 1 << 38  # products of a layer, below which fp8 costs a GPU more launches than it saves


@dataclass(frozen=True)
class Kept:
    """Tokens of a pack that keep the model's dtype, and the others: some of both."""

    ranges: tuple[tuple[int, int], ...]  # half-open, ascending, none empty
    total: int
    device: torch.device

    @cached_property
    def rows(self) -> Tensor:
        """(W,) ascending."""
        return _rows(self.ranges, self.device)

    @cached_property
    def others(self) -> Tensor:
        """(T - W,) ascending."""
        ends = [0, *(end for _, end in self.ranges)]
        starts = [*(start for start, _ in self.ranges), self.total]
        return _rows(zip(ends, starts, strict=True), self.device)

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


def kept_of(segments: Segments, lengths: tuple[int, ...], shape: ModelShape) -> Kept | None:
    """Each document's last `WINDOW` tokens, and all of those that are too short to gain; None if that is all.

    `segments` are what is left of the documents, `lengths` how long they were: by that it is judged, so
    that a document is computed alike whatever its pack.
    """
    ranges = []
    for (start, end), length in zip(segments.ranges(), lengths, strict=True):
        first = max(start, end - WINDOW) if worthwhile(length, shape, segments.device) else start
        if first < end:
            ranges.append((first, end))
    if sum(end - start for start, end in ranges) == segments.total:
        return None
    return Kept(tuple(ranges), segments.total, segments.device)


def worthwhile(length: int, shape: ModelShape, device: torch.device) -> bool:
    """Whether fp8 makes a document of so many tokens faster."""
    weights = shape.hidden * (shape.heads * shape.head_dim + 3 * shape.ffn)
    return length * weights >= LEAST_WORK or device.type != "cuda"


def _rows(ranges: Iterator[tuple[int, int]] | tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, end, device=device) for start, end in ranges])
