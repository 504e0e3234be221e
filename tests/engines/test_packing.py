"""Windows and packs: what goes together, in what order, and within which bounds."""

from __future__ import annotations

import pytest
from conftest import document

from pipeline.engines.packing import make_packs, windows


def lengths_of(packs):
    return [[doc.prompt_tokens for doc in pack] for pack in packs]


def documents(*lengths):
    return [document(length, row=row) for row, length in enumerate(lengths)]


def test_like_lengths_go_together_longest_first():
    packs = make_packs(documents(10, 60, 20, 50, 30), pack_tokens=80)
    assert lengths_of(packs) == [[60], [50, 30], [20, 10]]


def test_one_token_means_one_document_at_a_time():
    assert lengths_of(make_packs(documents(10, 30, 20), pack_tokens=1)) == [[30], [20], [10]]


def test_equal_lengths_keep_their_rows_order():
    (pack,) = make_packs(documents(10, 10, 10), pack_tokens=100)
    assert [doc.source.row for doc in pack] == [0, 1, 2]


def test_planned_bytes_bound_a_pack_too():
    packs = make_packs(
        documents(10, 10, 10), pack_tokens=100, max_bytes=250, planned_bytes=lambda n: 10 * sum(n)
    )
    assert lengths_of(packs) == [[10, 10], [10]]


def test_no_document_is_lost_or_doubled():
    given = documents(*range(9, 200, 7))
    packs = make_packs(given, pack_tokens=256)
    assert sorted(doc.source.row for pack in packs for doc in pack) == list(range(len(given)))
    assert all(len(pack) == 1 or sum(doc.prompt_tokens for doc in pack) <= 256 for pack in packs)


def test_windows_are_bounded_by_items_and_tokens():
    assert list(windows([1] * 5, int, documents=2)) == [[1, 1], [1, 1], [1]]
    assert list(windows([5, 5, 1, 9, 1], int, tokens=9)) == [[5, 5], [1, 9], [1]]
    assert list(windows([], int)) == []


def test_windows_take_no_more_than_they_give():
    def endless():
        while True:
            yield 1

    assert next(windows(endless(), int, documents=3)) == [1, 1, 1]


@pytest.mark.parametrize("pack_tokens", [1, 50, 1000])
def test_packing_is_the_same_for_any_order_of_arrival(pack_tokens):
    given = documents(10, 40, 20, 40, 30)
    assert lengths_of(make_packs(given, pack_tokens=pack_tokens)) == lengths_of(
        make_packs(given[::-1], pack_tokens=pack_tokens)
    )
