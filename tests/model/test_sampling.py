"""The distribution of what is drawn, against probabilities worked out by hand, and where it is greedy."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from batch_runs import chosen

from pipeline.model.sampling import COLDEST, NOT_FINITE, Sampling

DRAWS = 20_000
# of log(1), log(2), log(4), log(8), log(1): at temperature 1/2 their squares, at 1 themselves
WEIGHTS = (1, 2, 4, 8, 1)
# of chi-square, above which one of a million right samplers would be, by degrees of freedom
LIMITS = {1: 23.9, 2: 27.6, 3: 30.7, 4: 33.4}


def shares(weights):
    return [Fraction(weight, sum(weights)) for weight in weights]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, shares(WEIGHTS)),
        (0.5, 1.0, shares([weight**2 for weight in WEIGHTS])),
        (1.0, 1e-50, shares((0, 0, 0, 1, 0))),  # the likeliest, however little is asked for
        (1.0, 0.5, shares((0, 0, 0, 1, 0))),  # 8 of 16 reach the half
        (1.0, 0.51, shares((0, 0, 4, 8, 0))),  # and no more: 12 of 16 do
        (1.0, 0.8, shares((0, 2, 4, 8, 0))),
        (0.5, 0.9, shares((0, 0, 16, 64, 0))),  # of the cooled distribution: 80 of 86
        (1.0, 0.9, shares((1, 2, 4, 8, 0))),  # of two that are alike the earlier
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_p, expected):
    logits = torch.tensor(WEIGHTS, dtype=torch.float64).log().float().expand(DRAWS, -1)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=7)
    uniforms = torch.stack([sampling.uniforms(row, 1)[0] for row in range(DRAWS)])
    drawn = chosen(logits, sampling, uniforms).bincount(minlength=len(WEIGHTS)).tolist()
    possible = [(count, share) for count, share in zip(drawn, expected, strict=True) if share]
    assert sum(count for count, _ in possible) == DRAWS
    if len(possible) > 1:
        chi_square = sum((count - DRAWS * share) ** 2 / (DRAWS * share) for count, share in possible)
        assert chi_square < LIMITS[len(possible) - 1]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, COLDEST / 1.01, COLDEST, 1e-3])
def test_next_to_no_temperature_draws_the_likeliest_token(temperature):
    sampling = Sampling(temperature=temperature)
    assert sampling.is_greedy == (temperature < COLDEST)
    logits = torch.tensor([[1e30, 3e30, 2e30], [-9.0, -8.0, -8.5], [-3e38, 3e38, 0.0]])
    assert chosen(logits, sampling, torch.tensor([0.0, 0.5, 0.9])).tolist() == [1, 1, 1]
    spoilt = torch.tensor([[0.0, float("nan")]])
    assert chosen(spoilt, sampling, torch.tensor([0.5])).tolist() == [NOT_FINITE]
