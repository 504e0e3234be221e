"""The order of a ladder, how it is climbed, and how often that writes what is false."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.calibration.bounds import Verified
from pipeline.calibration.ladder import (
    Rung,
    RungResult,
    Seen,
    climb,
    fastest_passed,
    make_ladder,
    mild_precisions,
    slope_of,
)
from pipeline.evaluate.drops import Drop, Judgement
from pipeline.evaluate.workbench import Trial
from pipeline.model.variant import Variant
from pipeline.pruning.fastkv import FastKV

SIMULATION = Path(__file__).parents[2] / "examples" / "calibration_simulation.py"


def trial(speed_up, divergence=0.0, complete=True):
    return Trial(
        variant=Variant("fastkv", FastKV()),
        scores=(SimpleNamespace(divergence=divergence),),
        dense_ttft_ms=100.0,
        ttft_ms=100.0 / speed_up,
        complete=complete,
    )


def rung(speed_up, expected, divergence=None):
    divergence = expected / 100 if divergence is None else divergence
    return Rung(trial=trial(speed_up, divergence), drop=expected, expected_drop=expected)


def speeds(rungs):
    return [pytest.approx(each.speed_up) for each in rungs]


def test_a_slope_is_the_nearest_line_through_nothing():
    assert slope_of([Seen(0.1, 2.0, 10), Seen(0.2, 4.0, 10)]) == pytest.approx(20)
    assert slope_of([Seen(0.1, 2.0, 10), Seen(0.1, 4.0, 30)]) == pytest.approx(35)  # by their cases
    assert slope_of([Seen(0.1, -2.0, 10)]) == 0
    assert slope_of([]) == slope_of([Seen(0.0, 1.0, 10)]) == 0


def test_a_loss_is_expected_by_divergence_and_without_one_by_the_drop_itself():
    assert Rung(trial=trial(1.0, 0.05), drop=9.0).expecting(20.0).expected_drop == pytest.approx(1.0)
    assert Rung(trial=trial(1.0, 0.0), drop=9.0).expecting(20.0).expected_drop == 9.0


def test_precisions_are_taken_as_far_as_they_are_mild_and_faster():
    mixed, fp8 = rung(1.2, 0.2), rung(1.5, 0.9)
    assert mild_precisions([fp8, mixed], 2.0) == [mixed, fp8]
    assert mild_precisions([fp8, mixed], 1.0) == [mixed]  # fp8 would take nearly all that may be lost
    assert mild_precisions([rung(0.9, 0.1), fp8], 2.0) == [fp8]
    assert mild_precisions([rung(1.5, 0.1), rung(1.4, 0.2)], 2.0) == [rung(1.5, 0.1)]


def test_a_ladder_is_ordered_and_ever_faster():
    precisions = [rung(1.2, 0.2)]
    mars = [rung(1.1, 0.3), rung(1.6, 0.4), rung(1.5, 0.8), rung(2.0, 1.5), rung(2.5, 2.1)]
    others = [rung(3.0, 1.2), rung(2.2, 0.9), rung(2.1, 0.1)]
    ladder = make_ladder(precisions, mars, others, 1.0)
    # 2.1 points are too far beyond the bound, 1.2 beyond what another method may be expected to lose
    assert speeds(ladder) == [1.2, 1.6, 2.0, 2.2]
    assert make_ladder([], [rung(1.0, 0.0)], [rung(0.9, 0.0)], 1.0) == []
    assert speeds(make_ladder([], [rung(1.3, 0.1)], [rung(1.2, 0.1)], 1.0)) == [1.3]
    # a gain that may be chance is not worth a test
    assert speeds(make_ladder([], [rung(1.3, 0.1), rung(1.31, 0.2), rung(1.4, 0.3)], [], 1.0)) == [1.3, 1.4]


def outcome(passes, speed_up):
    return SimpleNamespace(passes=passes, speed_up=speed_up)


def test_the_climb_ends_at_the_first_that_does_not_pass():
    outcomes = [outcome(True, 1.5), outcome(True, 1.3), outcome(False, 9.0), outcome(True, 8.0)]
    tested = climb(range(4), outcomes.__getitem__)
    assert tested == outcomes[:3]
    assert fastest_passed(tested) is outcomes[0]
    assert fastest_passed([outcome(True, 1.0), outcome(True, 0.9)]) is None  # no faster than dense
    assert fastest_passed([outcome(False, 2.0)]) is None


def gate(name, verdict, high=1.0, bound=2.0):
    drop = Drop(rows=9, documents=9, dense=1.0, method=1.0, relative=False, drop=0.0, low=-1.0, high=high)
    return Verified(gate=name, drop=drop, judgement=Judgement(verdict=verdict, bound=bound))


@pytest.mark.parametrize(
    ("verdicts", "complete", "verdict"),
    [
        (("pass", "pass"), True, "pass"),
        (("pass", "inconclusive"), True, "inconclusive"),
        (("fail", "inconclusive"), True, "fail"),
        ((), False, "given up"),
    ],
)
def test_a_rung_passes_all_its_gates_or_none(verdicts, complete, verdict):
    gates = tuple(gate(f"gate-{n}", each) for n, each in enumerate(verdicts))
    tested = RungResult(rung=rung(1.5, 0.1), trial=trial(1.4, complete=complete), gates=gates)
    assert (tested.verdict, tested.passes) == (verdict, verdict == "pass")


def test_the_worst_gate_is_the_one_that_goes_farthest_beyond_its_bound():
    gates = (gate("a", "inconclusive", high=3, bound=2), gate("b", "inconclusive", high=7, bound=5))
    assert RungResult(rung=rung(1.5, 0.1), trial=trial(1.4), gates=gates).worst_gate.gate == "b"


def test_a_gate_that_passes_is_not_the_worst_beside_one_that_shows_nothing():
    gates = (gate("a", "pass", high=1.5, bound=2), gate("b", "inconclusive", high=0.5, bound=5))
    assert RungResult(rung=rung(1.5, 0.1), trial=trial(1.4), gates=gates).worst_gate.gate == "b"


@pytest.fixture(scope="module")
def simulation():
    return runpy.run_path(str(SIMULATION))


def total(found):
    counts = found.values()
    return sum(each.profiles for each in counts), sum(each.false for each in counts)


@pytest.mark.slow
def test_simulated_calibrations_write_few_false_profiles(simulation):
    profiles, false = total(simulation["simulate"](200))
    assert profiles > 150
    assert false <= 12  # 2.5% are 5; more than 12 come once in 1,000 times


def test_a_simulation_finds_the_false_profiles_of_a_gate_that_looks_at_the_mean_alone(simulation):
    profiles, false = total(
        simulation["simulate"](40, passes=lambda paired, bound: 100 * paired.worse_D.mean() <= bound)
    )
    assert profiles == 40
    assert false > 10
