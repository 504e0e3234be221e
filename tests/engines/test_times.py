"""What the times of a row are made of, by a clock that moves only when something is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import document, loaded

from pipeline.engines import prefilling
from pipeline.engines.local import LocalEngine
from pipeline.generation.decode_loop import DecodeLoop
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.pruning.dense import Dense


@pytest.fixture
def model():
    return loaded()


def taking(seconds, clock, function):
    """The same, after so many seconds have passed."""

    def taken(*arguments, **options):
        clock.now += seconds
        return function(*arguments, **options)

    return taken


@pytest.mark.parametrize(
    ("pack_tokens", "queue_ms"), [(None, [5000] * 3), (1, [5000, 5000 + 4250, 5000 + 2 * 4250])]
)
def test_ttft_is_the_prefill_and_the_choice_of_the_first_token(
    model, clock, monkeypatch, pack_tokens, queue_ms
):
    """All rows of a pack have its whole time, of their waiting and of the steps that follow none."""
    for place, name, seconds in (
        (prefilling, "prefill", 2.0),
        (prefilling, "first_tokens", 0.25),
        (DecodeLoop, "step", 1.0),
    ):
        monkeypatch.setattr(place, name, taking(seconds, clock, getattr(place, name)))
    rules = StopRules(max_new_tokens=3)
    engine = LocalEngine(model, Dense(), rules=rules, sampling=Sampling(), pack_tokens=pack_tokens)
    given = [
        replace(row, ready_at=clock.now)
        for row in [document(20 + row, seed=row, row=row) for row in range(3)]
    ]
    clock.now += 5
    rows = engine.answer(given)
    assert [(row.prefill_ms, row.ttft_ms, row.decode_ms) for row in rows] == [(2000, 2250, 2000)] * 3
    assert sorted(row.queue_ms for row in rows) == queue_ms
