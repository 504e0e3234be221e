"""How much each layer's attention matters: what answers lose where it alone is block-sparse."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.calibration.bounds import Bounds
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.workbench import Evaluated, Workbench
from pipeline.model.variant import Variant
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import LayerWork

MASSES = (0.8, 0.0, 0.9, 0.6, 0.4)  # worth probing, the most telling first


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one mass at one layer costs and saves, means over cases."""

    layer: int
    mass: float
    cases: int
    divergence: float  # KL from dense, nats a token
    drop: float  # in the unit of the main bound
    attended: float  # of the layer's query-key pairs


def measure_sensitivity(
    bench: Workbench,
    cases: Sequence[tuple[CheckRow, Evaluated]],
    bounds: Bounds,
    mass: float,
    within: Callable[[], bool] = lambda: True,
) -> list[Sensitivity]:
    """Make each layer block-sparse with a mass, while `within` says that there is time.

    Each of the cases stands beside its run under dense, with likeliest tokens to diverge from. Layers are
    taken in an order whose every beginning covers the depth evenly, so that a lack of time leaves gaps and
    not an end; the result is sorted by layer.
    """
    layers = bench.model.shape.layers
    found: list[Sensitivity] = []
    for layer in spread(range(layers)):
        if not within():
            break
        masses = tuple(mass if each == layer else 1.0 for each in range(layers))
        variant = Variant(f"{mass:g} at {layer}", Dense(sparse_attention=masses))
        runs = [bench.run(variant, case, dense=base.forced) for case, base in cases]
        scores = [run.score for run in runs]
        found.append(
            Sensitivity(
                layer=layer,
                mass=mass,
                cases=len(scores),
                divergence=statistics.fmean(score.divergence or 0.0 for score in scores),
                drop=bounds.main_drop([base.score for _, base in cases], scores),
                attended=statistics.fmean(_attended(run.passes[0][layer]) for run in runs),
            )
        )
    return sorted(found, key=lambda row: row.layer)


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
