"""What a method is shown after a layer's attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from operator import add

import torch
from torch import Tensor

from pipeline.kernels.scoring import window_importance, window_importance_by_head, windows_of
from pipeline.kernels.segments import Segments, on_device
from pipeline.ranks.collectives import Ranks
from pipeline.records import Spans

Range = tuple[int, int]  # half-open, in original positions


@dataclass(kw_only=True)
class LayerView:
    """What a method may look at after a layer's attention. Scores are computed only when asked for."""

    layer: int
    queries: Tensor  # (T, H, d) with RoPE; none for a method that does not read layers
    keys: Tensor  # (T, K, d) with RoPE
    values: Tensor  # (T, K, d)
    hidden: Tensor  # (T, D) residual stream after attention
    positions: Tensor  # (T,) original positions, ascending within a document
    segments: Segments  # documents as they entered this layer
    lengths: tuple[int, ...]  # documents as they entered the model
    spans: tuple[Spans, ...]
    ranks: Ranks | None = None  # of which each has some of the heads
    scored_pairs: tuple[int, ...] = ()  # of each document: query-key pairs recomputed for scoring

    def window_importance(self, window: int | Sequence[int], *, heads: str = "mean") -> Tensor:
        """(T,) attention each token gets from its document's last `window` queries, mean over them.

        One window for all documents or one each; `heads` says what of the query heads, "mean" or "max".
        """
        self._count_window(window)
        own_T = window_importance(self.queries, self.keys, self.segments, window, heads=heads)
        if self.ranks is None:
            return own_T
        return self.ranks.largest(own_T) if heads == "max" else self.ranks.mean(own_T)

    def window_importance_by_head(self, window: int | Sequence[int]) -> Tensor:
        """(K, T) the same for each key/value head, mean over the query heads that share it."""
        self._count_window(window)
        return window_importance_by_head(self.queries, self.keys, self.segments, window)

    def _count_window(self, window: int | Sequence[int]) -> None:
        counts = zip(windows_of(window, self.segments), self.segments.lengths, strict=True)
        self.count_pairs(min(count, length) * length for count, length in counts)

    def count_pairs(self, pairs: Iterable[int]) -> None:
        """Add query-key products, of all heads, to each document's count of operations."""
        before = self.scored_pairs or (0,) * len(self.segments)
        self.scored_pairs = tuple(map(add, before, pairs))

    @cached_property
    def all_indices(self) -> Tensor:
        return torch.arange(self.segments.total, device=self.hidden.device)

    def mask_of(self, ranges: Sequence[Sequence[Range]]) -> Tensor:
        """(T,) bool: tokens whose original position lies in one of their document's ranges."""
        return mask_of(ranges, self.segments, self.positions)


def mask_of(ranges: Sequence[Sequence[Range]], segments: Segments, positions_T: Tensor) -> Tensor:
    """(T,) bool: tokens of a pack whose original position lies in one of their document's ranges."""
    mask_T = torch.zeros(segments.total, dtype=torch.bool, device=segments.device)
    # the n-th range of all documents at once, however many documents there are
    for nth in zip_longest(*ranges, fillvalue=(0, 0)):
        first_B, stop_B = on_device(nth, mask_T.device).T
        document_T = segments.document_T
        mask_T |= (positions_T >= first_B[document_T]) & (positions_T < stop_B[document_T])
    return mask_T
