"""Tables in memory to tables in memory: `frame` and `table` of what `pipeline.answer` returns."""

from __future__ import annotations

import pyarrow as pa
import pytest
from conftest import FISH

from pipeline import answer
from pipeline.errors import InputError, TooManyErrors

OPTIONS = {"text_column": "body", "question_column": "ask", "max_new_tokens": 1, "device": "cpu"}
YEARS = [1960, 1961, None]


@pytest.fixture
def ask(model_folder):
    def ask(rows, **options):
        return answer(rows, **{"model": model_folder, **OPTIONS, **options})

    return ask


class Stream:
    """What Arrow knows by its protocol alone."""

    def __arrow_c_stream__(self, requested_schema=None):
        return pa.Table.from_pylist(FISH).__arrow_c_stream__(requested_schema)


OF_ARROW = {
    "table": pa.Table.from_pylist,
    "reader": lambda rows: pa.Table.from_pylist(rows).to_reader(),
    "batch": pa.RecordBatch.from_pylist,
    "structs": pa.array,
    "stream": lambda rows: Stream(),
    "mappings": iter,
    "batches": lambda rows: pa.Table.from_pylist(rows).to_batches(max_chunksize=2),
    "tables": lambda rows: (pa.Table.from_pylist([row], SCHEMA) for row in rows),
}
SCHEMA = pa.Table.from_pylist(FISH).schema


@pytest.mark.parametrize("kind", OF_ARROW)
def test_whatever_holds_rows_becomes_a_table_of_answers(ask, kind):
    answers = ask(OF_ARROW[kind](FISH)).frame()
    assert type(answers) is pa.Table
    assert answers["status"].to_pylist() == ["ok"] * 3
    assert answers["year"].to_pylist() == YEARS
    assert answers["row"].to_pylist() == [0, 1, 2]


def test_who_takes_tables_from_arrow_takes_answers(ask):
    polars = pytest.importorskip("polars")
    assert pa.table(ask(FISH))["year"].to_pylist() == YEARS
    assert polars.DataFrame(ask(FISH))["year"].to_list() == YEARS


def test_a_frame_of_polars(ask):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(FISH).with_columns(kind=polars.Series(["a", "b", "a"], dtype=polars.Categorical))
    answers = ask(frame).frame()
    assert isinstance(answers, polars.DataFrame)
    assert answers["doc"].to_list() == ["a", "b", "c"]
    assert answers["kind"].dtype == polars.Categorical
    assert ask(frame.head(0)).frame().height == 0
    with pytest.raises(InputError, match=r"^rows are of type LazyFrame: collect\(\) it first, or give"):
        ask(frame.lazy())


@pytest.mark.parametrize("order", ["input", "completion"])
def test_a_frame_of_pandas_keeps_its_index(ask, order):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(FISH)
    rows = {
        "as counted": frame,
        "filtered": frame[frame.doc != "b"],
        "named, though it counts": frame.rename_axis("number"),
        "a column": frame.set_index("doc"),
        "two columns": frame.fillna(0).set_index(["doc", "year"]),
        "empty": frame.head(0),
    }
    for name, each in rows.items():
        answers = ask(each, order=order).frame()
        given = each.reset_index()
        assert sorted(answers.reset_index()["doc"]) == sorted(given["doc"]), name
        assert list(answers.index.names) == list(each.index.names), name
        # a row by its label
        assert answers["question"].to_dict() == each["ask"].to_dict(), name


def test_an_index_can_be_the_text_or_be_left_out(ask):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(FISH)
    assert list(ask(frame.set_index("body")).frame().index) == [0, 1, 2]
    assert list(ask(frame.set_index("doc"), keep_columns="year").frame().index) == [0, 1, 2]


def test_frames_one_after_the_other(ask):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(FISH)
    answers = ask(frame.iloc[at : at + 2] for at in (0, 2))
    assert [row["doc"] for row in answers] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (pa.table({"body": ["a"]}), "^table 1 of the rows has other columns than the first: body: string$"),
        (FISH[0], "^item 1 of the rows is of type dict, while those before are tables$"),
    ],
    ids=["other columns", "a mapping"],
)
def test_tables_that_do_not_go_together_are_told_behind_the_answers_before(ask, second, told):
    answers = ask([pa.Table.from_pylist(FISH), second])
    with pytest.raises(InputError, match=told):
        answers.frame()
    assert len(list(answers)) == 3


def test_what_arrow_cannot_hold_is_refused(ask):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(FISH)
    for rows, told in (
        (frame.assign(mixed=["a", 1, None]), "type DataFrame, which Arrow cannot take over as a table: "),
        (pandas.concat([frame, frame], axis=1), "Duplicate column names"),
        (frame["body"], "type Series, which Arrow cannot take over"),
        (pa.array([1]), "type Int64Array, which Arrow cannot take over"),
    ):
        with pytest.raises(InputError, match=told):
            ask(rows)


def test_answers_stay_where_no_table_can_be_made_of_them(ask):
    rows = [{**FISH[0], "mark": 1}, {**FISH[1], "mark": "b"}]
    answers = ask(rows)
    with pytest.raises(InputError, match=r"^the values of 'mark' are no column of a table .*: leave it out"):
        answers.frame()
    assert [row["mark"] for row in answers] == [1, "b"]
    assert ask(rows, keep_columns="doc").frame()["doc"].to_pylist() == ["a", "b"]


def test_answers_stay_where_a_run_ends_early(ask):
    def torn():
        yield from FISH
        raise LookupError("the database is gone")

    for rows, error, options in ((torn(), LookupError, {}), ([*FISH, {}], TooManyErrors, {"max_errors": 0})):
        answers = ask(rows, **options)
        with pytest.raises(error):
            answers.table()
        assert [row.get("doc") for row in answers][:3] == ["a", "b", "c"]


def test_a_table_is_of_all_that_are_left(ask):
    answers = ask(FISH)
    next(answers)
    assert answers.table()["row"].to_pylist() == [1, 2]
    assert answers.table().num_rows == 0


def test_keys_that_are_no_texts_are_columns_too(ask):
    assert ask([{**FISH[0], 3: "x"}]).table()["3"].to_pylist() == ["x"]
