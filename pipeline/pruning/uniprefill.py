"""UniPrefill: blocks outside the attention mass of the last queries are dropped, every few layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Self

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.scoring import block_means
from pipeline.kernels.segments import Segments
from pipeline.kernels.select import mass_mask, top_mask
from pipeline.pruning.base import ASSUMED_SHARE, KEEP_ALL, Plan, PruningMethod, Selection
from pipeline.pruning.limits import setting
from pipeline.pruning.operations import LayerWork, Passes
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView, Range
from pipeline.records import Spans

HEADS = ("mean", "max")


@dataclass(frozen=True, kw_only=True)
class UniPrefill(PruningMethod):
    """Blocks of tokens dropped every few layers, those outside the last queries' attention mass.

    Source: UniPrefill (arXiv 2605.06221).

    At layers `first_layer`, `first_layer` + `every`, ..., after attention and before the feed-forward
    network: the softmax attention of the last `window` queries, mean over heads and queries, and then the
    mean over each block of `block` tokens. The smallest set of blocks whose share of the sum of these
    means reaches `p` stays, with the first `sink` and the last `window` tokens. The others leave this
    layer's feed-forward network and all later layers.

    Our choices, on which our source is silent: blocks are counted over the tokens that reach the layer;
    the sum includes the protected tokens; keys and values of the dropping layer itself are stored of all
    tokens that entered it, as attention there saw them. `share` replaces `p` by a fixed share of the prompt
    to keep, one value or one for each dropping layer, rounded up to whole blocks, with the protected tokens
    on top; `heads=max` takes the largest of the heads instead of their mean.
    """

    name: ClassVar[str] = "uniprefill"
    source: ClassVar[str] = "arXiv 2605.06221"

    first_layer: int = setting(7, "first layer that drops, from 0", is_layer=True)
    every: int = setting(4, "layers from one drop to the next", low=1, whole=True)
    p: float = setting(0.99, "attention mass that the kept blocks reach", low=0, high=1)
    share: float | tuple[float, ...] | None = setting(
        None, "fixed share of the prompt to keep, in place of p", low=0, high=1
    )
    block: int = setting(64, "tokens of a block, kept or dropped together", low=1, whole=True)
    sink: int = setting(128, "first tokens, always kept", low=0, whole=True)
    window: int = setting(128, "last tokens: their queries score, and they are kept", low=1, whole=True)
    heads: str = setting("mean", "a token's attention over the heads: mean, or the max of them")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads not in HEADS:
            raise ConfigError(f"heads={self.heads}: choose {' or '.join(HEADS)}")

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return ((0, self.sink), (length - self.window, length))

    def with_keep(self, shares: tuple[float, ...]) -> Self:
        return replace(self, share=shares)

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return self._drops_at(shape.layers - 1) and (self.share is not None or self.p < 1)

    def shared_layers(self, shape: ModelShape) -> int:
        return min(self.first_layer, shape.layers)

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        layers, alive = [], length
        for layer in range(shape.layers):
            entered = alive
            if self._drops_at(layer):
                share = self._share((layer - self.first_layer) // self.every)
                assumed = 1.0 if self.p >= 1 else ASSUMED_SHARE
                alive = min(alive, round(length * (assumed if share is None else share)))
            layers.append(LayerWork(entered, alive))
        return [self.to_the_end(shape, layers)]

    def begin(self, plan: Plan) -> tuple[int, ...]:
        return plan.lengths

    def select(self, layer: int, view: LayerView, state: tuple[int, ...]) -> Selection:
        if not self._drops_at(layer):
            return KEEP_ALL
        share = self._share((layer - self.first_layer) // self.every)
        if share is None and self.p >= 1:
            return KEEP_ALL
        means_N, blocks = self._block_means(view)
        if share is None:
            kept_N = mass_mask(means_N, blocks, self.p)
        else:
            kept_N = top_mask(means_N, blocks, [ceil(share * n / self.block) for n in state])
        kept_T = kept_N[self._block_of_token(view.segments, blocks)] | self.protected_mask(view)
        return Selection(live=kept_T.nonzero().flatten())

    def _drops_at(self, layer: int) -> bool:
        return layer >= self.first_layer and (layer - self.first_layer) % self.every == 0

    def _share(self, drop: int) -> float | None:
        """The fixed share at a drop, counted from 0; the last of several holds from there on."""
        return self.share[min(drop, len(self.share) - 1)] if isinstance(self.share, tuple) else self.share

    def _block_means(self, view: LayerView) -> tuple[Tensor, Segments]:
        """(N,) mean importance of the pack's blocks, and whose they are."""
        importance_T = view.window_importance(self.window, heads=self.heads)
        means = [block_means(importance_T[a:b], self.block) for a, b in view.segments.ranges()]
        return torch.cat(means), Segments.of([len(m) for m in means], importance_T.device)

    def _block_of_token(self, segments: Segments, blocks: Segments) -> Tensor:
        """(T,) the block that each token is in, counted over the pack."""
        first_block_B = blocks.bounds[:-1]
        return first_block_B[segments.document_T] + segments.index_in_document_T // self.block
