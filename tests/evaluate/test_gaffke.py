"""Gaffke's bound against closed forms, draws, and an interval that is proven: a gambler's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluate.drops import TAIL, Paired
from pipeline.evaluate.gaffke import beyond

SIZES = [1, 2, 8, 30, 100, 183, 368, 1000]
LOSSES = {
    "1 of 20 loses all": lambda rng, shape: (rng.random(shape) < 0.05).astype(float),
    "1 of 20 loses all, others gain": lambda rng, shape: np.where(rng.random(shape) < 0.05, 1.0, -0.02),
    "graded": lambda rng, shape: rng.uniform(-0.1, 0.14, shape),
}
MEANS = {"1 of 20 loses all": 0.05, "1 of 20 loses all, others gain": 0.031, "graded": 0.02}


def beyond_one(values, most, bound):
    return float(beyond((np.asarray(values) - bound)[None], most - bound)[0])


@pytest.mark.parametrize("count", SIZES)
def test_without_a_loss_it_is_the_rule_of_three(count):
    edge = 1 - TAIL ** (1 / count)
    assert beyond_one(np.zeros(count), 1.0, edge) == pytest.approx(TAIL, rel=1e-5)


@pytest.mark.parametrize(("count", "lost"), [(8, 1), (30, 4), (100, 3), (300, 150)])
@pytest.mark.parametrize("bound", [0.1, 0.3, 0.55])
def test_losses_of_all_give_clopper_and_pearsons(count, lost, bound):
    values = np.repeat([1.0, 0.0], [lost, count - lost])
    # P(Beta(lost + 1, count - lost) > bound) is that of at most `lost` in `count` trials
    exact = sum(math.comb(count, k) * bound**k * (1 - bound) ** (count - k) for k in range(lost + 1))
    assert beyond_one(values, 1.0, bound) == pytest.approx(exact, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_it_is_the_quantile_of_sums_with_a_flat_dirichlet(count):
    rng = np.random.default_rng(count)
    values = rng.uniform(-1, 1, count)
    drawn = rng.exponential(size=(200_000, count + 1))
    sums = (drawn @ np.append(values, 1.0)) / drawn.sum(1)
    for bound in np.quantile(sums, [0.05, 0.5, 0.9, 0.975]):
        assert beyond_one(values, 1.0, bound) == pytest.approx((sums > bound).mean(), abs=0.004)


def test_values_seen_several_times_are_counted():
    once = beyond(np.array([[0.2, 0.2, 0.2, -0.5]]), 0.9)
    counted = beyond(np.array([[0.2, -0.5]]), 0.9, np.array([3.0, 1.0]))
    assert counted == pytest.approx(once, rel=1e-10)


@pytest.mark.parametrize(("values", "most", "expected"), [([-0.1, -0.2], 0.0, 0.0), ([0.1, 0.2], 0.3, 1.0)])
def test_means_that_are_surely_on_one_side(values, most, expected):
    assert float(beyond(np.array([values]), most)[0]) == pytest.approx(expected)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("count", [8, 30, 100])
def test_a_pass_at_the_true_drop_is_as_rare_as_it_says(kind, count):
    samples = 4000
    lost = LOSSES[kind](np.random.default_rng(1), (samples, count))
    passed = (beyond(lost - MEANS[kind], 1 - MEANS[kind]) <= TAIL).mean()
    assert passed <= TAIL + 3 * math.sqrt(TAIL / samples)


def gambled(values, bound, least, most):
    """The most that a gambler's capital came to who bets, round by round, on a mean below `bound`.

    Waudby-Smith and Ramdas 2020 (arXiv:2010.09686): 1 over that is a p value, whatever the values are.
    """
    span = most - least
    scaled, mean = (np.asarray(values) - least) / span, (bound - least) / span
    guessed, variance, capital, best = 0.5, 0.25, 1.0, 1.0
    for place, value in enumerate(scaled, start=1):
        bet = min(math.sqrt(2 * math.log(1 / TAIL) / (variance * len(scaled))), 0.5 / (1 - mean))
        capital *= 1 + bet * (mean - value)
        best = max(best, capital)
        guessed += (value - guessed) / (place + 1)
        variance += ((value - guessed) ** 2 - variance) / (place + 1)
    return best


@pytest.mark.parametrize("kind", LOSSES)
def test_what_a_gambler_proves_gaffkes_bound_passes_too(kind):
    """The gambler's is proven and wider, so that it hardly ever passes what this one does not."""
    rng = np.random.default_rng(3)
    proven = beside = passed = 0
    for _ in range(150):
        lost = LOSSES[kind](rng, 200)
        bound = MEANS[kind] + 0.05
        gaffkes = beyond_one(lost, 1.0, bound) <= TAIL
        gamblers = gambled(lost, bound, -1.0, 1.0) >= 1 / TAIL
        proven, passed = proven + gamblers, passed + gaffkes
        beside += gamblers and not gaffkes
    assert passed >= proven
    assert passed > 75
    assert beside == 0


def test_relative_drops_and_rises_of_losses_are_as_rarely_passed():
    rng = np.random.default_rng(5)
    samples, count = 2000, 60
    dense = rng.choice([0.2, 1.0], (samples, count))
    lost = dense * (rng.random((samples, count)) < 0.05)  # 5% of dense
    passed = sum(
        Paired.of(d.tolist(), (d - x).tolist(), relative=True).p_beyond(5.0) <= TAIL
        for d, x in zip(dense[:400], lost[:400], strict=True)
    )
    assert passed / 400 <= TAIL + 3 * math.sqrt(TAIL / 400)
