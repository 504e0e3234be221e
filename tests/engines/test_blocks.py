"""Rows on their way to several workers: who gets which, and what a dead one leaves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from conftest import document

from pipeline.engines.blocks import Backlog, Opened, moved, unit_tokens
from pipeline.records import Answer, RowError


def rows(*lengths, together=False):
    """A window of documents of their own, numbered from 0."""
    items = [document(length, seed=n, row=n) for n, length in enumerate(lengths)]
    return Opened.of(items, together=together)


def backlog_of(*windows):
    backlog = Backlog()
    for window in windows:
        backlog.add(window)
    return backlog


def numbers(block):
    return [[item.source.row for item in unit] for unit in block.units]


def tokens_of(block):
    return sum(map(unit_tokens, block.units))


def answers_to(block, count=None):
    items = [item for unit in block.units for item in unit][:count]
    return [Answer.begin(item.source, "dense") for item in items]


def taken(backlog, workers, block_tokens):
    while backlog:
        yield backlog.take(workers, block_tokens)


def test_blocks_are_full_at_first_and_small_at_last():
    sizes = [tokens_of(block) for block in taken(backlog_of(rows(*[100] * 64)), 4, 800)]
    assert sum(sizes) == 6400
    assert sizes[0] == 800
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-4:] == [100] * 4


def test_tokens_are_shared_out_and_not_rows():
    window = rows(*[900] * 2, *[30] * 60)
    sizes = [(tokens_of(block), len(block.units)) for block in taken(backlog_of(window), 2, 10_000)]
    assert sizes[:2] == [(900, 1), (900, 1)]
    assert sum(tokens for tokens, _ in sizes) == 3600


def test_a_document_over_the_share_is_a_block_of_its_own():
    blocks = list(taken(backlog_of(rows(10, 5000, 10)), 8, 100))
    assert numbers(blocks[0]) == [[1]]
    assert sorted(row for block in blocks for (row,) in numbers(block)) == [0, 1, 2]


def test_no_block_has_rows_of_two_windows():
    windows = [rows(*[50] * 3), rows(*[50] * 5)]
    blocks = list(taken(backlog_of(*windows), 1, 10_000))
    assert [(block.window, len(block.units)) for block in blocks] == [(windows[0], 3), (windows[1], 5)]


def test_rows_about_one_document_stay_together():
    asked = document(120, seed=7)
    others = [replace(document(40, seed=n), source=replace(asked.source, row=n)) for n in (1, 2)]
    again = [replace(asked, source=replace(asked.source, row=n)) for n in (3, 4)]
    items = [asked, others[0], again[0], others[1], again[1]]
    blocks = list(taken(backlog_of(Opened.of(items, together=True)), 3, 10_000))
    assert sorted(unit for block in blocks for unit in numbers(block)) == [[0, 3, 4], [1], [2]]
    apart = list(taken(backlog_of(Opened.of(items, together=False)), 3, 10_000))
    assert sorted(unit for block in apart for unit in numbers(block)) == [[0], [1], [2], [3], [4]]


def test_another_window_is_wanted_until_each_worker_finds_a_block():
    backlog = backlog_of(rows(*[50] * 3))
    assert not backlog.wants_more(1, 150)
    assert backlog.wants_more(2, 150)
    assert not backlog_of(rows(*[5] * 256)).wants_more(1, 10**9)


def test_failures_wait_for_the_windows_other_rows():
    failure = RowError(source=document(10, row=9).source, kind="bad", message="m")
    window = Opened.of([failure, document(10, row=0), document(10, row=1)], together=False)
    assert window.finish(1) == []
    assert window.finish(1) == [failure]


def test_what_is_copied_stays_behind_and_comes_back_with_the_answer():
    copied = pa.record_batch({"year": [1960]})
    item = document(30)
    item = replace(item, source=replace(item.source, passthrough=copied))
    block = backlog_of(Opened.of([item], together=True)).take(1, 100)
    ((sent,),) = block.sent()
    assert sent.source.passthrough is None
    np.testing.assert_array_equal(sent.input_ids, item.input_ids)
    (answer,) = block.take([Answer.begin(sent.source, "dense")])
    assert answer.passthrough is copied
    assert block.take([Answer.begin(sent.source, "dense")]) == []  # told twice, counted once


def test_ages_cross_from_one_clock_to_another():
    item = replace(document(30), ready_at=1000.0)
    assert moved(moved(item, -1002.0), 5.0).ready_at == pytest.approx(3.0)


def after_death(block, answered):
    block.take(answers_to(block, answered))
    return block.left()


def test_units_of_a_dead_worker_run_alone():
    block = backlog_of(rows(40, 30, 20, 10)).take(1, 1000)
    (again,), blamed = after_death(block, 1)
    assert blamed is None
    assert again.apart
    assert numbers(again) == [[1], [2], [3]]


def test_the_row_that_was_running_at_the_second_death_is_to_blame():
    block = backlog_of(rows(40, 30, 20, 10)).take(1, 1000)
    (again,), _ = after_death(block, 1)
    (rest,), blamed = after_death(again, 1)
    assert blamed.source.row == 2
    assert not rest.apart
    assert numbers(rest) == [[3]]


def test_rows_about_one_document_are_blamed_one_by_one():
    asked = document(120, seed=7)
    items = [replace(asked, source=replace(asked.source, row=n)) for n in range(3)] + [document(20, row=3)]
    block = backlog_of(Opened.of(items, together=True)).take(1, 1000)
    (again,), _ = after_death(block, 0)
    (divided, rest), blamed = after_death(again, 0)
    assert blamed is None
    assert (numbers(divided), divided.apart) == ([[0], [1], [2]], True)
    assert (numbers(rest), rest.apart) == ([[3]], False)
    _, blamed = after_death(divided, 1)
    assert blamed.source.row == 1


def test_a_worker_that_dies_after_its_last_answer_leaves_nothing():
    block = backlog_of(rows(40, 30)).take(1, 1000)
    assert after_death(block, 2) == ([], None)
