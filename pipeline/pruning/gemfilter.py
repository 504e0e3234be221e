"""GemFilter: the first layers choose a few tokens, and the whole model runs on those alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Self

import torch

from pipeline.kernels.scoring import last_query_products, smoothed
from pipeline.kernels.select import top_mask
from pipeline.pruning.base import KEEP_ALL, Plan, PruningMethod, Selection, layer_of, one_share
from pipeline.pruning.limits import Limits, check_limits, check_pool, setting
from pipeline.pruning.operations import LayerWork, Passes, whole_layers
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView

PAPER_LAYER = 13


@dataclass(kw_only=True)
class GemState:
    """One pack's prefill: its plan, and whether the tokens have been chosen."""

    plan: Plan
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class GemFilter(PruningMethod):
    """Few tokens chosen by an early layer; the whole model runs again on these alone.

    Source: GemFilter (arXiv 2409.17422).

    The prompt runs through the layers up to one of them, 13 of 32. There the last query's product with
    each key, without softmax, is summed over heads and averaged over `pool` neighbours, and the best
    `keep` tokens are chosen. The prefill restarts with these in their order, at positions 0, 1, ...;
    answers go on from there, and only this second pass stores keys and values.

    Our choices: other depths are scaled; the last token is always chosen, for it predicts the answer; of
    equal scores the earlier token wins; `keep` up to 1 is a share of the prompt. Statistics count both
    passes.
    """

    name: ClassVar[str] = "gemfilter"
    source: ClassVar[str] = "arXiv 2409.17422"

    layer: int | None = setting(
        None, "layer that chooses the tokens; by default 13 of 32, scaled", is_layer=True
    )
    keep: float = setting(1024.0, "tokens chosen; up to 1, as share of the prompt", low=0)
    pool: int = setting(5, "neighbours that a score is averaged over; odd", low=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self.pool)

    def filter_layer(self, depth: int) -> int:
        """The layer that chooses; raises ConfigError if the model has no such layer."""
        return layer_of(self.layer, PAPER_LAYER, depth)

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        self.check_depth(shape)
        self.filter_layer(shape.layers)
        tokens = sum(map(self._count, lengths))
        return Plan(shape=shape, lengths=tuple(lengths), cache_tokens=(tokens,) * shape.layers)

    def restarting_layer(self, shape: ModelShape) -> int:
        return self.filter_layer(shape.layers)

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return self.filter_layer(shape.layers) == shape.layers - 1

    def shared_layers(self, shape: ModelShape) -> int:
        return self.filter_layer(shape.layers)

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        kept, first = self._count(length), self.filter_layer(shape.layers)
        again = self.to_the_end(shape, whole_layers(shape.layers, kept))
        return (
            [again]
            if kept == length
            else [[*whole_layers(first, length), LayerWork(length, 0, pairs=0)], again]
        )

    def with_keep(self, shares: tuple[float, ...]) -> Self:
        check_limits("share", shares, Limits(low=0, high=1))  # more would count tokens
        return replace(self, keep=one_share(self.name, shares))

    def alike(self, lengths: Sequence[int]) -> bool:
        return len({self._count(length) == length for length in lengths}) == 1

    def begin(self, plan: Plan) -> GemState:
        all_kept = all(self._count(length) == length for length in plan.lengths)
        return GemState(plan=plan, chosen=all_kept)

    def select(self, layer: int, view: LayerView, state: GemState) -> Selection:
        if state.chosen:
            return KEEP_ALL
        if layer < self.filter_layer(state.plan.shape.layers):
            return Selection(cache=view.all_indices[:0], cache_lengths=(0,) * len(view.segments))
        state.chosen = True
        view.count_pairs(view.segments.lengths)
        products_T = last_query_products(view.queries, view.keys, view.segments)
        scores_T = torch.cat(
            [smoothed(products_T[None, a:b], self.pool)[0] for a, b in view.segments.ranges()]
        )
        scores_T[view.segments.last_indices()] = float("inf")
        counts = [self._count(length) for length in view.segments.lengths]
        return Selection(restart=top_mask(scores_T, view.segments, counts).nonzero().flatten())

    def _count(self, length: int) -> int:
        tokens = ceil(self.keep * length) if self.keep <= 1 else ceil(self.keep)
        return min(max(tokens, 1), length)
