"""Rows that say themselves how long their answer may be and how it is drawn, in one batch with others.

In float64, where sums in another order do not move a choice.
"""

from __future__ import annotations

import random
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from conftest import document, loaded
from decode_steps import exact_model, record_steps

from pipeline.engines.local import LocalEngine
from pipeline.engines.row_rules import RowRules
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.generation.stopping import StopTexts
from pipeline.model.graphs import StepSize
from pipeline.pruning.dense import Dense
from pipeline.records import Row, SamplingParams

NEW_TOKENS = 10
# a token of these tests is written as its number and a space
TOKENIZER = SimpleNamespace(
    decode=lambda tokens, **_: "".join(f"{token} " for token in tokens), added_tokens_decoder={}
)
PARAMS = {
    "as the run": SamplingParams(),
    "of one token": SamplingParams(max_new_tokens=1),
    "short": SamplingParams(max_new_tokens=3),
    "longer than the run's": SamplingParams(max_new_tokens=35),
    "drawn": SamplingParams(temperature=1.0),
    "drawn by a seed": SamplingParams(temperature=1.0, seed=4),
    "drawn from the likely": SamplingParams(temperature=1.4, top_p=0.7, seed=4, max_new_tokens=20),
    "drawn from the likeliest few": SamplingParams(temperature=1.4, top_k=5, min_p=0.1, seed=4),
    "penalised": SamplingParams(repetition_penalty=2.0, max_new_tokens=25),
    "drawn and penalised": SamplingParams(temperature=1.0, repetition_penalty=1.5, seed=2),
    "drawn for long": SamplingParams(temperature=1.0, seed=9, max_new_tokens=150),
    "stopped": SamplingParams(stop=("1 ", "7 "), max_new_tokens=30),
}


@pytest.fixture(scope="module")
def model():
    return loaded(exact_model(), tokenizer=TOKENIZER)


@pytest.fixture(params=[0, 1])
def recorder(request, monkeypatch):
    """Of captured steps, and how many are queued before the tokens of one are looked at."""
    return record_steps(monkeypatch, request.param)


def engine_for(model, *, rules=None, sampling=None, **options):
    rules = rules or StopRules(max_new_tokens=NEW_TOKENS)
    return LocalEngine(model, Dense(), rules=rules, sampling=sampling or Sampling(), **options)


def with_params(made, params):
    return replace(made, source=replace(made.source, params=params))


def rows(times=2):
    every = list(PARAMS.values()) * times
    made = [document(20 + 7 * number, seed=number, row=number) for number in range(len(every))]
    return [with_params(*pair) for pair in zip(made, every, strict=True)]


def told(answer):
    return answer.status, answer.answer, answer.finish_reason, answer.new_tokens


def alone(model, row, **options):
    return told(engine_for(model, pack_tokens=1, **options).answer([row])[0])


def with_store_for(engine, given, count):
    """The engine with a store for so many rows like the largest, so that they wait for each other's room.

    Where that is less than one, the largest run alone.
    """
    packer = engine.packer
    slots = max(packer.slots(row.prompt_tokens, packer.room(row)) for row in given)
    engine.packer = replace(packer, store_bytes=int(count * slots) * packer.slot_bytes)
    return engine


@pytest.mark.parametrize(
    ("in_flight", "pack_tokens", "room", "lookup"),
    [(16, None, 16, 0), (3, 100, 2, 0), (5, 60, 1, 3), (8, 90, 0.4, 0)],
)
def test_neighbours_change_no_answer_whatever_they_ask_for(
    model, recorder, in_flight, pack_tokens, room, lookup
):
    given = rows()
    expected = [alone(model, row) for row in given]
    engine = engine_for(model, in_flight=in_flight, pack_tokens=pack_tokens, lookup=lookup)
    with_store_for(engine, given, room)
    assert any(map(engine.packer.runs_alone, given)) == (room < 1)
    waiting, draws, found = list(given), random.Random(in_flight), {}
    draws.shuffle(waiting)
    while waiting or engine.is_busy:
        if waiting and (not engine.is_busy or draws.random() < 0.3):
            engine.add([waiting.pop()])
        found |= {answer.row: told(answer) for _, answer, _ in engine.advance()}
    assert [found[row] for row in range(len(given))] == expected
    assert engine.stats.replayed_steps > 0
    assert len({length for *_, length in expected}) > 4


