"""What a prefill's time to first token is made of, learned from the prefills that a device has run.

The host launches kernels while the device computes, so the time is that of the slower of the two: so much a
layer, however short the prompt is, or a sum of operations of each kind at a rate of its own. A sum of both
would be wrong about long prompts, and put what is missing on whatever only they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from pipeline.bench.flops import (
    LayerWork,
    Passes,
    attended_flops,
    dense_work,
    ffn_flops,
    fp8_tokens,
    passes_flops,
    projections_flops,
)
from pipeline.kernels.sparse import local_pairs
from pipeline.model.shape import ModelShape

FEATURES = (
    "matrix products",
    "matrix products in fp8",
    "attention",
    "block-sparse attention",
    "choosing its blocks",
    "attention of the last tokens alone",
    "scoring",
    "layers",
    "layers that select",
)
LAUNCHED = slice(FEATURES.index("layers"), None)  # of the features, what the host takes time for
COMPUTED = slice(0, LAUNCHED.start)
NEAR = 1.3  # times the least time a layer: runs that the host may well have held up
ROUNDS = 10  # of telling those runs from the others, more than it ever takes
OUTLIER = 5.0  # times the median error: runs that compiled a kernel, or were disturbed


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One document's prefill, and how long it took."""

    passes: Passes
    linears_in_fp8: bool
    ttft_ms: float


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Milliseconds as the larger of two sums over `FEATURES`: what is launched, and what is computed."""

    shape: ModelShape
    coefficients: np.ndarray  # (F,) milliseconds for each unit of a feature, none negative
    relative_error: float  # median over the runs that it was fitted on
    observations: int

    @classmethod
    def fit(cls, shape: ModelShape, observations: Sequence[Observation]) -> Self:
        """Least squares of relative errors, outliers left out; without observations it predicts 0."""
        if not observations:
            return cls(shape=shape, coefficients=np.zeros(len(FEATURES)), relative_error=0.0, observations=0)
        features_NF = np.stack([features(shape, o.passes, o.linears_in_fp8) for o in observations])
        measured_N = np.array([o.ttft_ms for o in observations])
        coefficients = _fit(features_NF, measured_N)
        errors_N = np.abs(_slower(features_NF, coefficients) / measured_N - 1)
        usual_N = errors_N <= max(OUTLIER * float(np.median(errors_N)), 1e-9)
        if not usual_N.all():
            coefficients = _fit(features_NF[usual_N], measured_N[usual_N])
            errors_N = np.abs(_slower(features_NF, coefficients) / measured_N - 1)
        return cls(
            shape=shape,
            coefficients=coefficients,
            relative_error=float(np.median(errors_N)),
            observations=len(observations),
        )

    def predict(self, passes: Passes, linears_in_fp8: bool = False) -> float:
        """Milliseconds to the first token of one document that is prefilled alone."""
        own_F = features(self.shape, passes, linears_in_fp8)
        return float(_slower(own_F, self.coefficients))


def dense_passes(shape: ModelShape, tokens: int) -> Passes:
    """What a dense prefill of so many tokens does."""
    return [dense_work(shape.layers, tokens)]


def features(shape: ModelShape, passes: Passes, linears_in_fp8: bool) -> np.ndarray:
    """(F,) operations of each kind, and counts of layers, of one document's prefill."""
    works = [work for layers in passes for work in layers]
    per_pair = 2 * shape.heads * shape.head_dim
    few = [work for work in works if work.last_only or (work.pairs is not None and work.parked)]
    parked = sum(attended_flops(shape, work) for work in few)
    many = [work for work in works if not work.last_only]
    whole = sum(attended_flops(shape, work) for work in many if work.pairs is None)
    sparse = [work for work in many if work.pairs is not None and not work.parked]
    chosen = [work for work in sparse if work.pairs != local_pairs(work.tokens)]
    sparse_flops = sum(attended_flops(shape, work) for work in sparse)
    scoring = per_pair * sum(work.scored_pairs for work in works)
    in_fp8 = sum(fp8_tokens(passes, everywhere=linears_in_fp8)) * ffn_flops(shape)
    if linears_in_fp8:
        in_fp8 += sum(projections_flops(shape, work) for work in works)
    estimates = per_pair * sum(work.estimated_pairs for work in works)  # as squared tokens, below
    matrices = passes_flops(shape, passes) - whole - sparse_flops - estimates - parked - scoring - in_fp8
    return np.array(
        [
            matrices,
            in_fp8,
            whole,
            sparse_flops,
            per_pair * sum(work.tokens**2 for work in chosen),
            parked,
            scoring,
            len(works),
            sum(map(_selects, works)),
        ],
        dtype=np.float64,
    )


def _selects(work: LayerWork) -> bool:
    return work.scored_pairs > 0 or (work.ffn_tokens < work.tokens and not work.last_only)


def _slower(features_NF: np.ndarray, coefficients_F: np.ndarray) -> np.ndarray:
    """(N,) milliseconds, of launching or of computing."""
    launching, computing = (features_NF[..., part] @ coefficients_F[part] for part in (LAUNCHED, COMPUTED))
    return np.maximum(launching, computing)


def _fit(features_NF: np.ndarray, measured_N: np.ndarray) -> np.ndarray:
    """(F,) by turns: which runs the host held up, and what the two kinds of runs are made of."""
    of_a_layer_N = measured_N / features_NF[:, FEATURES.index("layers")]
    held_N = of_a_layer_N <= NEAR * np.quantile(of_a_layer_N, 0.02)
    coefficients_F = np.zeros(len(FEATURES))
    for _ in range(ROUNDS):
        for runs_N, part in ((held_N, LAUNCHED), (~held_N, COMPUTED)):
            coefficients_F[part] = _non_negative(features_NF[runs_N, part], measured_N[runs_N])
        before_N = held_N
        held_N = features_NF[:, LAUNCHED] @ coefficients_F[LAUNCHED] > (
            features_NF[:, COMPUTED] @ coefficients_F[COMPUTED]
        )
        if (held_N == before_N).all():
            break
    return coefficients_F


def _non_negative(features_NF: np.ndarray, measured_N: np.ndarray) -> np.ndarray:
    """(F,) by least squares of relative errors; columns that come out negative are dropped, one at a time."""
    relative_NF = features_NF / measured_N[:, None]
    scale_F = np.abs(relative_NF).max(0, initial=0.0)
    used = [int(column) for column in scale_F.nonzero()[0]]
    coefficients_F = np.zeros(features_NF.shape[1])
    while used:
        solved = np.linalg.lstsq(relative_NF[:, used] / scale_F[used], np.ones(len(measured_N)), rcond=1e-9)[
            0
        ]
        if solved.min() >= 0:
            coefficients_F[used] = solved / scale_F[used]
            break
        del used[int(solved.argmin())]
    return coefficients_F
