"""Needles of the two sides of a calibration, and right answers that are scored part by part."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engines.answering import rules_of
from pipeline.errors import GateInconclusive, StorageError
from pipeline.evaluate.cases import make_cases, split
from pipeline.evaluate.check_rows import CheckRow, CheckRows, read_rows
from pipeline.evaluate.row_results import RowResult
from pipeline.evaluate.workbench import DENSE, CaseScore, Workbench
from pipeline.model.loading import load_model
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.settings.check_settings import CheckConfig
from pipeline.settings.row_settings import RowSettings
from pipeline.setup.intake import make_prompts
from pipeline.suites.samples import document_key

KINDS = ("single", "multi-value", "multi-query", "tracking")  # which a context of 1,024 bytes holds
TEXTS = ["".join(f"Ship {n} of fleet {fleet} sails. " for n in range(40)) for fleet in range(10)]
FLEET = re.compile(r"of fleet (\d+) sails")


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(str(model_folder), device="cpu")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "ships.jsonl"
    path.write_text("".join(json.dumps({"text": text, "right": "yes"}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def leval(tmp_path):
    folder = tmp_path / "leval"
    folder.mkdir()
    rows = [
        {"input": text, "instructions": ["Who?"], "outputs": ["Bob"], "evaluation": "f1"} for text in TEXTS
    ]
    (folder / "ships.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"leval:{folder}"


@pytest.fixture
def calibrate(tmp_path, model_folder):
    def config(**settings):
        shared = {"suite": ("needles",), "max_new_tokens": 60, **settings}
        needles = {"needle_kinds": KINDS, "needle_lengths": (900,), "needle_count": 10}
        if "needles" in shared["suite"]:
            shared = {**needles, **shared}
        return CalibrateConfig(model=str(model_folder), out=str(tmp_path / "p.toml"), **shared)

    return config


def rows_of(config: RowSettings, model) -> CheckRows:
    return read_rows(config, make_prompts(config, model, config.max_new_tokens))


def fleets(rows):
    return {fleet for row in rows for fleet in FLEET.findall(row.sample.text)}


@pytest.mark.parametrize("haystacks", ["asked", "not asked", "suite"])
def test_needles_hide_in_documents_of_their_own_side(calibrate, model, source, leval, haystacks):
    own = {"input": (str(source),)}
    settings = {
        "asked": {**own, "question": "q", "limit": 9},
        "not asked": {**own, "suite": (leval, "needles")},
        "suite": {"suite": (leval, "needles"), "limit": 5},
    }[haystacks]
    config = calibrate(**settings)
    sides = split(rows_of(config, model).rows, str(config.seed))
    for side, count in ((sides.search, 4), (sides.held_out, 6)):
        tasks = [row.sample.task for row in side if row.sample.side is not None]
        assert tasks == [f"needles-{kind}" for kind in KINDS for _ in range(count)]
        assert any(row.sample.side is None for row in side)
    # rows and haystacks of one side share no document with those of the other
    searched, held_out = fleets(sides.search), fleets(sides.held_out)
    assert min(len(searched), len(held_out)) > 1
    assert searched.isdisjoint(held_out)


def test_nothing_is_measured_where_a_file_is_lost(calibrate, model, source, monkeypatch):
    lost, real = source.with_name("lost.jsonl"), Path.open
    lost.write_bytes(source.read_bytes())

    def fail(self, *mode):
        if self == lost:
            raise PermissionError(13, "Permission denied")
        return real(self, *mode)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(StorageError) as caught:
        rows_of(calibrate(input=(str(source), str(lost)), question="q"), model)
    assert str(caught.value) == f"{lost} cannot be read: Permission denied; nothing was measured"


def test_needles_of_a_check_hide_in_all_documents(model, source, model_folder):
    config = CheckConfig(
        input=(str(source),),
        model=str(model_folder),
        suite=("needles",),
        needle_kinds=("single",),
        needle_lengths=(800,),
        needle_count=40,
    )
    rows = rows_of(config, model).rows
    assert {row.sample.side for row in rows} == {None}
    assert len(fleets(rows)) == len(TEXTS)


@pytest.mark.parametrize(
    ("settings", "of_input"),
    [
        ({"limit_per_task": 1}, 1),
        ({"limit": 2}, 2),
        ({"sample": 2, "shard": "1/2"}, 2),
        ({"tasks": ("ships",), "limit_per_task": 2}, 2),
    ],
)
def test_needles_have_a_count_of_their_own(model, source, model_folder, settings, of_input):
    config = CheckConfig(
        input=(str(source),),
        model=str(model_folder),
        question="q",
        reference_column="right",
        suite=("needles",),
        needle_kinds=("single", "multi-value"),
        needle_lengths=(800,),
        needle_count=3,
        **settings,
    )
    assert Counter(row.task for row in rows_of(config, model).rows) == {
        "ships": of_input,
        "needles-single": 3,
        "needles-multi-value": 3,
    }


@pytest.mark.parametrize(("settings", "count"), [({}, 6), ({"shard": "2/2"}, 3), ({"sample": 2}, 2)])
def test_ids_that_come_again_are_those_of_batch(model, source, model_folder, settings, count):
    ids = ["a", "c#6", "a", "a#2", None, "c", "c"]
    rows = [{"id": id, "text": f"{TEXTS[0]}{n}" if id else ""} for n, id in enumerate(ids)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CheckConfig(input=(str(source),), model=str(model_folder), question="q", **settings)
    found = {row.document.source.place: row.sample.id for row in rows_of(config, model).rows}
    of_all = ["a", "c#6", "a#2", "a#2#3", None, "c", "c#6#6"]
    assert found.items() <= {f"ships.jsonl line {n}": id for n, id in enumerate(of_all, start=1)}.items()
    assert len(found) == count


def test_two_sides_need_two_documents_to_hide_in(calibrate, model, source, leval):
    source.write_text(json.dumps({"text": "A single document. " * 9}))
    config = calibrate(input=(str(source),), suite=(leval, "needles"))
    with pytest.raises(GateInconclusive, match="there is none on the side 'held-out': give more documents"):
        rows_of(config, model)


def test_odd_rows_of_a_suite_are_told(calibrate, model, leval):
    path = f"{leval.removeprefix('leval:')}/ships.jsonl"
    with open(path, "a") as lines:
        lines.write('{"input": "no question"}\n')
    found = rows_of(calibrate(suite=(leval,)), model)
    assert len(found.rows) == len(TEXTS)
    assert found.left_out == (f"{path} line 11: there is no field 'evaluation', which must be a text",)


def test_a_reference_that_is_no_text_is_left_out(calibrate, model, source):
    with source.open("a") as lines:
        lines.write(json.dumps({"text": "Another.", "right": json.dumps(["a \ud83d"])}) + "\n")
    found = rows_of(calibrate(input=(str(source),), reference_column="right", question="q", suite=()), model)
    assert len(found.rows) == len(TEXTS)
    (message,) = found.left_out
    assert message.endswith("the reference has half of a surrogate pair, which is no character")


def test_the_parts_of_a_reference_are_ranges_of_its_tokens(calibrate, model, source):
    for limit in (60, 20):
        config = calibrate(input=(str(source),), question="q", max_new_tokens=limit)
        needles = [row for row in rows_of(config, model).rows if row.sample.side is not None]
        for row in needles:
            reference = row.sample.references[0]
            items = reference.split(", ")
            # a token is a byte, and what lies beyond the limit is not forced
            assert row.reference_cut == max(0, len(reference) - limit)
            starts = [reference.index(item) for item in items]
            ranges = [
                (start, min(start + len(item), limit)) for start, item in zip(starts, items, strict=True)
            ]
            expected = [each for each in ranges if each[0] < limit] if len(items) > 1 else []
            assert list(row.parts) == expected
    # cases take them over
    (case, *_) = make_cases(model, [row], rules_of(config, model))
    assert case.parts == row.parts


def test_parts_are_found_one_by_one(calibrate, model, source):
    config = calibrate(input=(str(source),), question="q", suite=(), limit=2, max_new_tokens=6)
    row = rows_of(config, model).rows[0]
    (case,) = make_cases(model, [row], rules_of(replace(config, max_new_tokens=6), model))
    answer = case.reference
    assert len(answer) > 2
    # the last token is not the one that the model chooses
    wrong = replace(case, reference=(*answer[:-1], (answer[-1] + 1) % 256))
    last = len(answer) - 1
    found = {
        parts: score_of(model, replace(wrong, parts=parts))
        for parts in ((), ((0, 1), (1, last), (last, last + 1)), ((0, 2), (1, last + 1)), ((0, last),))
    }
    assert [score.found for score in found.values()] == [0, 2 / 3, 1 / 2, 1]
    assert {score.correct for score in found.values()} == {last}
    assert score_of(model, case).found == 1
    for score in found.values():
        result = RowResult(row_hash="x", score=replace(score, agreed=last), answer=answer)
        stored = json.loads(json.dumps(result.as_dict()))
        again = RowResult.from_dict(stored, is_dense=False)
        assert (again, again.score.found) == (result, score.found)
    for damage in ({"tokens": 0}, {"correct": 99}, {"agreed": None}, {"nll": math.nan}, {"kv_ratio": None}):
        with pytest.raises((ValueError, TypeError)):
            RowResult.from_dict({**stored, **damage}, is_dense=False)
    with pytest.raises(ValueError, match="cannot reshape"):  # of other tokens than were forced
        RowResult.from_dict({**stored, "choices": [1]}, is_dense=True)


def score_of(model, case: CheckRow) -> CaseScore:
    return Workbench(model=model).run(DENSE, case).score


def test_a_haystack_in_two_rows_counts_once(calibrate, model, source):
    with source.open("a") as lines:
        lines.write(json.dumps({"text": TEXTS[0], "right": "no"}) + "\n")
    config = calibrate(input=(str(source),), reference_column="right", question="q", suite=())
    sides = split(rows_of(config, model).rows, "0")
    keys = [{row.sample.document_key for row in side} for side in (sides.search, sides.held_out)]
    assert (len(keys[0]), len(keys[1])) == (4, 6)
    assert document_key(TEXTS[0]) in keys[0] | keys[1]
