"""MarsInfer: tokens that late queries find unimportant skip the feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.select import mass_mask
from pipeline.pruning.base import LayerView, Range, ScoredMethod, at_layer, check_range, setting
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
    The papers use eta 0.95 for Qwen2-7B, 0.90 for Llama-3-8B and 0.93 for Qwen2-72B.
    """

    name: ClassVar[str] = "marsinfer"
    source: ClassVar[str] = "OpenReview fL8Zp8o6RL; doi 10.1007/s11704-026-60400-8"

    eta: float | tuple[float, ...] = setting(
        0.95, "attention mass that the kept tokens reach", per_layer=True
    )
    share: float | tuple[float, ...] | None = setting(
        None, "fixed share of kept tokens, in place of eta", per_layer=True
    )
    window: int = setting(50, "last tokens: their queries score, and they are kept")
    prefix: int = setting(100, "first tokens, always kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("eta", self.eta, low=0)
        check_range("window", self.window, low=1)
        check_range("prefix", self.prefix, low=0)
        if not isinstance(self.window, int) or not isinstance(self.prefix, int):
            raise ConfigError("window and prefix are counts of tokens: give whole numbers")

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return ((0, self.prefix), (length - self.window, length))

    def score(self, layer: int, view: LayerView) -> Tensor:
        return view.window_importance(self.window)

    def kept(self, layer: int, view: LayerView) -> Tensor:
        if self.share is not None:
            return super().kept(layer, view)
        eta = at_layer(self.eta, layer)
        if eta >= 1:
            return view.all_indices
        important_T = mass_mask(self.score(layer, view), view.segments, eta)
        return (important_T | self.protected_mask(view)).nonzero().flatten()
