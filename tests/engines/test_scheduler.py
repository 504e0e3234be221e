"""The policy of an engine: who is prefilled when, in plain numbers."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines.scheduler import Room, Scheduler, Waiting, WaitingPack


def pack(*rows, alone=False):
    """Of rows given as (name, slots) or (name, slots, tokens)."""
    waiting = [Waiting(row=row[0], slots=row[1], tokens=row[-1]) for row in rows]
    return WaitingPack(rows=tuple(waiting), alone=alone)


def names(found):
    return None if found is None else [waiting.row for waiting in found.rows]


def scheduler(*packs, in_flight=8, worthwhile=1):
    made = Scheduler(in_flight=in_flight, worthwhile=worthwhile)
    made.add(packs)
    return made


def test_packs_come_in_the_order_in_which_they_were_added():
    queue = scheduler(pack(("a", 5), ("b", 5)), pack(("c", 5)))
    assert names(queue.next(Room(running=0, slots=100))) == ["a", "b"]
    queue.add([pack(("d", 5))])
    queue.put_back([pack(("x", 5)), pack(("y", 5))])
    found = [names(queue.next(Room(running=0, slots=100))) for _ in range(4)]
    assert found == [["x"], ["y"], ["c"], ["d"]]
    assert queue.next(Room(running=0, slots=100)) is None
    assert not queue


def test_a_full_store_waits_for_rows_to_leave():
    queue = scheduler(pack(("a", 50), ("b", 50)))
    assert queue.next(Room(running=3, slots=49)) is None
    assert names(queue.next(Room(running=3, slots=99))) == ["a"]
    assert names(queue.next(Room(running=3, slots=50))) == ["b"]


def test_a_part_of_a_pack_is_let_in_where_it_is_worth_a_prefill():
    rows = [(name, 10, 100) for name in "abcd"]
    queue = scheduler(pack(*rows), worthwhile=250)
    assert queue.next(Room(running=1, slots=29)) is None  # two rows, 200 tokens
    assert names(queue.next(Room(running=1, slots=30))) == ["a", "b", "c"]
    assert names(queue.next(Room(running=1, slots=10))) == ["d"]  # all of what is left of the pack
    queue = scheduler(pack(*rows), worthwhile=250)
    assert names(queue.next(Room(running=0, slots=10))) == ["a"]  # nobody else would leave room


def test_each_answer_to_a_row_is_in_flight():
    rows = tuple(Waiting(row=row, slots=1, tokens=1, answers=row) for row in (3, 2, 4, 1, 6))
    queue = scheduler(WaitingPack(rows=rows), in_flight=5)
    assert names(queue.next(Room(running=0, slots=100))) == [3, 2]
    assert queue.next(Room(running=2, slots=100)) is None
    assert names(queue.next(Room(running=1, slots=100))) == [4]
    assert names(queue.next(Room(running=4, slots=100))) == [1]
    assert queue.next(Room(running=1, slots=100)) is None
    found = queue.next(Room(running=0, slots=100))
    assert (names(found), found.alone) == ([6], True)  # of more answers than are decoded together


def test_no_more_rows_run_than_may_be_in_flight():
    queue = scheduler(pack(*[(n, 1) for n in range(10)]), in_flight=4)
    assert names(queue.next(Room(running=1, slots=100))) == [0, 1, 2]
    assert queue.next(Room(running=4, slots=100)) is None


def test_what_runs_alone_waits_for_an_empty_batch_and_is_not_overtaken():
    queue = scheduler(pack(("huge", 0), alone=True), pack(("small", 1)))
    assert queue.next(Room(running=1, slots=100)) is None
    found = queue.next(Room(running=0, slots=100))
    assert (names(found), found.alone) == (["huge"], True)
    assert names(queue.next(Room(running=0, slots=100))) == ["small"]


def test_a_row_that_fits_no_empty_store_runs_alone():
    queue = scheduler(pack(("large", 101), ("small", 1)))
    assert queue.next(Room(running=1, slots=90)) is None
    found = queue.next(Room(running=0, slots=100))
    assert (names(found), found.alone) == (["large"], True)
    found = queue.next(Room(running=0, slots=100))
    assert (names(found), found.alone) == (["small"], False)


def test_packs_can_be_taken_off_the_queue():
    queue = scheduler(pack(("a", 1)), pack(("b", 1)), pack(("c", 1)))
    assert [names(each) for each in queue.remove(lambda each: each.rows[0].row != "b")] == [["a"], ["c"]]
    assert queue.tokens == 1
    assert names(queue.first) == ["b"]
    queue.next(Room(running=0, slots=1))
    assert queue.first is None


def test_a_batch_without_rows_is_refused():
    with pytest.raises(AssertionError, match="no row could ever run"):
        Scheduler(in_flight=0)


ROWS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), max_size=30)


@settings(deadline=None)
@given(
    rows=ROWS,
    slots=st.integers(1, 60),
    in_flight=st.integers(1, 6),
    worthwhile=st.integers(1, 80),
    per_pack=st.integers(1, 5),
)
def test_every_row_runs_whatever_comes(rows, slots, in_flight, worthwhile, per_pack):
    """Rows of so many slots and steps: the store never holds more than it can, and none is left out."""
    waiting = [(n, need, need) for n, (need, _) in enumerate(rows)]
    packs = [pack(*waiting[at : at + per_pack]) for at in range(0, len(waiting), per_pack)]
    queue = scheduler(*packs, in_flight=in_flight, worthwhile=worthwhile)
    running, begun = deque(), []
    steps = 0
    while queue or running:
        used = sum(rows[n][0] for n, _ in running)
        found = queue.next(Room(running=len(running), slots=slots - used))
        if found is None:
            assert running, "nothing runs, and nothing is let in"
            running = deque((n, left - 1) for n, left in running if left > 1)
        elif found.alone:
            assert not running
            assert len(found.rows) == 1
            assert found.rows[0].slots > slots
            begun += names(found)
        else:
            running.extend((n, rows[n][1]) for n in names(found))
            begun += names(found)
            assert len(running) <= in_flight
            assert sum(rows[n][0] for n, _ in running) <= slots
        steps += 1
        assert steps < 10_000
    assert begun == list(range(len(rows)))
