"""Rows in memory to answers in memory: `pipeline.answer`."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections import deque
from itertools import count, islice

import pyarrow as pa
import pytest
from conftest import FISH

from pipeline import MarsError, answer, calibrate, check, in_memory, load_model, run_batch
from pipeline.errors import (
    HANDED_OUT,
    KEPT,
    ConfigError,
    DeadlineReached,
    InputError,
    StorageError,
    TooManyErrors,
)
from pipeline.outputs.own_columns import INDEXED, STATISTICS

OPTIONS = {"text_column": "body", "question_column": "ask", "max_new_tokens": 3, "device": "cpu"}


@pytest.fixture
def ask(model_folder):
    def ask(rows, **options):
        return answer(rows, **{"model": model_folder, **OPTIONS, **options})

    return ask


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(str(model_folder), device="cpu")


def test_answers_are_those_of_a_run_over_files(ask, fish, model_folder, tmp_path):
    out = tmp_path / "out.jsonl"
    run_batch(fish, out, model=model_folder, **OPTIONS)
    with out.open(encoding="utf-8") as lines:
        expected = [json.loads(line) for line in lines]
    for rows in (FISH, pa.Table.from_pylist(FISH)):
        answers = list(ask(rows))
        assert [row["answer"] for row in answers] == [row["answer"] for row in expected]
        assert [row["prompt_tokens"] for row in answers] == [row["prompt_tokens"] for row in expected]
        assert [row["year"] for row in answers] == [1960, 1961, None]
        assert [row["doc"] for row in answers] == ["a", "b", "c"]
        assert "body" not in answers[0]
        assert answers[0]["question"] == "how many fish?"


def test_the_order_is_that_of_the_rows(ask):
    """Though long rows end last, as packs are of rows of like length."""
    rows = [
        {"body": "fish " * (1 + 7 * (number % 5)), "ask": "how many?", "at": number} for number in range(40)
    ]
    in_order = list(ask(rows, in_flight=3, pack_tokens=300))
    assert [row["at"] for row in in_order] == list(range(40))
    as_ended = list(ask(rows, in_flight=3, pack_tokens=300, order="completion"))
    assert [row["at"] for row in as_ended] != list(range(40))
    texts = {row["at"]: row["answer"] for row in as_ended}
    assert [row["answer"] for row in in_order] == [texts[number] for number in range(40)]


def test_answers_that_wait_for_their_turn_are_bounded(ask, monkeypatch):
    """Rows are taken no further while too many answers wait for an earlier one."""
    monkeypatch.setattr(in_memory, "MOST_WAITING", 2)
    rows = [{"body": "fish " * (1 + 7 * (number % 5)), "ask": "how many?"} for number in range(30)]
    assert [row["row"] for row in ask(rows, in_flight=2)] == list(range(30))


def test_an_endless_iterable_is_read_a_bounded_number_of_rows_ahead(ask):
    taken = []

    def endless():
        for number in count():
            taken.append(number)
            yield {"body": f"fish {number}", "ask": "?"}

    with ask(endless(), max_new_tokens=1) as answers:
        first = list(islice(answers, 3))
    assert [row["row"] for row in first] == [0, 1, 2]
    assert len(taken) <= 256 * 8  # windows
    assert list(answers) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_values_of_mappings_stay_as_they_are(ask):
    mark = object()
    rows = [{"body": "fish", "ask": "?", "mark": mark, "answer": "carp", "status": None}]
    (row,) = ask(rows)
    assert row["mark"] is mark
    assert (row["answer_input"], row["status_input"], row["status"]) == ("carp", None, "ok")
    (row,) = ask(rows, keep_columns="mark")
    assert row["mark"] is mark
    assert "answer_input" not in row
    with pytest.raises(ConfigError, match="keep_columns: 'mark' keeps the type"):
        ask(rows, keep_columns="mark:int")


def test_several_questions_a_row_and_one_for_all(ask):
    rows = [{"body": "fish", "ask": ["a?", "b?"]}, {"body": "more", "ask": ["c?"]}]
    answers = list(ask(rows, question_column=None, questions_column="ask"))
    assert [(row["row"], row["question"]) for row in answers] == [(0, "a?"), (0, "b?"), (1, "c?")]
    (only,) = ask([{"body": "fish"}], question_column=None, question="what?")
    assert only["question"] == "what?"


def test_rows_that_cannot_be_answered_are_rows(ask):
    rows = [
        FISH[0],
        "two",
        {"ask": "?"},
        {"body": b"x", "ask": "?"},
        {"body": " ", "ask": "?"},
        None,
        FISH[1],
    ]
    answers = ask(rows)
    found = [(row["status"], row["error_type"], row["error_message"]) for row in answers]
    assert found == [
        ("ok", None, None),
        ("error", "not_an_object", "row 1 is of type str, not a mapping"),
        ("error", "missing_text", "row 2: there is no 'body'; it has: ask (--text-column names the text)"),
        ("error", "bad_text_type", "row 3: 'body' is of type bytes, not a string"),
        ("error", "empty_document", "row 4: 'body' is empty"),
        ("error", "not_an_object", "row 5 is null, not a mapping"),
        ("ok", None, None),
    ]
    assert answers.summary.in_output == {"ok": 2, "error": 5}
    assert "first bad_text_type" in answers._repr_html_()


@pytest.mark.parametrize("order", ["input", "completion"])
def test_too_many_errors_end_it_behind_all_that_was_answered(ask, order):
    answers, found = ask([{}, FISH[0], {}, {}], max_errors=1, order=order), []
    with pytest.raises(TooManyErrors, match=f"more than --max-errors 1 allows; {HANDED_OUT}$"):
        found.extend(row["status"] for row in answers)
    assert sorted(found) == ["error", "error", "error", "ok"]


def test_a_deadline_ends_it(ask):
    rows = ({"body": f"fish {number}", "ask": "?"} for number in count())
    with pytest.raises(DeadlineReached, match=f"^stopped at the deadline, .*; {HANDED_OUT}$"):
        deque(ask(rows, deadline="1s"), maxlen=0)


def test_the_columns_that_are_named_and_statistics_as_one(ask):
    (row,) = ask(FISH[:1], columns=["answer", "stats"], keep_columns="year", price_per_hour=36)
    assert list(row) == [*INDEXED[:4], "answer", *INDEXED[4:5], "stats", *INDEXED[5:], "year"]
    assert list(row["stats"]) == list(STATISTICS)
    assert row["stats"]["new_tokens"] == 3
    (row,) = ask([{**FISH[0], "stats": "own"}], columns=["stats"])
    assert row["stats_input"] == "own"
    answers = ask(FISH[:1], price_per_hour=36)
    list(answers)
    assert answers.summary.cost == pytest.approx(answers.summary.seconds / 100)


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ("in.jsonl", {}, "rows are of type str: run_batch reads files"),
        ({"body": ["a"]}, {}, "rows are of type dict: give an iterable of mappings"),
        (3, {}, "rows are of type int: give an iterable"),
        (["text"], {}, "the first row is of type str, not a mapping"),
        (pa.table({"text": ["a"]}), {}, "the table has no column 'body'; it has: text"),
        (pa.table({"body": [1], "ask": ["?"]}), {}, "the table: column 'body' is int64, not a string"),
        (FISH, {"qestion": "?"}, r"answer has no option 'qestion' \(did you mean 'question'\?\)"),
        (FISH, {"output": "x.jsonl"}, "answer has no option 'output'"),
        (FISH, {"resume": True}, "answer has no option 'resume'.*but .*resume"),
        (FISH, {"engine": "ray"}, "answer has no option 'engine'"),
        (FISH, {"sort_by_document": True}, "answer has no option 'sort_by_document'"),
        (FISH, {"columns": ["anser"]}, "'anser' is no column of answers \\(did you mean 'answer'"),
        (FISH, {"max_new_tokens": "many"}, "max_new_tokens = 'many': must be a whole number"),
        (FISH, {"question": "?"}, "--question and --question-column exclude each other"),
        (FISH, {"method": "marsinfre"}, "did you mean 'marsinfer'"),
        (FISH, {"device": "cuda:7"}, "cuda:7"),
        (iter(FISH), {"sample": 1}, "rows can be read only once"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(ask, monkeypatch, rows, options, told):
    from pipeline.model.loading import UnloadedModel

    monkeypatch.setattr(UnloadedModel, "load", lambda *given: pytest.fail("weights were loaded"))
    with pytest.raises(MarsError, match=told):
        list(ask(rows, **options))


def test_no_row_has_the_column(ask):
    with pytest.raises(InputError, match="no row has 'body' of the 2 rows read so far"):
        list(ask([{"ask": "?"}, {"ask": "?"}]))


def test_no_rows_are_no_answers(ask):
    assert list(ask([])) == []
    assert list(ask(iter(()))) == []
    empty = ask(pa.Table.from_pylist(FISH).slice(0, 0)).table()
    assert (empty.num_rows, empty["year"].type) == (0, pa.int64())


def test_an_iterable_that_raises_is_told_behind_the_answers_before(ask):
    def torn():
        yield FISH[0]
        yield FISH[1]
        raise LookupError("the database is gone")

    answers = ask(torn())
    assert [next(answers)["status"], next(answers)["status"]] == ["ok", "ok"]
    with pytest.raises(LookupError, match="the database is gone"):
        next(answers)
    assert answers.summary.has_ended


@pytest.mark.parametrize("error", [StorageError(f"full; {KEPT}"), KeyError("id"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [[], FISH[:1], [{"other": 1}, {"other": 2}]], ids=["none", "row", "bad"])
def test_what_an_iterable_raises_comes_as_it_is(ask, before, error):
    def torn():
        yield from before
        raise error

    told = str(error)
    with pytest.raises(type(error)) as raised:
        list(ask(torn()))
    assert raised.value is error
    assert str(error) == told


def test_a_loaded_model_answers_for_one_run_at_a_time(ask, model, fish, tmp_path):
    sides = {"method": "marsinfer", "settings": {"start_layer": 1}, "scope": "rows"}
    outputs = {
        run_batch: {"output": tmp_path / "out.jsonl"},
        check: sides,
        calibrate: {"out": tmp_path / "profile.toml"},
    }
    first, second = ask(FISH, model=model), ask(FISH, model=model)
    texts = [next(first)["answer"]]
    with pytest.raises(ConfigError, match="is answering other rows: end or close those first"):
        next(second)
    for other in (run_batch, check, calibrate):
        with pytest.raises(ConfigError, match="is answering other rows"):
            other(fish, **outputs[other], model=model, **OPTIONS)
    texts += [row["answer"] for row in first]
    assert [row["answer"] for row in ask(FISH, model=model)] == texts


@pytest.mark.parametrize("name", ["check", "phase"])
def test_what_a_function_of_the_caller_raises_ends_the_run(ask, model, fish, tmp_path, name):
    """It is no error of the row that is being prefilled then."""
    phases = []

    def raising(text=""):
        phases.extend([text] if text else [])
        if phases[-1].startswith("prefilling"):
            raise TimeoutError("enough")

    listening = {"phase": phases.append} | {name: raising}
    with pytest.raises(TimeoutError, match=r"^enough$"):
        list(ask(FISH, model=model, **listening))
    out = tmp_path / "out.jsonl"
    with pytest.raises(TimeoutError, match=r"^enough$"):
        run_batch(fish, out, model=model, **OPTIONS, **listening)
    assert run_batch(fish, out, model=model, resume=True, **OPTIONS).status == {"ok": 3}


def test_a_check_is_ended_by_what_its_caller_raises(model, fish):
    calls = count()

    def raising():
        if next(calls):  # at the first call no row is being run
            raise TimeoutError("enough")

    options = {"method": "marsinfer", "settings": {"start_layer": 1}, "scope": "rows"}
    with pytest.raises(TimeoutError, match=r"^enough$"):
        check(fish, model=model, check=raising, **options, **OPTIONS)


def test_two_iterators_with_models_of_their_own_go_on_side_by_side(ask):
    both = list(zip(ask(FISH), ask(FISH), strict=True))
    assert [one["answer"] for one, _ in both] == [other["answer"] for _, other in both]


@pytest.mark.parametrize("way", ["break", "close", "with"])
def test_what_a_run_held_is_given_back_when_it_is_left_early(ask, model, way):
    from pipeline.model.store import KvStore

    def held():
        return sum(isinstance(each, KvStore) for each in gc.get_objects())

    before = held()
    answers = ask(FISH * 20, model=model)
    if way == "break":
        for _ in answers:
            assert held() > before
            break
        del answers
    elif way == "close":
        next(answers)
        answers.close()
    else:
        with answers:
            next(answers)
    assert held() == before
    assert len(list(ask(FISH, model=model))) == 3  # which is free again


def test_a_model_by_name_is_gone_with_its_answers(ask, monkeypatch):
    from pipeline.model.loading import UnloadedModel

    loaded = []
    load = UnloadedModel.load

    def noticed(self, *of):
        model = load(self, *of)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(UnloadedModel, "load", noticed)
    answers = ask(FISH * 4)
    next(answers)
    assert loaded[0]() is not None
    answers.close()
    assert loaded[0]() is None
