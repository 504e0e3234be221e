"""How much faster a variant is: a median over cases, each counting by dense's time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.bench.accuracy import slowdown
from pipeline.evaluate.workbench import Workbench, timed_places
from pipeline.model.variant import Variant
from pipeline.pruning.fastkv import FastKV

FAST = Variant("fast", FastKV())


def test_of_a_slowdown_long_cases_count_by_their_time():
    assert slowdown([1.0, 1.0, 1.0, 10.0], [2.0, 2.0, 2.0, 5.0]) == 0.5
    assert slowdown([1.0, 1.0, 1.0, 10.0], [2.0, 2.0, 2.0, 50.0]) == 5.0


def test_of_equal_cases_it_is_the_median():
    assert slowdown([4.0] * 5, [1.0, 2.0, 3.0, 4.0, 40.0]) == 0.75
    assert slowdown([4.0] * 4, [1.0, 2.0, 3.0, 40.0]) == 0.625
    assert slowdown([3.0], [6.0]) == 2.0


def test_a_busy_moment_does_not_move_it():
    times = [10.0] * 21
    own = [8.0] * 20 + [800.0]
    assert slowdown(times, own) == pytest.approx(0.8)


@dataclass
class Timed(Workbench):
    """A device on which a run takes a millisecond a token, or the variant's share of it."""

    model: Any = None
    fp8: bool = False
    runs: list[tuple[str, int]] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    busy: Sequence[int] = ()  # runs that take a hundred times as long
    slow_below: int = 0  # tokens of cases on which all but dense takes twice as long as dense

    def run(self, variant, case, *, dense=None, top=0):
        tokens = case.document.prompt_tokens
        self.runs.append((variant.name, tokens))
        share = 2.0 if tokens < self.slow_below and variant.name != "dense" else self.shares[variant.name]
        ttft_ms = share * tokens * (100 if len(self.runs) - 1 in self.busy else 1)
        return SimpleNamespace(score=SimpleNamespace(ttft_ms=ttft_ms, divergence=dense))


def cases_of(*lengths):
    return [SimpleNamespace(document=SimpleNamespace(prompt_tokens=length)) for length in lengths]


def test_a_variant_is_timed_in_turns_with_dense_and_the_shorter_run_counts():
    bench = Timed(shares={"dense": 1.0, "fast": 0.5}, busy=[0, 6])
    trial = bench.try_out(FAST, cases_of(10, 30), dense=[0.1, 0.3], within=lambda: True)
    turns = ["fast", "dense", "fast", "dense"]
    assert bench.runs == [*((name, 10) for name in turns), *((name, 30) for name in turns)]
    assert (trial.complete, trial.dense_ttft_ms, trial.ttft_ms, trial.speed_up) == (True, 20.0, 10.0, 2.0)
    assert trial.divergence == pytest.approx(0.2)


def test_long_cases_count_by_their_time():
    bench = Timed(shares={"dense": 1.0, "fast": 0.5}, slow_below=20)
    trial = bench.try_out(FAST, cases_of(10, 10, 10, 970), within=lambda: True)
    assert trial.speed_up == pytest.approx(1000 / (3 * 20 + 485))


@pytest.mark.parametrize(("turns", "scores"), [(0, 0), (1, 1), (3, 3)])
def test_without_time_for_all_cases_a_trial_is_not_complete(turns, scores):
    asked = iter(range(100))
    bench = Timed(shares={"dense": 1.0, "fast": 0.5})
    trial = bench.try_out(FAST, cases_of(10, 30, 20), within=lambda: next(asked) < turns)
    assert (len(trial.scores), trial.complete) == (scores, scores == 3)


def test_cases_of_all_lengths_are_timed():
    cases = cases_of(*range(100), *range(9000, 9100))
    places = timed_places(cases)
    assert len(places) == 10
    assert sum(place >= 100 for place in places) == 5
    assert timed_places(cases_of(3, 1, 2)) == [1, 2, 0]
