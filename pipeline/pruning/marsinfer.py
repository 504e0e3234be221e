"""MarsInfer: tokens that late queries find unimportant skip the feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.select import mass_mask
from pipeline.pruning.base import ASSUMED_SHARE, KEEP_ALL, Plan, ScoredMethod, Selection
from pipeline.pruning.limits import at_layer, setting
from pipeline.pruning.operations import LayerWork, Passes, whole_layers, within_windows
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView, Range
from pipeline.records import Spans


@dataclass(frozen=True, kw_only=True)
class MarsInfer(ScoredMethod):
    """FFN skipped by tokens that the last queries hardly attend to.

    Source: FTP (OpenReview fL8Zp8o6RL), published as MarsInfer (doi 10.1007/s11704-026-60400-8).

    From `start_layer` on, attention runs in full. Then the softmax attention of the last `window` queries
    is averaged over heads and queries to one importance a token. The first `prefix` and the last `window`
    tokens are always kept; of all tokens sorted by importance, the smallest set whose cumulative mass
    reaches `eta` is kept with them. The mass is that of all tokens, the protected ones included: the
    papers do not say, and this is the literal reading of their rule. The feed-forward network and its norm
    run on kept tokens only, the residual carries the others on. All keys and values are stored.

    `share` replaces `eta` by a fixed share of tokens; `eta` and `share` take one value or one a layer.

    Our own, beyond the papers: with `low=fp8` the kept tokens pass the FFN in fp8 (weights by output
    channel, activations by token), which costs half and loses little. Of them those that reach `eta_high`,
    a smaller mass, pass it in the model's own precision, with the protected tokens; by default none do.
    So a token's FFN runs in full, in fp8 or not at all, by its importance.

    Layers with a sliding window judge nobody, since their queries see the nearest tokens alone. There, which
    is our choice too, the importance is that of the last layer before them without a window, and all tokens
    are kept until there is one. A model all of whose layers have windows is refused.

    The papers use eta 0.95 for Qwen2-7B, 0.90 for Llama-3-8B and 0.93 for Qwen2-72B.
    """

    name: ClassVar[str] = "marsinfer"
    source: ClassVar[str] = "OpenReview fL8Zp8o6RL; doi 10.1007/s11704-026-60400-8"

    eta: float | tuple[float, ...] = setting(
        0.95, "attention mass that the kept tokens reach", low=0, high=1, per_layer=True
    )
    share: float | tuple[float, ...] | None = setting(
        None, "fixed share of kept tokens, in place of eta", low=0, high=1, per_layer=True
    )
    window: int = setting(50, "last tokens: their queries score, and they are kept", low=1, whole=True)
    prefix: int = setting(100, "first tokens, always kept", low=0, whole=True)
    low: str | None = setting(None, "fp8: kept tokens pass the FFN in fp8, but for the most important ones")
    eta_high: float = setting(
        0.0, "with low: attention mass of the tokens in the model's own precision", low=0, high=1
    )
    share_high: float = setting(
        0.0, "with low: fixed share of these tokens, in place of eta_high", low=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low not in (None, "fp8"):
            raise ConfigError(f"low={self.low}: choose fp8 or none")
        if self.low is None and (self.eta_high or self.share_high):
            raise ConfigError("eta_high and share_high need low=fp8")

    @classmethod
    def suits(cls, shape: ModelShape) -> bool:
        return not shape.slides or None in shape.windows

    def begin(self, plan: Plan) -> _Judged:
        return _Judged(plan.shape)

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return ((0, self.prefix), (length - self.window, length))

    @property
    def ffn_in_fp8(self) -> bool:
        return self.low is not None

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return self.ffn_in_fp8 and self.start_layer < shape.layers  # it says in which precision

    def shared_layers(self, shape: ModelShape) -> int:
        return min(self.start_layer, shape.layers)

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        first = self.shared_layers(shape)
        kept = [round(self._expected_share(layer) * length) for layer in range(first, shape.layers)]
        layers = whole_layers(first, length) + [LayerWork(length, tokens) for tokens in kept]
        return [self.to_the_end(shape, within_windows(shape, layers, length))]

    def score(self, layer: int, view: LayerView) -> Tensor:
        return view.window_importance(self.window)

    def select(self, layer: int, view: LayerView, state: _Judged) -> Selection:
        if layer < self.start_layer:
            return KEEP_ALL
        eta, share = at_layer(self.eta, layer), at_layer(self.share, layer)
        if self.low is None and _keeps_all(eta, share):
            return KEEP_ALL
        chooses = self._has_high or not _keeps_all(eta, share)
        if chooses and state.shape.window(layer) is None:
            state.scores_T = self.score(layer, view)
        scores_T = state.scores_T
        kept_T = self._mask(scores_T, view, eta, share)
        if self.low is None:
            return Selection(ffn=kept_T.nonzero().flatten())
        if not self._has_high:
            return Selection(ffn=view.all_indices[:0], ffn_fp8=kept_T.nonzero().flatten())
        high_T = self._mask(scores_T, view, self.eta_high, self.share_high or None)
        return Selection(ffn=high_T.nonzero().flatten(), ffn_fp8=(kept_T & ~high_T).nonzero().flatten())

    def _expected_share(self, layer: int) -> float:
        eta, share = at_layer(self.eta, layer), at_layer(self.share, layer)
        if share is None:
            return 1.0 if _keeps_all(eta, share) else ASSUMED_SHARE
        return share

    @property
    def _has_high(self) -> bool:
        return self.low is not None and (self.eta_high > 0 or self.share_high > 0)

    def _mask(self, scores_T: Tensor | None, view: LayerView, eta: float, share: float | None) -> Tensor:
        """(T,) bool: the best tokens by a mass or a fixed share, and the protected ones."""
        if scores_T is None or _keeps_all(eta, share):
            return torch.ones_like(view.positions, dtype=torch.bool)
        if share is None:
            return mass_mask(scores_T, view.segments, eta) | self.protected_mask(view)
        return self.share_mask(scores_T, view, share)


@dataclass
class _Judged:
    """What the last layer without a window has found of a pack's tokens."""

    shape: ModelShape
    scores_T: Tensor | None = None


def _keeps_all(eta: float, share: float | None) -> bool:
    return eta >= 1 if share is None else share >= 1
