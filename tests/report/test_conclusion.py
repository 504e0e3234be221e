"""The sentence that a report begins with: what it says of enough rows, of too few, and of none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from report_outputs import METADATA, answered, copied, failed, write

from pipeline.report.conclusion import EXACT, median_interval
from pipeline.report.output_reading import opened
from pipeline.report.reporting import make_report

ENOUGH = 250  # rows, of which 2 points can be told


def rows(count, answer, *, reference=None, ms=100.0, **values):
    """Rows of one answer each, or of one that `answer` makes of their number."""
    made = []
    for n in range(count):
        said = answer(n) if callable(answer) else answer
        batch = None if reference is None else copied(reference=reference)
        made.append(answered(n, answer=said, ttft_ms=ms * (1 + n % 7 / 100), passthrough=batch, **values))
    return made


@pytest.fixture
def conclusion(tmp_path):
    """Of outputs with these rows, each under its name."""

    def of(metadata=None, **outputs):
        metadata = metadata or {}
        paths = [
            write(tmp_path / f"{name}.parquet", made, {**METADATA, **metadata.get(name, {})})
            for name, made in outputs.items()
        ]
        with opened([str(path) for path in paths]) as runs:
            return make_report(runs).conclusion

    return of


def test_as_good_and_faster(conclusion):
    found = conclusion(
        dense=rows(ENOUGH, "one fish", reference="one fish", method="dense"),
        pruned=rows(ENOUGH, "one fish", reference="one fish", ms=50.0),
    )
    assert found.verdict == "pass"
    assert found.sentence.startswith(
        "pruned answers as well as dense, within 2 points: token F1 changed by +0.00 points (95% interval -1."
    )
    assert found.sentence.endswith(
        "; its first token comes 2.00 times as fast in the median (95% interval 2.00 to 2.00)."
    )
    assert "references of 250 rows, of 100.0 points in dense and 100.0 in pruned" in found.basis


@pytest.mark.parametrize("names", [("dense", "pruned"), ("a", "dense")])  # whichever is named first
def test_rows_without_an_answer_are_no_good_answers(conclusion, names):
    some = [*rows(ENOUGH, "one fish", reference="one fish"), *(failed(ENOUGH + n) for n in range(50))]
    dense = rows(ENOUGH + 50, "one fish", reference="one fish", method="dense")
    made = [dense if name == "dense" else some for name in names]
    found = conclusion(**dict(zip(names, made, strict=True)))
    assert found.verdict == "inconclusive"
    other = next(name for name in names if name != "dense")
    lost = f"{other} has no answer to 50 rows that dense answers"
    assert found.sentence.startswith(f"{lost}; of the others, {other} answers as well as dense")


def test_worse_and_slower(conclusion):
    found = conclusion(
        dense=rows(ENOUGH, "one fish", reference="one fish", method="dense"),
        pruned=rows(ENOUGH, "red fish", reference="one fish", ms=200.0),
    )
    assert found.verdict == "fail"
    assert found.sentence.startswith("pruned answers worse than dense: token F1 changed by -50.00 points")
    assert "comes later, 0.50 times as fast" in found.sentence


def test_better(conclusion):
    found = conclusion(
        dense=rows(ENOUGH, "red fish", reference="one fish", method="dense"),
        pruned=rows(ENOUGH, "one fish", reference="one fish"),
    )
    assert found.verdict == "pass"
    assert found.sentence.startswith("pruned answers better than dense: token F1 changed by +50.00 points")
    assert "it shows no other speed, its first token coming 1.00 times as fast" in found.sentence


@pytest.mark.parametrize("reference", ["one fish", None])
def test_too_few_rows_tell_nothing(conclusion, reference):
    found = conclusion(
        dense=rows(5, "one fish", reference=reference, method="dense"),
        pruned=rows(5, "one fish", reference=reference, ms=50.0),
    )
    assert found.verdict == "inconclusive"
    assert found.sentence.startswith("5 rows cannot tell whether pruned answers as")
    assert "about 183 documents like these would" in found.sentence
    assert found.sentence.endswith(
        "its first token came 2.00 times as fast in the median, of too few rows to tell."
    )


def test_without_references_the_same_answers_are_as_good(conclusion):
    found = conclusion(dense=rows(ENOUGH, "a", method="dense"), pruned=rows(ENOUGH, "a"))
    assert found.verdict == "pass"
    assert found.sentence.startswith("pruned answers as dense does: 100.0% of the answers are the same")
    assert "no reference" in found.basis


def test_without_references_other_answers_are_not_called_worse(conclusion):
    found = conclusion(
        dense=rows(ENOUGH, "one fish", method="dense"),
        pruned=rows(ENOUGH, lambda n: "one fish" if n % 2 else "no bird"),
    )
    assert found.verdict == "inconclusive"
    assert found.sentence.startswith(
        "pruned answers otherwise than dense, and nothing here tells which is better"
    )
    assert "50.0% of the answers are the same" in found.sentence


def test_scores_that_cannot_fall_tell_nothing(conclusion):
    found = conclusion(
        dense=rows(ENOUGH, "no", reference="one fish", method="dense"),
        pruned=rows(ENOUGH, "not", reference="one fish"),
    )
    assert found.verdict == "inconclusive"
    assert (
        "Nothing tells whether pruned answers as well as dense, for there is no room to lose"
        in found.sentence
    )


def test_the_dense_run_is_what_the_other_is_held_against(conclusion):
    outputs = {
        "pruned": rows(ENOUGH, "red fish", reference="one fish", ms=50.0),
        "dense": rows(ENOUGH, "one fish", reference="one fish", method="dense"),
    }
    found = conclusion(**outputs)
    assert found.sentence.startswith("pruned answers worse than dense: token F1 changed by -50.00")
    assert "2.00 times as fast" in found.sentence


def test_questions_about_one_row_are_one_document(conclusion):
    def of_one(method):
        made = rows(ENOUGH, "a", reference="a", method=method)
        for answer in made:
            answer.row = 0
        return made

    found = conclusion(dense=of_one("dense"), pruned=of_one("sliminfer"))
    assert found.verdict == "inconclusive"
    assert "about 183 documents" in found.sentence


def test_times_of_other_devices_are_not_compared(conclusion):
    found = conclusion(
        {"dense": {"device": "CPU", "model": "a"}, "pruned": {"device": "H100", "model": "b"}},
        dense=rows(9, "a", method="dense"),
        pruned=rows(9, "a", ms=1.0),
    )
    assert found.sentence.endswith("; their times do not compare, as they are of CPU and H100.")
    assert "They are of two models, a and b: more differs than the method." in found.basis


def test_rows_that_cannot_be_compared_are_left_out(conclusion):
    dense, pruned = rows(ENOUGH, "a", method="dense"), rows(ENOUGH, "a")
    pruned[0] = failed(0)
    pruned[1] = answered(1, answer="b", row_hash="other")
    found = conclusion(dense=dense, pruned=pruned)
    assert "100.0% of the answers are the same" in found.sentence
    assert (
        "Left out: 1 row without an answer in one or both, 1 row of another text or question." in found.basis
    )


def test_times_that_rows_share_are_told(conclusion):
    alone = conclusion(dense=rows(9, "a", method="dense"), pruned=rows(9, "a"))
    assert "share one TTFT" not in alone.basis
    packed = conclusion(dense=rows(9, "a", method="dense"), pruned=rows(9, "a", pack_documents=3))
    assert "Rows of a pack share one TTFT" in packed.basis


def test_nothing_in_common(conclusion):
    found = conclusion(dense=[failed(0)], pruned=[answered(0)])
    assert found.verdict == "inconclusive"
    assert found.sentence == "No row has answers in both dense and pruned: there is nothing to compare."


def test_one_output_or_three_have_no_verdict(conclusion):
    alone = conclusion(pruned=rows(3, "a"))
    assert alone.verdict is None
    assert (
        "pruned holds answers to 3 of 3 rows, the first token after 101 ms in the median, " in alone.sentence
    )
    assert alone.sentence.endswith("a report on a dense run and this one tells.")
    assert "Name a pruned run" in conclusion(dense=rows(3, "a", method="dense")).sentence
    assert conclusion(none=[failed(0)]).sentence == "none holds no answer."
    several = conclusion(a=rows(3, "a"), b=rows(3, "a", ms=10.0), c=[failed(0)])
    assert several.sentence.startswith(
        "Of 3 outputs b has the first token soonest, with a median of 10.1 ms."
    )
    assert "None of these 3 outputs" in conclusion(a=[failed(0)], b=[failed(0)], c=[failed(0)]).sentence


@pytest.mark.parametrize(("count", "place"), [(6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (100, 40)])
def test_the_interval_of_a_median_is_between_order_statistics(count, place):
    values = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert median_interval(values) == (place, count + 1 - place)
    missed = 2 * sum(math.comb(count, n) for n in range(place)) / 2**count
    assert missed <= 0.05


def test_few_values_have_no_interval_and_many_the_one_of_the_normal_distribution():
    assert median_interval(np.arange(5.0)) is None
    assert median_interval(np.zeros(0)) is None
    exact = median_interval(np.arange(1.0, EXACT + 1))
    near = median_interval(np.arange(1.0, EXACT + 2))
    assert exact == (469, 532)
    assert abs(near[0] - exact[0]) <= 1


def test_a_method_that_left_nothing_out_shows_nothing(conclusion):
    whole = {"ffn_ratio": 1.0, "attention_ratio": 1.0, "kv_bytes": 400_000, "prompt_tokens": 4_000}
    for reference in ("one fish", None):
        dense = rows(ENOUGH, "one fish", reference=reference, method="dense", **whole)
        found = conclusion(dense=dense, mars=rows(ENOUGH, "one fish", reference=reference, **whole))
        assert found.verdict == "inconclusive"
        assert "Nothing tells whether mars answers as" in found.sentence
        assert "nothing was pruned: the method did to every row what dense does" in found.sentence
    fp8 = {"settings_that_decide": {**METADATA["settings_that_decide"], "model": {"linear_dtype": "fp8"}}}
    mars = rows(ENOUGH, "one fish", **whole)
    assert conclusion({"mars": fp8}, dense=dense, mars=mars).verdict == "pass"


def test_what_differs_beside_the_method_is_told(conclusion):
    made = {"dense": rows(9, "one fish", method="dense"), "pruned": rows(9, "one fish")[:7]}
    other = {"method": {"name": "dense"}, "model": {"fingerprint": "a"}, "max_new_tokens": 8}
    settings = {"method": {"name": "mars"}, "model": {"fingerprint": "a"}, "max_new_tokens": 128}
    about = {"dense": {"settings_that_decide": other}, "pruned": {"settings_that_decide": settings}}
    found = conclusion(about, **made)
    assert "More differs than the method: max_new_tokens is 8 and 128 (dense and pruned)." in found.basis
    assert "Left out: 2 rows that only one of them has." in found.basis
    about["pruned"] = {"settings_that_decide": {**settings, "max_new_tokens": 8}}
    assert "differs" not in conclusion(about, **made).basis
    about["pruned"]["model"] = "large"
    assert "They are of two models, tiny and large" in conclusion(about, **made).basis
