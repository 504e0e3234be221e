"""The distribution of what is drawn, against probabilities worked out by hand, and where it is greedy."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from batch_runs import chosen
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.generation.sampling import COLDEST, NOT_FINITE, RowDraws, Sampling, first_tokens

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


def test_each_seed_row_and_answer_has_numbers_of_its_own():
    of_seeds = [Sampling(seed=seed).uniforms(5, 2) for seed in (0, 1, 2**32, 2**32 + 1, 2**52 + 1, -(2**40))]
    of_rows = [Sampling(seed=1).uniforms(row, 2, answer) for row in (0, 6) for answer in (0, 1)]
    assert len({tuple(each.tolist()) for each in of_seeds + of_rows}) == 10


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, COLDEST / 1.01, COLDEST, 1e-3])
def test_next_to_no_temperature_draws_the_likeliest_token(temperature):
    sampling = Sampling(temperature=temperature)
    assert sampling.is_greedy == (temperature < COLDEST)
    logits = torch.tensor([[1e30, 3e30, 2e30], [-9.0, -8.0, -8.5], [-3e38, 3e38, 0.0]])
    assert chosen(logits, sampling, torch.tensor([0.0, 0.5, 0.9])).tolist() == [1, 1, 1]
    spoilt = torch.tensor([[0.0, float("nan")]])
    assert chosen(spoilt, sampling, torch.tensor([0.5])).tolist() == [NOT_FINITE]


POINTS = 500  # at which the distribution function of a row is looked at
PROMPTS = ([3, 3, 8, 11], [0, 5], [7, 1, 2, 30, 7], [39])
VOCABULARY = 40


def their_shares(logits, prompt, sampling):
    """(V,) probabilities by transformers' processors, in the order in which it makes their list."""
    given = [
        (sampling.repetition_penalty != 1, RepetitionPenaltyLogitsProcessor, sampling.repetition_penalty),
        (True, TemperatureLogitsWarper, sampling.temperature),
        (sampling.top_k > 0, TopKLogitsWarper, sampling.top_k),
        (sampling.top_p < 1, TopPLogitsWarper, sampling.top_p),
        (sampling.min_p > 0, MinPLogitsWarper, sampling.min_p),
    ]
    processors = LogitsProcessorList([make(value) for is_set, make, value in given if is_set])
    return processors(torch.tensor([prompt]), logits[None])[0].softmax(-1)


EVERY = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    for temperature, top_k, top_p, min_p, penalty in product(
        (0.7, 1.3), (0, 1, 6, 99), (1.0, 0.6), (0.0, 0.15), (1.0, 1.6, 0.5)
    )
]


def test_every_token_is_as_likely_as_by_the_processors_of_transformers():
    """One by one and beside each other, where a row of one kind is drawn in a step for all kinds."""
    made = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(len(EVERY), VOCABULARY, generator=made)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(EVERY))]
    uniforms = (torch.arange(POINTS) + 0.5) / POINTS
    expected = [their_shares(*each) for each in zip(logits, prompts, EVERY, strict=True)]
    assert 5 < sum(int((shares > 0).sum() < VOCABULARY / 2) for shares in expected) < len(EVERY)
    alone = [
        first_tokens(
            row.expand(POINTS, -1),
            [RowDraws(sampling, uniforms[n : n + 1]) for n in range(POINTS)],
            [np.array(prompt)] * POINTS,
        )
        for row, prompt, sampling in zip(logits, prompts, EVERY, strict=True)
    ]
    for tokens, shares in zip(alone, expected, strict=True):
        counts = torch.tensor(tokens).bincount(minlength=VOCABULARY)
        assert ((counts - POINTS * shares).abs() <= 1 + 1e-3).all()
        assert (counts[shares == 0] == 0).all()
    for point in range(0, POINTS, 50):
        together = first_tokens(
            logits,
            [RowDraws(sampling, uniforms[point : point + 1]) for sampling in EVERY],
            [np.array(prompt) for prompt in prompts],
        )
        assert together == [tokens[point] for tokens in alone]


def test_of_tokens_as_likely_as_the_kth_all_stay():
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0]]).expand(200, -1)
    drawn = chosen(logits, Sampling(temperature=1.0, top_k=2), torch.arange(200) / 200)
    assert set(drawn.tolist()) == {1, 2, 3, 4}


def test_a_penalty_is_for_greedy_answers_too():
    logits = torch.tensor([[2.0, 3.0, -1.0], [-2.0, -3.0, -1.0]])
    draws = [Sampling(repetition_penalty=2.5).draws(row, 9) for row in range(2)]
    assert first_tokens(logits, [None, None]) == [1, 2]
    assert first_tokens(logits, draws, [np.array([1, 1]), np.array([2])]) == [0, 0]
    assert first_tokens(logits, [draws[0], None], [np.array([1, 1]), np.array([2])]) == [0, 2]
