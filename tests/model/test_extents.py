"""Lent parts of a buffer, against a list that says of every slot whose it is."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model.extents import Extents

SIZES = st.integers(1, 30)
DOINGS = st.one_of(
    st.tuples(st.just("take"), SIZES),
    st.tuples(st.just("give back"), st.integers(0, 1000)),
    st.tuples(st.just("compact"), st.just(0)),
)


class Naive:
    """A number for each slot: whose it is, or None."""

    def __init__(self, first, stop):
        self.first, self.owner = first, [None] * (stop - first)
        self.taken = 0  # how often

    def holes(self):
        """(size, start) of each."""
        found, at = [], 0
        for owner, slots in groupby(self.owner):
            count = len(list(slots))
            if owner is None:
                found.append((count, self.first + at))
            at += count
        return found

    def extents(self):
        """Starts and sizes; two that lie side by side have different owners."""
        found, at = {}, 0
        for owner, slots in groupby(self.owner):
            count = len(list(slots))
            if owner is not None:
                found[self.first + at] = count
            at += count
        return found

    def best_fit(self, size):
        return min(((n, start) for n, start in self.holes() if n >= size), default=(0, None))[1]

    def take(self, start, size):
        self.taken += 1
        part = slice(start - self.first, start - self.first + size)
        assert self.owner[part] == [None] * size, "within the buffer, and nobody else's"
        self.owner[part] = [self.taken] * size

    def give_back(self, start):
        owner = self.owner[start - self.first]
        self.owner = [None if other == owner else other for other in self.owner]

    def move(self, move):
        """Slot by slot from the first one on, as a copy that slides down may go."""
        assert move.to < move.start
        begin, end = move.start - self.first, move.to - self.first
        (owner,) = set(self.owner[begin : begin + move.size])
        assert self.owner.count(owner) == move.size  # a whole extent
        for n in range(move.size):
            assert self.owner[end + n] is None, "the slot of an extent that has not moved yet"
            self.owner[begin + n], self.owner[end + n] = None, owner


def check(extents, naive):
    free = naive.owner.count(None)
    assert extents.free == free
    assert extents.taken == len(naive.owner) - free
    assert extents.size == len(naive.owner)
    assert sorted(extents._holes.items()) == sorted((start, n) for n, start in naive.holes())
    assert extents._starts == sorted(extents._holes)
    assert extents._sizes == naive.extents()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 5), st.integers(0, 120), st.lists(DOINGS, max_size=60))
def test_it_does_what_a_list_of_owners_does(first, size, doings):
    extents, naive = Extents(first, first + size), Naive(first, first + size)
    check(extents, naive)
    for what, number in doings:
        if what == "take":
            expected = naive.best_fit(number)
            start = extents.take(number)
            assert start == expected
            if start is not None:
                naive.take(start, number)
        elif what == "give back" and naive.extents():
            starts = sorted(naive.extents())
            start = starts[number % len(starts)]
            extents.give_back(start)
            naive.give_back(start)
        elif what == "compact":
            before = extents.free
            for move in extents.compact():
                naive.move(move)
            # all free slots are one hole, at the end
            assert naive.owner == sorted(naive.owner, key=lambda owner: owner is None)
            assert extents.free == before
            if before:
                assert extents.take(before) == first + size - before
                extents.give_back(first + size - before)
        check(extents, naive)


@settings(max_examples=100, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=12), st.data())
def test_what_is_free_in_total_can_always_be_lent(sizes, data):
    extents = Extents(3, 3 + sum(sizes))
    starts = [extents.take(size) for size in sizes]
    assert None not in starts
    given_back = data.draw(st.lists(st.sampled_from(starts), unique=True, min_size=1))
    for start in given_back:
        extents.give_back(start)
    free = extents.free
    extents.compact()
    assert extents.take(free) == 3 + sum(sizes) - free
    assert extents.take(1) is None


def test_the_smallest_hole_that_holds_an_extent_is_taken():
    extents = Extents(0, 20)
    starts = [extents.take(size) for size in (5, 1, 3, 1, 4, 1)]
    assert starts == [0, 5, 6, 9, 10, 14]  # and five slots are left behind them
    for start in (0, 6, 10):
        extents.give_back(start)
    assert [extents.take(size) for size in (3, 4, 5, 5, 1)] == [6, 10, 0, 15, None]


def test_moves_may_overlap_and_are_made_in_the_order_of_places():
    extents = Extents(0, 20)
    for size in (2, 8, 6):
        extents.take(size)
    extents.give_back(0)
    assert extents.compact() == [(2, 0, 8), (10, 8, 6)]
    assert extents.compact() == []
    extents.give_back(8)
    assert extents.take(12) == 8


@pytest.mark.parametrize("size", [0, -1])
def test_an_extent_has_a_slot(size):
    with pytest.raises(AssertionError, match="no slots"):
        Extents(0, 5).take(size)


def test_a_buffer_of_no_slots_lends_none():
    extents = Extents(4, 4)
    assert (extents.free, extents.size, extents.take(1), extents.compact()) == (0, 0, None, [])
