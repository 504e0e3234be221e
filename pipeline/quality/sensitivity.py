"""How much each layer matters: what a right answer loses where cold tokens are spared at one layer alone.

A token is cold where it lies outside those that hold a given mass of the attention that the prompt's last
queries pay. The loss is the rise of the answer's negative log-likelihood, in nats a token.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch

from pipeline.bench.flops import LayerWork, Passes
from pipeline.bench.variant import Variant
from pipeline.errors import ConfigError
from pipeline.kernels.select import mass_mask
from pipeline.model.shape import ModelShape
from pipeline.pruning.base import (
    KEEP_ALL,
    LayerView,
    Plan,
    PruningMethod,
    Range,
    Selection,
    setting,
)
from pipeline.quality.evaluate import Case, Evaluated
from pipeline.quality.workbench import Workbench
from pipeline.records import Spans

ACTIONS = ("skip", "fp8", "drop", "park", "sparse")
SPARSE_MASSES = (0.9, 0.0, 0.95, 0.8, 0.6)  # with which `sparse` is worth probing, the most telling first


@dataclass(frozen=True, kw_only=True)
class Probe(PruningMethod):
    """Spares the cold tokens at one layer alone, to learn what that layer does with them.

    `skip` keeps them from its feed-forward network, `fp8` takes them through it in fp8, `drop` lets them go
    before it for good. `park` lets all but the window go after the layer, however warm: later layers read
    keys and values of the state in which they left. `sparse` leaves tokens as they are and makes the layer's
    attention block-sparse, with the mass for each block of queries.
    """

    name: ClassVar[str] = "probe"

    layer: int = setting(0, "the layer at which cold tokens are spared", is_layer=True)
    action: str = setting("skip", f"what is done to them: {', '.join(ACTIONS)}")
    mass: float = setting(0.9, "attention mass of the tokens that are not cold", low=0, high=1)
    window: int = setting(64, "last tokens: their queries score, and they are never cold", low=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action not in ACTIONS:
            raise ConfigError(f"action={self.action}: choose from {', '.join(ACTIONS)}")

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        if self.layer >= shape.layers:
            raise ConfigError(f"layer={self.layer}, and the model has layers 0 to {shape.layers - 1}")
        return super().plan(shape, lengths)

    def attention_masses(self, layers: int) -> tuple[float | None, ...]:
        sparse = self.action == "sparse" and self.mass < 1
        return tuple(self.mass if sparse and layer == self.layer else None for layer in range(layers))

    @property
    def ffn_in_fp8(self) -> bool:
        return self.action == "fp8"

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return False  # no action touches the last token, and nothing reads what becomes of the others there

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return ((length - self.window, length),)

    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        if layer != self.layer or self.action == "sparse" or (self.mass >= 1 and self.action != "park"):
            return KEEP_ALL
        if self.action == "park":
            last = self.protected_mask(view).nonzero().flatten()
            return Selection(live=last, ffn=view.all_indices, parks=True)
        warm_T = mass_mask(view.window_importance(self.window), view.segments, self.mass)
        warm_T = warm_T | self.protected_mask(view)
        if bool(warm_T.all()):
            return KEEP_ALL
        warm = warm_T.nonzero().flatten()
        if self.action == "skip":
            return Selection(ffn=warm)
        if self.action == "fp8":
            return Selection(ffn=warm, ffn_fp8=torch.nonzero(~warm_T).flatten())
        return Selection(live=warm)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one action at one layer costs and saves, means over cases."""

    layer: int
    action: str
    mass: float
    cases: int
    nll_rise: float  # nats a token
    nll_error: float  # its standard error; 0 of a single case
    divergence: float  # KL from dense, nats a token
    drop: float  # of the share of right tokens, in points
    saved: float  # share of a dense prefill's operations
    attended: float  # of the layer's query-key pairs
    passes: tuple[Passes, ...]  # of each case, for a cost model


def measure_sensitivity(
    bench: Workbench,
    cases: Sequence[Case],
    dense: Sequence[Evaluated],
    *,
    layers: Sequence[int],
    actions: Sequence[str],
    mass: float,
    within: Callable[[], bool] = lambda: True,
) -> list[Sensitivity]:
    """Probe each layer with each action, while `within` says that there is time.

    `dense` are the cases under dense, with likeliest tokens to diverge from. Layers are taken in an order
    whose every beginning covers the depth evenly, so that a lack of time leaves gaps and not an end; the
    result is sorted by layer.
    """
    found: list[Sensitivity] = []
    for layer in spread(layers):
        for action in actions:
            if not within():
                return sorted(found, key=lambda row: (row.layer, actions.index(row.action)))
            variant = Variant(f"{action} at {layer}", Probe(layer=layer, action=action, mass=mass))
            runs = [
                bench.run(variant, case, dense=base.forced) for case, base in zip(cases, dense, strict=True)
            ]
            found.append(_row(layer, action, mass, runs, dense))
    return sorted(found, key=lambda row: (row.layer, actions.index(row.action)))


def _row(
    layer: int, action: str, mass: float, runs: Sequence[Evaluated], dense: Sequence[Evaluated]
) -> Sensitivity:
    scores = [run.score for run in runs]
    pairs = [(score, base.score) for score, base in zip(scores, dense, strict=True)]
    rises = [(score.nll - base.nll) / score.tokens for score, base in pairs]
    return Sensitivity(
        layer=layer,
        action=action,
        mass=mass,
        cases=len(pairs),
        nll_rise=statistics.fmean(rises),
        nll_error=statistics.stdev(rises) / sqrt(len(rises)) if len(rises) > 1 else 0.0,
        divergence=statistics.fmean(score.divergence or 0.0 for score in scores),
        drop=100 * statistics.fmean((base.correct - score.correct) / score.tokens for score, base in pairs),
        saved=1 - statistics.fmean(score.flops_ratio for score in scores),
        attended=statistics.fmean(_attended(run.passes[0][layer]) for run in runs),
        passes=tuple(run.passes for run in runs),
    )


def _attended(work: LayerWork) -> float:
    if work.last_only or work.pairs is None:
        return 1.0
    return work.pairs / (work.tokens * (work.tokens + 1) / 2)


def spread(values: Sequence[int]) -> Iterator[int]:
    """All of them, the ends first, then the middle of every gap, the widest first."""
    ends = dict.fromkeys((0, len(values) - 1)) if values else {}
    yield from (values[place] for place in ends)
    gaps = [(0, len(values) - 1)]
    while gaps:
        gaps.sort(key=lambda gap: gap[0] - gap[1])
        low, high = gaps.pop(0)
        if high - low < 2:
            continue
        middle = (low + high) // 2
        yield values[middle]
        gaps += [(low, middle), (middle, high)]
