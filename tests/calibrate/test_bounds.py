"""What may be lost, gate by gate, and how many documents that takes to show."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.calibration.bounds import Bounds
from pipeline.errors import GateInconclusive
from pipeline.evaluate.cases import Sides, in_all, split, thin
from pipeline.evaluate.drops import NOTHING_PRUNED, fewest_documents, smallest_bound
from pipeline.settings.parse import Bound

BOUNDS = Bounds(
    main=Bound(value=2, relative=False), needles=Bound(value=5, relative=False), main_name="agreement"
)


def score(document, correct, task="data", tokens=10, kept=0.5):
    found = correct == tokens
    shares = {"ffn_ratio": kept, "attention_ratio": 1.0, "kv_ratio": 1.0}
    return SimpleNamespace(
        task=task, document_key=document, tokens=tokens, correct=correct, found=found, **shares
    )


def test_kinds_of_needles_are_gates_of_their_own_and_documents_weigh_equally():
    rows = [score(f"{n % 100}", 10) for n in range(300)]
    needles = [score(f"n{n}", 10, "needles-single") for n in range(90)]
    dense = [*rows, *needles]
    made = [*rows[:299], score("99", 0)]
    made += [score(f"n{n}", 10 - (n < 9), "needles-single") for n in range(90)]
    main, needles = BOUNDS.verify(dense, made)
    assert (main.gate, needles.gate) == ("agreement", "needles-single")
    assert main.drop.drop == pytest.approx(100 / 300)
    assert (main.drop.rows, main.drop.documents) == (300, 100)
    assert needles.drop.drop == pytest.approx(10)  # one token wrong, and a needle is not found
    assert (main.judgement.bound, needles.judgement.bound) == (2, 5)
    assert BOUNDS.main_drop(dense, made) == pytest.approx(100 / 300)
    assert BOUNDS.main_drop(dense[300:], made[300:]) == 0


def test_a_relative_drop_is_told_in_percent_of_denses():
    bounds = Bounds(main=Bound(value=2, relative=True), needles=BOUNDS.needles, main_name="token accuracy")
    dense, made = [score("a", 5), score("b", 5)], [score("a", 4), score("b", 5)]
    assert bounds.main_drop(dense, made) == pytest.approx(10)
    (gate,) = bounds.verify(dense, made)
    assert gate.drop.drop == pytest.approx(10)


@pytest.mark.parametrize("documents", [1, 6, 60, 183, 368])
def test_the_smallest_bound_of_so_many_documents_takes_no_more_than_these(documents):
    bound = smallest_bound(documents)
    assert fewest_documents(bound) <= documents
    assert fewest_documents(bound - 0.2) > documents


def test_every_gate_needs_documents():
    held_out = [row(document) for document in ("a", "a", "b")] + [row("n", task="needles-single")]
    others = [row("x", task="needles-tracking")]
    main, single, tracking = BOUNDS.supplies(held_out, [*held_out, *others])
    assert (main.gate, main.documents, main.needed, main.is_short) == ("agreement", 2, 183, True)
    assert (single.documents, single.needed) == (1, 72)
    assert (tracking.gate, tracking.documents) == ("needles-tracking", 0)
    assert str(tracking).endswith("; there are 0")
    many = [row(str(n)) for n in range(183)]
    (enough,) = BOUNDS.supplies(many, many)
    assert not enough.is_short
    assert str(enough).endswith("and more if any of them loses; there are 183")


def row(document, number=0, task="data"):
    sample = SimpleNamespace(document_key=document, side=None, id=f"{document}/{number}", task=task)
    return SimpleNamespace(sample=sample, task=task)


def documents_of(rows, task="data"):
    return {row.sample.document_key for row in rows if row.sample.task == task}


@pytest.mark.parametrize(
    ("documents", "searched"),
    [(10, 4), (40, 16), (199, 16), (254, 21), (402, 33), (5000, 48)],
)
def test_no_more_is_searched_on_than_is_of_use_or_can_be_spared(documents, searched):
    rows = [row(str(n), turn) for n in range(documents) for turn in range(2)]
    sides = split(rows)
    assert isinstance(sides, Sides)
    assert len(documents_of(sides.search)) == searched
    assert len(documents_of(sides.held_out)) == documents - searched
    assert not documents_of(sides.search) & documents_of(sides.held_out)
    assert len(sides.search) + len(sides.held_out) == len(rows)


@pytest.mark.parametrize("bound", [1.0, 2.0, 5.0, 20.0, 60.0])
def test_as_many_documents_as_are_asked_for_are_enough(bound):
    needed = fewest_documents(bound)
    rows = [row(str(n)) for n in range(in_all(needed))]
    assert len(documents_of(split(rows).held_out)) >= needed


def test_nothing_passes_where_there_is_nothing_to_lose():
    dense = [score(f"{n}", 0) for n in range(400)]
    (gate,) = BOUNDS.verify(dense, dense)
    assert gate.verdict == "inconclusive"
    assert "no room to lose" in gate.judgement.reason


def test_rows_of_which_nothing_was_pruned_pass_no_gate_but_that_of_a_precision():
    dense = [score(f"{n}", 9, "needles-single" if n % 2 else "data") for n in range(400)]
    short = [score(f"{n}", 9, "needles-single" if n % 2 else "data", kept=1 - n % 2 / 2) for n in range(400)]
    main, needles = BOUNDS.verify(dense, short)
    assert (main.verdict, needles.verdict) == ("inconclusive", "inconclusive")
    assert main.judgement.reason == NOTHING_PRUNED  # though half of all rows were pruned
    assert "no room to lose" in needles.judgement.reason  # which holds whatever was pruned
    assert BOUNDS.verify(dense, short, differs=True)[0].verdict == "pass"
    worse = [score(f"{n}", 0, kept=1.0) for n in range(400)]
    assert BOUNDS.verify(dense, worse)[0].verdict == "fail"


def test_a_single_document_cannot_be_held_out_as_well():
    with pytest.raises(GateInconclusive, match="at least two documents"):
        split([row("a"), row("a", 1)])


def test_every_document_has_a_row_before_any_has_two():
    rows = [row(f"d{n}", turn) for n in range(6) for turn in range(3)]
    rows += [row(f"n{n}", task="needles-single") for n in range(4)]
    few, more = thin(rows, 4), thin(rows, 12)
    assert sorted(each.sample.task for each in few) == ["data"] * 2 + ["needles-single"] * 2
    assert len(documents_of(few)) == 2
    assert len(documents_of(more)) == 6
    assert len(more) == 12
    assert [rows.index(each) for each in more] == sorted(rows.index(each) for each in more)
    assert thin(rows, 0) == []
    assert thin(rows, 99) == rows
