"""How much faster a candidate is: a median over cases, each counting by dense's time; and drift."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.quality.workbench import Clock, Drift, slowdown


def test_long_cases_count_by_their_time():
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


@pytest.mark.parametrize(("factor", "told"), [(1.03, 1.0), (1.5, 1.5), (0.8, 0.8)])
def test_drift_is_measured_now_and_then_and_noise_is_not_told(factor, told):
    now = [0.0]
    runs = []

    def run(variant, case):
        runs.append(variant.name)
        return SimpleNamespace(score=SimpleNamespace(ttft_ms=20.0 * factor))

    bench = SimpleNamespace(run=run)
    drift = Drift(bench=bench, case=None, ttft_ms=20.0, clock=Clock(600, lambda: now[0]))
    assert drift() == 1
    assert runs == []
    now[0] = 11.0
    assert drift() == pytest.approx(told)
    now[0] = 15.0
    assert drift() == pytest.approx(told)
    assert runs == ["dense"]
