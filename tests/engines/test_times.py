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


def documents():
    return [document(20 + row, seed=row, row=row) for row in range(7)]


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
    given = [replace(row, ready_at=clock.now) for row in documents()[:3]]
    clock.now += 5
    rows = engine.answer(given)
    assert [(row.prefill_ms, row.ttft_ms, row.decode_ms) for row in rows] == [(2000, 2250, 2000)] * 3
    assert sorted(row.queue_ms for row in rows) == queue_ms


def test_the_engine_knows_where_its_time_went(model):
    engine = LocalEngine(model, Dense(), rules=StopRules(max_new_tokens=3), sampling=Sampling())
    rows = [engine.answer(documents()[:3]), engine.answer(documents()[3:])]
    times = engine.times
    assert times.packs == 2
    assert times.prefill_s == pytest.approx(sum(pack[0].ttft_ms for pack in rows) / 1e3)
    assert times.decode_s >= sum(max(row.decode_ms for row in pack) for pack in rows) / 1e3
    assert times.prefill_s + times.decode_s < times.span_s


class StepClock:
    """The clock of decoding, which goes on by a second a step."""

    def __init__(self):
        self.seconds = 0.0

    def start(self):
        self.seconds += 1.0

    def stop(self):
        return 0.0


@pytest.mark.parametrize(("limit", "status"), [(4.5, "ok"), (3.5, "error")])
def test_the_time_limit_of_a_row_counts_its_own_steps(model, limit, status):
    engine = LocalEngine(
        model, Dense(), rules=StopRules(max_new_tokens=6), sampling=Sampling(), in_flight=2, pack_tokens=30
    )
    engine._clock, engine.attempts.row_timeout = StepClock(), limit
    for row in documents():
        engine.add([row])
    rows = []
    while engine.is_busy:
        rows += [answer for _, answer, _ in engine.advance()]
    assert {row.status for row in rows} == {status}  # each takes five steps, and is looked at after four
    assert len(rows) == 7
    assert engine._clock.seconds > 3 * limit  # of all rows together
    if status == "error":
        assert {row.error_type for row in rows} == {"timeout"}
        assert rows[0].error_message == "row 0: not answered within --row-timeout 3.5 s"


def test_the_times_of_a_row_add_up_to_its_way_through_the_engine(model, clock):
    clock.tick = 1e-3  # each look at it: a real one may stand still for a row, and run for the next
    engine = LocalEngine(
        model, Dense(), rules=StopRules(max_new_tokens=5), sampling=Sampling(), in_flight=2, pack_tokens=30
    )
    began = clock()
    given = [replace(row, ready_at=began) for row in documents()]
    rows = engine.answer(given)
    took_ms = (clock() - began) * 1e3
    for row in rows:
        assert min(row.queue_ms, row.ttft_ms, row.decode_ms) >= 0
        assert row.queue_ms + row.ttft_ms + row.decode_ms <= took_ms
    assert max(row.queue_ms for row in rows) > max(row.ttft_ms for row in rows)  # five waited for two
    assert engine.times.prefill_s + engine.times.decode_s <= engine.times.span_s
