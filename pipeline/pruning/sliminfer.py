"""SlimInfer: blocks of tokens that the last queries find unimportant leave the middle layers for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import ClassVar, Self

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.scoring import block_scores, unit_keys
from pipeline.kernels.select import tokens_of_blocks, top_blocks
from pipeline.pruning.base import KEEP_ALL, Plan, PruningMethod, Selection, layer_of
from pipeline.pruning.capabilities import Rescoring
from pipeline.pruning.limits import Limits, check_limits, setting, several
from pipeline.pruning.operations import LayerWork, Passes
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView, Range
from pipeline.records import Spans

PAPER_LAYERS = (10, 20, 30)


@dataclass(kw_only=True)
class SlimState:
    """One pack's prefill: where it prunes, and the unit keys that decoding scores again."""

    layers: tuple[int, ...]
    lengths: tuple[int, ...]  # prompt tokens of each document
    units: dict[int, list[Tensor]] = field(default_factory=dict)  # of each pruning layer and document


@dataclass(frozen=True, kw_only=True)
class SlimInfer(PruningMethod):
    """Blocks of tokens dropped from the middle layers on, with their K/V.

    Source: SlimInfer (AAAI 2026, arXiv 2508.06447).

    The prompt is cut into blocks of `block` tokens and these into units of `unit`; a unit's key is the
    mean of its keys. At each pruning layer, after attention and before the feed-forward network, the mean
    of the last `window` queries scores each block by its best unit: the mean over heads of |q.k|, without
    softmax. The best blocks stay, as many as the layer's `budget` holds; the others leave this layer's
    feed-forward network, its cache and all later layers. The first block always stays, the attention sink.

    The paper prunes layers 10, 20 and 30 of 32, to 8,192, 4,096 and 2,048 tokens for Llama-3.1-8B
    (12,288, 6,144 and 4,096 for Qwen2.5-7B); other depths are scaled. Our choices, on which the paper is
    silent: keys and queries are scored with RoPE; the prompt's last block, perhaps a short one, always
    stays, for its last token predicts the answer; both count towards the budget, which is rounded up to
    whole blocks; of equal scores the earlier block wins.

    Under a cap on the device's K/V (`--kv-memory`) the blocks that entered a pruning layer are scored again
    there by every generated token's query. The best of them have their K/V on the device, in the layers
    since the pruning layer before, from the next token on; a set that still holds at least the share
    `gamma` of the best ones is used on.
    """

    name: ClassVar[str] = "sliminfer"
    source: ClassVar[str] = "AAAI 2026, arXiv 2508.06447"

    layers: int | tuple[int, ...] | None = setting(
        None,
        "pruning layers, from 0; by default 10, 20, 30 of 32, scaled to the model's depth",
        is_layer=True,
    )
    budget: float | tuple[float, ...] = setting(
        (8192.0, 4096.0, 2048.0), "tokens kept at each pruning layer; up to 1, as share of the prompt", low=0
    )
    block: int = setting(64, "tokens of a block, kept or dropped together", low=1, whole=True)
    unit: int = setting(8, "tokens of a unit, scored by their mean key", low=1, whole=True)
    window: int = setting(4, "last queries, whose mean scores the blocks", low=1, whole=True)
    gamma: float = setting(
        0.9, "share of the best blocks below which those on the device are swapped", low=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.unit:
            raise ConfigError(f"block={self.block} must be a multiple of unit={self.unit}")
        if self.layers == ():
            raise ConfigError("layers names no layer")
        if self.layers is not None and list(several(self.layers)) != sorted(set(several(self.layers))):
            raise ConfigError("layers must ascend, each once")

    def pruning_layers(self, depth: int) -> tuple[int, ...]:
        """Where blocks are dropped in a model of `depth` layers; raises ConfigError if they do not fit it."""
        if self.layers is None:
            layers = tuple(dict.fromkeys(layer_of(None, layer, depth) for layer in PAPER_LAYERS))
        else:
            layers = several(self.layers)
        budgets = several(self.budget)
        if len(budgets) not in (1, len(layers)) and not (self.layers is None and len(budgets) > len(layers)):
            raise ConfigError(f"budget has {len(budgets)} values for {len(layers)} pruning layers")
        return layers

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        self.check_depth(shape)
        layers = self.pruning_layers(shape.layers)
        alive = list(lengths)
        tokens = []
        for layer in range(shape.layers):
            if layer in layers:
                stage = layers.index(layer)
                pairs = zip(alive, lengths, strict=True)
                alive = [self._tokens_kept(stage, tokens, length) for tokens, length in pairs]
            tokens.append(sum(alive))
        rescoring = Rescoring(layers=layers, block=self.block, gamma=self.gamma)
        return Plan(shape=shape, lengths=tuple(lengths), cache_tokens=tuple(tokens), rescoring=rescoring)

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return shape.layers - 1 in self.pruning_layers(shape.layers)

    def shared_layers(self, shape: ModelShape) -> int:
        return self.pruning_layers(shape.layers)[0]

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        stored = self.plan(shape, (length,)).cache_tokens
        layers = [LayerWork(*counts) for counts in zip((length, *stored[:-1]), stored, strict=True)]
        return [self.to_the_end(shape, layers)]

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return ((0, self.block), ((length - 1) // self.block * self.block, length))

    def begin(self, plan: Plan) -> SlimState:
        return SlimState(layers=self.pruning_layers(plan.shape.layers), lengths=plan.lengths)

    def with_keep(self, shares: tuple[float, ...]) -> Self:
        check_limits("share", shares, Limits(low=0, high=1))  # more would count tokens
        return replace(self, budget=shares)

    def select(self, layer: int, view: LayerView, state: SlimState) -> Selection:
        if layer not in state.layers:
            return KEEP_ALL
        stage = state.layers.index(layer)
        live, scores, lengths = [], [], []
        state.units[layer] = []
        for b, (start, end) in enumerate(view.segments.ranges()):
            # whole blocks are dropped, so what is left is still cut into blocks by counting
            units_UKd = unit_keys(view.keys[start:end], self.unit)
            query_Hd = view.queries[max(start, end - self.window) : end].mean(0, dtype=torch.float32)
            scores_N = block_scores(query_Hd, units_UKd, self.block // self.unit)
            kept_N = top_blocks(scores_N, self._blocks_kept(stage, end - start, state.lengths[b]))
            live.append(tokens_of_blocks(kept_N, self.block, end - start) + start)
            scores.append(scores_N)
            lengths.append(len(live[-1]))
            state.units[layer].append(units_UKd)
        view.count_pairs(len(units) for units in state.units[layer])
        live_C = torch.cat(live)
        if len(live_C) == view.segments.total:
            return Selection(blocks=torch.cat(scores))
        return Selection(
            live=live_C,
            cache=live_C,
            live_lengths=tuple(lengths),
            cache_lengths=tuple(lengths),
            blocks=torch.cat(scores),
        )

    def select_decode(self, layer: int, query_Hd: Tensor, state: SlimState) -> Tensor | None:
        if layer not in state.units:
            return None
        (units_UKd,) = state.units[layer]
        return block_scores(query_Hd, units_UKd, self.block // self.unit)

    def _blocks_kept(self, stage: int, alive: int, length: int) -> int:
        """Blocks that stay of `alive` tokens of a prompt of `length`; at least the protected two."""
        budgets = several(self.budget)
        budget = budgets[stage] if len(budgets) > 1 else budgets[0]
        tokens = budget * length if budget <= 1 else budget
        return min(max(2, ceil(tokens / self.block)), ceil(alive / self.block))

    def _tokens_kept(self, stage: int, alive: int, length: int) -> int:
        """The same in tokens: all blocks but the last are whole."""
        return self._blocks_kept(stage, alive, length) * self.block - (-alive % self.block)
