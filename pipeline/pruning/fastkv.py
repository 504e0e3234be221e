"""FastKV: tokens are dropped once in the middle of the model, and every layer's K/V are compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Self

import torch
from torch import Tensor

from pipeline.kernels.scoring import smoothed
from pipeline.kernels.select import top_indices
from pipeline.pruning.base import Plan, PruningMethod, Selection, layer_of, one_share
from pipeline.pruning.limits import check_pool, setting
from pipeline.pruning.operations import Passes, whole_layers
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView, Range
from pipeline.records import Spans

PAPER_LAYER = 15


@dataclass(frozen=True, kw_only=True)
class FastKV(PruningMethod):
    """Tokens dropped once, after one middle layer; K/V of every layer compressed head by head.

    Source: FastKV (arXiv 2502.01068).

    In every layer the softmax attention of the last `window` queries over the tokens before them is summed
    over the queries, averaged over `pool` neighbours and summed over the query heads that share a key
    head. Each key/value head stores its own `kv_share` of the prompt, the best tokens and the window. At
    one layer, 15 of 32, the scores summed over heads choose `share` of the prompt: the other tokens leave
    after that layer's feed-forward network.

    The paper compresses K/V apart from the drop, to 10% in its main results. Our choices: other depths are
    scaled; counts are rounded up, and reckoned from the prompt's length in every layer; of equal scores
    the earlier token wins.
    """

    name: ClassVar[str] = "fastkv"
    source: ClassVar[str] = "arXiv 2502.01068"

    layer: int | None = setting(
        None, "layer after which tokens are dropped; by default 15 of 32, scaled", is_layer=True
    )
    share: float = setting(0.2, "share of the prompt that goes on to later layers", low=0, high=1)
    kv_share: float = setting(0.1, "share of the prompt whose K/V each head stores", low=0, high=1)
    window: int = setting(8, "last tokens: their queries score, and they are kept", low=1, whole=True)
    pool: int = setting(7, "neighbours that a score is averaged over; odd", low=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self.pool)

    def drop_layer(self, depth: int) -> int:
        """The layer that drops; raises ConfigError if the model has no such layer."""
        return layer_of(self.layer, PAPER_LAYER, depth)

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        self.check_depth(shape)
        drop = self.drop_layer(shape.layers)
        stored = sum(self._count(self.kv_share, n, n) for n in lengths)
        late = sum(min(self._count(self.kv_share, n, n), self._count(self.share, n, n)) for n in lengths)
        tokens = (stored,) * (drop + 1) + (late,) * (shape.layers - drop - 1)
        return Plan(shape=shape, lengths=tuple(lengths), cache_tokens=tokens)

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return self.kv_share < 1 or self.drop_layer(shape.layers) == shape.layers - 1

    def shared_layers(self, shape: ModelShape) -> int:
        # which keys and values a layer stores is the question's to say, unless it stores all
        return self.drop_layer(shape.layers) if self.kv_share >= 1 else 0

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        whole = self.drop_layer(shape.layers) + 1
        kept = self._count(self.share, length, length)
        layers = whole_layers(whole, length) + whole_layers(shape.layers - whole, kept)
        return [self.to_the_end(shape, layers)]

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return ((length - self.window, length),)

    def with_keep(self, shares: tuple[float, ...]) -> Self:
        return replace(self, share=one_share(self.name, shares))

    def begin(self, plan: Plan) -> Plan:
        return plan

    def select(self, layer: int, view: LayerView, state: Plan) -> Selection:
        drops = layer == self.drop_layer(state.shape.layers)
        stored = self._counts(self.kv_share, view, state)
        alive = self._counts(self.share, view, state) if drops else list(view.segments.lengths)
        stores_all, keeps_all = (list(view.segments.lengths) == counts for counts in (stored, alive))
        if stores_all and keeps_all:
            return Selection()
        scores_KT = self._scores(view)
        cache = None if stores_all else _best(scores_KT, view, stored)
        if keeps_all:
            return Selection(cache=cache, cache_lengths=tuple(stored))
        (live_C,) = _best(scores_KT.sum(0, keepdim=True), view, alive)
        return Selection(
            live=live_C,
            ffn=view.all_indices,
            cache=cache,
            live_lengths=tuple(alive),
            cache_lengths=tuple(stored),
        )

    def _scores(self, view: LayerView) -> Tensor:
        """(K, T) smoothed attention of the window, infinite for the window itself."""
        attention_KT = view.window_importance_by_head(self.window)
        parts = []
        for start, end in view.segments.ranges():
            before = max(start, end - self.window)
            parts += [smoothed(attention_KT[:, start:before], self.pool)] if before > start else []
            parts.append(torch.full_like(attention_KT[:, before:end], float("inf")))
        return torch.cat(parts, dim=1)

    def _counts(self, share: float, view: LayerView, state: Plan) -> list[int]:
        pairs = zip(view.segments.lengths, state.lengths, strict=True)
        return [self._count(share, alive, length) for alive, length in pairs]

    def _count(self, share: float, alive: int, length: int) -> int:
        """Tokens out of `alive` ones of a prompt of `length`; at least the window."""
        return min(max(ceil(share * length), self.window), alive)


def _best(scores_NT: Tensor, view: LayerView, counts: Sequence[int]) -> Tensor:
    """(N, C) of each row and document its best tokens, as many as `counts` has for the document."""
    documents = zip(view.segments.ranges(), counts, strict=True)
    return torch.cat([top_indices(scores_NT[:, a:b], count) + a for (a, b), count in documents], dim=1)
