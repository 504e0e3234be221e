"""Answers that are not valid under their schema, drawn again."""

from __future__ import annotations

from dataclasses import replace

from conftest import document

from pipeline.engines.redrawing import RETRY_TEMPERATURE, Redrawing
from pipeline.prompts.splitting import Part, SplitDocument
from pipeline.records import AS_THE_RUN, Answer, Row, RowError, SamplingParams
from pipeline.settings.answer_settings import SamplingSettings
from pipeline.setup.validity import Validity

NUMBER, TEXT = '{"type": "number"}', '{"type": "string"}'
VALIDITY = Validity(schema=NUMBER, retries=2)


def prompt(row=0, params=AS_THE_RUN, name=None):
    encoded = document(20, row=row)
    return replace(encoded, source=replace(encoded.source, params=params, question_name=name))


def answered(item, text, **values):
    source = item.source
    return Answer(id=source.id, row=source.row, question_index=source.question_index, answer=text, **values)


def redrawing(*items, validity=VALIDITY, **sampling):
    made = Redrawing(validity, SamplingSettings(**sampling))
    made.expect(items)
    return made


def draws(item):
    return item.source.params.temperature, item.source.params.seed


def test_without_a_schema_nothing_is_said_of_an_answer():
    item = prompt()
    answer = redrawing(item, validity=None).take(answered(item, "no"))
    assert (answer.valid, answer.tries) == (None, None)
    answer = redrawing(item, validity=Validity(schema=None, retries=2)).take(answered(item, "no"))
    assert (answer.valid, answer.tries) == (None, None)


def test_a_valid_answer_is_the_rows_last():
    item = prompt()
    made = redrawing(item)
    answer = made.take(answered(item, "3"))
    assert (answer.valid, answer.tries) == (True, 1)
    assert made.items() == []


def test_parts_of_rows_pass_by():
    assert redrawing(prompt()).take(None) is None


def test_a_row_runs_again_until_its_answer_is_valid():
    item = prompt()
    made = redrawing(item)
    assert made.take(answered(item, "three")) is None
    (again,) = made.items()
    assert made.items() == []  # each is given once
    assert again.input_ids is item.input_ids
    answer = made.take(answered(again, "3"))
    assert (answer.answer, answer.valid, answer.tries) == ("3", True, 2)
    assert made.items() == []


def test_the_last_of_all_tries_stays_though_it_is_not_valid():
    item = prompt()
    made, seen = redrawing(item), set()
    for _ in range(VALIDITY.retries):
        assert made.take(answered(item, "three")) is None
        (item,) = made.items()
        seen.add(draws(item))
    answer = made.take(answered(item, "four"))
    assert (answer.answer, answer.valid, answer.tries) == ("four", False, 3)
    assert made.items() == []
    assert {temperature for temperature, _ in seen} == {RETRY_TEMPERATURE}
    assert len(seen) == VALIDITY.retries


def test_a_row_that_fails_in_a_later_try_has_failed():
    item = prompt()
    made = redrawing(item)
    assert made.take(answered(item, "three")) is None
    answer = made.take(answered(made.items()[0], None, status="error"))
    assert (answer.status, answer.valid, answer.tries) == ("error", None, None)
    assert made.items() == []


def test_the_temperature_of_run_and_row_stays_where_it_is_not_greedy():
    own = SamplingParams(temperature=0.2, top_p=0.5, seed=7)
    for params, temperature in ((AS_THE_RUN, 1.5), (own, 0.2), (replace(own, temperature=1e-6), 0.7)):
        item = prompt(params=params)
        made = redrawing(item, temperature=1.5)
        made.take(answered(item, "three"))
        (again,) = made.items()
        assert again.source.params == replace(params, temperature=temperature, seed=again.source.params.seed)
        assert again.source.params.seed != params.seed


def test_seeds_differ_by_row_question_seed_and_try_and_by_nothing_else():
    def seed(item, **sampling):
        made = redrawing(item, **sampling)
        made.take(answered(item, "three"))
        return draws(made.items()[0])[1]

    own = SamplingParams(seed=7)
    different = [prompt(), prompt(row=1), prompt(name="law"), prompt(name="value"), prompt(params=own)]
    assert len({*map(seed, different), seed(prompt(), seed=1)}) == 6
    assert seed(prompt()) == seed(prompt())
    # under a seed of its own a row draws the same wherever it stands
    assert seed(prompt(params=own)) == seed(prompt(row=1, params=own))


def test_a_row_may_have_a_schema_of_its_own():
    items = [prompt(), prompt(row=1, params=SamplingParams(schema=TEXT))]
    made = redrawing(*items, validity=replace(VALIDITY, retries=0))
    assert [made.take(answered(item, '"three"')).valid for item in items] == [False, True]


def test_all_prompts_of_a_split_row_are_drawn_again():
    source = Row(row=0, id="0", place="row 0")
    parts = tuple(Part(start=n, end=n + 1, encoded=prompt()) for n in range(2))
    item = SplitDocument(source=source, parts=parts, document_tokens=9, tokenize_ms=0.0)
    made = redrawing(item)
    assert made.take(answered(item, "three")) is None
    (again,) = made.items()
    assert {draws(each) for each in (again, *again.prompts)} == {draws(again)}
    assert draws(again)[0] == RETRY_TEMPERATURE


def test_rows_that_failed_before_they_were_prompts_are_none_to_draw():
    item = prompt(row=1)
    made = redrawing(RowError("missing_text", "no text", document(20).source), item)
    assert made.take(answered(item, "3")).valid
    assert made.items() == []
