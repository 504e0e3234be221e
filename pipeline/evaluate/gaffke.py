"""Bounds of a mean of which only a sample is known, and the least or largest that a value can be.

Gaffke's bound (N. Gaffke, Mathematical Methods of Statistics 14, 2005; E. Learned-Miller and P. Thomas,
arXiv:1905.06208). With n values, the largest possible one beside them, and a flat Dirichlet D, the upper end
of the mean is the quantile of the sum of D_i x_i. It supposes nothing of how values are spread: for losses of
0 or 1 it is that of Clopper and Pearson, without any loss the rule of three. The quantile is exact here, not
drawn, so the same values give the same verdict.
"""

from __future__ import annotations

import numpy as np

_HALVINGS = 60  # of an interval that holds what is sought, down to the last bits
_STEP, _STEPS = 0.05, 640  # of the path of integration, which grows exponentially


def beyond(
    excess_XN: np.ndarray, most_X: np.ndarray | float, counts_N: np.ndarray | None = None
) -> np.ndarray:
    """(X,) p values of means that are above a bound: small ones say that they are not.

    `excess_XN` are N values, at least one, of each of X samples, less the bound, and `most_X` is the largest
    possible value, less the bound. `counts_N` says how often each value was seen; once unless given.

    That is the probability that the sum of E_i excess_i is above 0, the E_i being exponentially distributed,
    the last one's factor `most_X`. It is integrated along the line through the saddle point of its
    Laplace transform, where nothing oscillates.
    """
    most_X = np.broadcast_to(np.asarray(most_X, np.float64), excess_XN.shape[:-1])
    factors_XN = np.concatenate([excess_XN, most_X[..., None]], axis=-1)
    counts_N = np.ones(factors_XN.shape[-1]) if counts_N is None else np.append(counts_N, 1.0)
    largest_X = factors_XN.max(-1)
    possible_X = largest_X > 0
    scaled_XN = factors_XN / np.where(possible_X, largest_X, 1.0)[..., None]
    saddle_X = _saddle(scaled_XN, counts_N)
    tilted_XN = scaled_XN / (1 - saddle_X[..., None] * scaled_XN)
    width_X = 1 / np.sqrt((counts_N * tilted_XN**2).sum(-1) + saddle_X**-2.0)
    at_saddle_X = -(counts_N * np.log1p(-saddle_X[..., None] * scaled_XN)).sum(-1)
    total_X = np.zeros_like(saddle_X)
    for step in range(_STEPS):
        height_X = width_X * np.sinh(step * _STEP)
        turned_XN = tilted_XN * height_X[..., None]
        size_X = at_saddle_X - 0.5 * (counts_N * np.log1p(turned_XN**2)).sum(-1)
        angle_X = (counts_N * np.arctan(turned_XN)).sum(-1) - np.arctan2(height_X, saddle_X)
        length_X = width_X * np.cosh(step * _STEP) * (0.5 if step == 0 else 1.0)
        part_X = np.exp(size_X) * np.cos(angle_X) / np.hypot(saddle_X, height_X) * length_X
        total_X += part_X
        if step > 20 and np.abs(part_X).max(initial=0.0) < 1e-13:
            break
    return np.where(possible_X, np.clip(total_X * _STEP / np.pi, 0.0, 1.0), 0.0)


def _saddle(scaled_XN: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """(X,) where between 0 and 1 the integrand is least; the largest of the factors is 1."""
    low_X, high_X = np.zeros(scaled_XN.shape[:-1]), np.ones(scaled_XN.shape[:-1])
    for _ in range(_HALVINGS):
        middle_X = (low_X + high_X) / 2
        slope_X = (counts_N * scaled_XN / (1 - middle_X[..., None] * scaled_XN)).sum(-1) - 1 / middle_X
        low_X, high_X = np.where(slope_X < 0, middle_X, low_X), np.where(slope_X < 0, high_X, middle_X)
    return (low_X + high_X) / 2
