"""FrugalPrompt: the text of a document is thinned by salience, and the model reads what is left of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Self

import torch
from torch import Tensor

from pipeline.kernels.scoring import received_attention
from pipeline.kernels.select import top_share_mask
from pipeline.pruning.base import KEEP_ALL, Plan, PruningMethod, Selection, layer_of, one_share
from pipeline.pruning.limits import setting
from pipeline.pruning.operations import LayerWork, Passes, whole_layers
from pipeline.pruning.prompt_ends import PromptEnds
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView, Range
from pipeline.records import Spans

LAST_OF_FIRST = 3  # layer of 32


@dataclass(kw_only=True)
class Salience:
    """One pack's prefill: its plan, the salience summed so far, and whether the tokens have been chosen."""

    plan: Plan
    sums_T: Tensor | None = None
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Frugal(PruningMethod):
    """The document thinned to its salient tokens, before the model answers from what is left of the text.

    Source: FrugalPrompt (arXiv 2510.16439).

    The share `keep` of the document's tokens, those with the largest salience, stay in their order. What is
    left of the prompt is computed as if it had been written so, at positions 0, 1, ..., and only that has
    keys and values. The paper keeps 80, 60 or 50%.

    The salience is not the paper's. That comes from a small encoder, a second model, by attribution. Here
    it is the model's own attention, in its first layers up to `layer`, after which the prefill restarts. All
    else about it is our choice, too: up to `judges` tokens of the prompt, evenly spaced and the last among
    them, judge the tokens before them, but for the nearest ones, as many as from one judge to the next: every
    token attends to its neighbours. A judgement is the softmax attention that a token gets, times the number
    of tokens that share it: 1 is an even share, at any place. A token's salience is the mean over its judges,
    heads and layers; tokens without judges rank first. The question's tokens judge as all others do.

    Instruction and question always stay, as in `speculative`: up to `most` tokens each of what is before the
    document, of the question, and of what is behind the document, and at least the first `sink` and the last
    `window` tokens. `keep` is the share of all others. Counts are rounded up; of equal tokens the earlier
    stays.
    """

    name: ClassVar[str] = "frugal"
    source: ClassVar[str] = "arXiv 2510.16439"

    keep: float = setting(0.8, "share of the document's tokens that stay", low=0, high=1)
    layer: int | None = setting(
        None, "last of the first layers whose attention judges; by default 3 of 32, scaled", is_layer=True
    )
    judges: int = setting(1024, "most tokens of a prompt whose attention judges", low=1, whole=True)
    sink: int = setting(32, "first tokens, always kept", low=0, whole=True)
    window: int = setting(32, "fewest last tokens that are kept", low=1, whole=True)
    most: int = setting(256, "most of them, and of the instruction and the question", low=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.ends  # which checks its numbers

    @property
    def ends(self) -> PromptEnds:
        """What is kept around a document."""
        return PromptEnds(sink=self.sink, window=self.window, most=self.most)

    def last_judging(self, depth: int) -> int:
        """The layer after which the prefill restarts; raises ConfigError if the model has no such layer."""
        return layer_of(self.layer, LAST_OF_FIRST, depth)

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        self.check_depth(shape)
        tokens = sum(min(n, ceil(self.keep * n) + self.ends.bound) for n in lengths)
        return Plan(shape=shape, lengths=tuple(lengths), cache_tokens=(tokens,) * shape.layers)

    def restarting_layer(self, shape: ModelShape) -> int:
        return self.last_judging(shape.layers)

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return self.keep < 1 and self.last_judging(shape.layers) == shape.layers - 1

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        around = min(length, self.sink + self.window)
        kept = around + ceil(self.keep * (length - around))
        again = self.to_the_end(shape, whole_layers(shape.layers, kept))
        if self.keep >= 1:
            return [again]
        return [
            [*whole_layers(self.last_judging(shape.layers), length), LayerWork(length, 0, pairs=0)],
            again,
        ]

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return self.ends.ranges(length, spans)

    def with_keep(self, shares: tuple[float, ...]) -> Self:
        return replace(self, keep=one_share(self.name, shares))

    def begin(self, plan: Plan) -> Salience:
        return Salience(plan=plan, chosen=self.keep >= 1)

    def select(self, layer: int, view: LayerView, state: Salience) -> Selection:
        if state.chosen:
            return KEEP_ALL
        view.count_pairs(min(self.judges, length) * length for length in view.segments.lengths)
        own_T = received_attention(view.queries, view.keys, view.segments, self.judges)
        state.sums_T = own_T if state.sums_T is None else state.sums_T + own_T
        if layer < self.last_judging(state.plan.shape.layers):
            return Selection(cache=view.all_indices[:0], cache_lengths=(0,) * len(view.segments))
        state.chosen = True
        protected_T = self.protected_mask(view)
        open_B = torch.zeros_like(view.segments.lengths_B)
        open_B.index_add_(0, view.segments.document_T, (~protected_T).to(open_B.dtype))
        unprotected_T = state.sums_T.masked_fill(protected_T, -torch.inf)
        best_T = top_share_mask(unprotected_T, view.segments, self.keep, open_B)
        return Selection(restart=(best_T | protected_T).nonzero().flatten())