@pytest.mark.parametrize("kind", PARAMS)
def test_a_row_is_answered_as_by_a_run_of_its_settings(model, kind):
    own = PARAMS[kind]
    row = with_params(document(40, seed=3), own)
    rules = StopRules(
        max_new_tokens=own.max_new_tokens or NEW_TOKENS,
        texts=StopTexts(texts=own.stop, tokenizer=TOKENIZER) if own.stop else None,
    )
    given = {each.name: getattr(own, each.name) for each in fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    expected = alone(model, document(40, seed=3), rules=rules, sampling=sampling)
    assert alone(model, row) == expected


def test_a_greedy_row_stays_greedy_in_a_run_that_draws(model):
    row = document(40, seed=3)
    greedy = with_params(row, SamplingParams(temperature=0.0))
    others = [document(30, seed=seed, row=seed) for seed in range(1, 4)]
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=1)
    together = engine_for(model, sampling=sampling).answer([greedy, *others])
    assert told(together[0]) == alone(model, row)
    assert told(together[1]) == alone(model, others[0], sampling=sampling) != alone(model, others[0])


def test_under_a_seed_of_its_own_a_row_is_drawn_the_same_wherever_it_stands():
    rules = RowRules(
        rules=StopRules(max_new_tokens=5), sampling=Sampling(temperature=1.0), tokenizer=TOKENIZER
    )
    seeded, unseeded = SamplingParams(seed=7), SamplingParams(temperature=0.9)
    drawn = {
        (params, number): rules.draws(Row(row=number, id="", place="", params=params))[0]
        for params in (seeded, unseeded)
        for number in (0, 5)
    }
    numbers = {key: draws.uniform_N.tolist() for key, draws in drawn.items()}
    assert numbers[seeded, 0] == numbers[seeded, 5]
    assert numbers[unseeded, 0] != numbers[unseeded, 5]


def test_lists_of_stop_texts_are_shared_and_not_held_without_end():
    rules = RowRules(rules=StopRules(max_new_tokens=5), sampling=Sampling(), tokenizer=TOKENIZER)

    def stops(text):
        return rules.of(Row(row=0, id="", place="", params=SamplingParams(stop=(text,)))).texts

    assert stops("a") is stops("a")
    for number in range(1000):
        assert stops(str(number)).texts == (str(number),)
    assert len(rules._texts) < 100


# what rows ask for, and what of a step it takes: no more than is asked for
KINDS = [
    ({"temperature": 1.0}, {"numbers": 256}),
    ({"temperature": 1.0, "top_p": 0.5}, {"numbers": 256, "sorts": True}),
    ({"temperature": 1.0, "top_k": 3}, {"numbers": 256, "sorts": True}),
    ({"temperature": 1.0, "min_p": 0.1}, {"numbers": 256, "floors": True}),
    ({"repetition_penalty": 1.2}, {"penalises": True}),
    ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, {}),  # which do nothing where answers are greedy
]


def test_greedy_rows_cost_no_draws(model, recorder):
    """Neither room for numbers or seen tokens nor a step with them, before or behind a row that needs all."""
    engine = engine_for(model, in_flight=4)
    greedy = [document(30, seed=seed, row=seed) for seed in range(3)]
    engine.answer(greedy)
    batch = engine._table.loop._batch
    assert batch._draws._uniform_CN.numel() == batch._penalties._seen_CV.numel() == 0
    assert batch.size(4, 4) == StepSize(4, 4)
    for own, kind in KINDS:
        engine.add([with_params(document(30, seed=9, row=3), SamplingParams(max_new_tokens=200, **own))])
        engine.advance()
        assert batch.size(4, 4) == StepSize(4, 4, **kind)
        while engine.is_busy:
            engine.advance()
        assert batch.size(4, 4) == StepSize(4, 4)
