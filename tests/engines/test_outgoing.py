"""Answers on their way to the journal: in small batches, failures behind the rows of their window."""

from __future__ import annotations

from conftest import document

from pipeline.engines import one_process
from pipeline.engines.one_process import Outgoing
from pipeline.records import Answer, Row, RowError


def failure(row):
    return RowError(source=Row(row=row, id=str(row), place=f"row {row}"), kind="bad", message="bad")


def answered(row):
    return Answer(id=str(row), row=row)


def rows(batches):
    return [[answer.row for answer in batch] for batch in batches]


def test_answers_wait_for_others_but_not_long(clock):
    out = Outgoing("dense")
    out.expect([document(20, row=row) for row in range(3)])
    out.put(answered(1))
    assert rows(out.due()) == []
    clock.now += one_process.MOST_S - 0.01
    out.put(answered(0))
    assert rows(out.due()) == []
    clock.now += 0.01
    assert rows(out.due()) == [[1, 0]]
    out.put(answered(2))
    assert rows(out.due()) == []  # it has just come
    assert rows(out.rest()) == [[2]]
    assert rows(out.rest()) == []


def test_many_answers_do_not_wait(clock):
    out = Outgoing("dense")
    count = out.most_rows = 7
    out.expect([document(20, row=row) for row in range(count)])
    for row in range(count - 1):
        out.put(answered(row))
    assert rows(out.due()) == []
    out.put(answered(count - 1))
    assert rows(out.due()) == [list(range(count))]


def test_failures_come_behind_the_last_row_of_their_window(clock):
    out = Outgoing("dense")
    out.expect([failure(0), document(20, row=1), failure(2), document(20, row=3)])
    out.expect([document(20, row=4), failure(5)])
    out.put(answered(3))
    out.put(answered(4))  # whose window is complete
    out.put(None)  # a part of a row
    assert rows(out.rest()) == [[3, 4, 5]]
    out.put(answered(1))
    (batch,) = out.rest()
    assert [(answer.row, answer.status) for answer in batch] == [(1, "ok"), (0, "error"), (2, "error")]


def test_a_window_of_failures_alone_waits_for_nobody(clock):
    out = Outgoing("dense")
    out.expect([failure(0), failure(1)])
    assert rows(out.rest()) == [[0, 1]]
