"""What a prefill's time to first token is made of, learned from the prefills that a device has run.

The time is a sum of operations of each kind at a rate of its own, and of what a layer costs however short the
prompt is.
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
    "attention in fp8",
    "block-sparse attention",
    "choosing its blocks",
    "attention over parked tokens",
    "scoring",
    "layers",
    "layers that select",
)
OUTLIER = 5.0  # times the median error: runs that compiled a kernel, or were disturbed


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One document's prefill, and how long it took."""

    passes: Passes
    linears_in_fp8: bool
    attention_in_fp8: bool
    ttft_ms: float


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Milliseconds as a sum over `FEATURES`."""

    shape: ModelShape
    coefficients: np.ndarray  # (F,) milliseconds for each unit of a feature, none negative
    relative_error: float  # median over the runs that it was fitted on
    observations: int

    @classmethod
    def fit(cls, shape: ModelShape, observations: Sequence[Observation]) -> Self:
        """Least squares of relative errors, outliers left out; without observations it predicts 0."""
        if not observations:
            return cls(shape=shape, coefficients=np.zeros(len(FEATURES)), relative_error=0.0, observations=0)
        features_NF = np.stack(
            [features(shape, o.passes, o.linears_in_fp8, o.attention_in_fp8) for o in observations]
        )
        measured_N = np.array([o.ttft_ms for o in observations])
        coefficients = _non_negative(features_NF, measured_N)
        errors_N = np.abs(features_NF @ coefficients / measured_N - 1)
        usual_N = errors_N <= max(OUTLIER * float(np.median(errors_N)), 1e-9)
        if not usual_N.all():
            coefficients = _non_negative(features_NF[usual_N], measured_N[usual_N])
            errors_N = np.abs(features_NF @ coefficients / measured_N - 1)
        return cls(
            shape=shape,
            coefficients=coefficients,
            relative_error=float(np.median(errors_N)),
            observations=len(observations),
        )

    def predict(self, passes: Passes, linears_in_fp8: bool = False, attention_in_fp8: bool = False) -> float:
        """Milliseconds to the first token of one document that is prefilled alone."""
        return float(features(self.shape, passes, linears_in_fp8, attention_in_fp8) @ self.coefficients)


def dense_passes(shape: ModelShape, tokens: int) -> Passes:
    """What a dense prefill of so many tokens does."""
    return [[LayerWork(tokens, tokens)] * shape.layers]


def features(shape: ModelShape, passes: Passes, linears_in_fp8: bool, attention_in_fp8: bool) -> np.ndarray:
    """(F,) operations of each kind, and counts of layers, of one document's prefill."""
    works = [work for layers in passes for work in layers]
    per_pair = 2 * shape.heads * shape.head_dim
    whole = sum(attended_flops(shape, work) for work in works if work.pairs is None)
    sparse = [work for work in works if work.pairs is not None and not work.parked]
    parked = sum(attended_flops(shape, work) for work in works if work.pairs is not None and work.parked)
    chosen = [work for work in sparse if work.pairs != local_pairs(work.tokens)]
    sparse_flops = sum(attended_flops(shape, work) for work in sparse)
    scoring = per_pair * sum(work.scored_pairs for work in works)
    in_fp8 = sum(fp8_tokens(passes, everywhere=linears_in_fp8)) * ffn_flops(shape)
    if linears_in_fp8:
        in_fp8 += sum(projections_flops(shape, work) for work in works)
    matrices = passes_flops(shape, passes) - whole - sparse_flops - parked - scoring - in_fp8
    return np.array(
        [
            matrices,
            in_fp8,
            0 if attention_in_fp8 else whole,
            whole if attention_in_fp8 else 0,
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
    return work.scored_pairs > 0 or work.ffn_tokens < work.tokens


def _non_negative(features_NF: np.ndarray, measured_N: np.ndarray) -> np.ndarray:
    """(F,) by least squares of relative errors; columns that come out negative are dropped, one at a time."""
    relative_NF = features_NF / measured_N[:, None]
    scale_F = np.abs(relative_NF).max(0)
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
