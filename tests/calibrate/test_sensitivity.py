"""Layers that are made block-sparse one at a time."""

from __future__ import annotations

import pytest
from conftest import document, tiny_model

from pipeline.calibration.bounds import Bounds
from pipeline.calibration.sensitivity import measure_sensitivity, spread
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.workbench import DENSE, Workbench
from pipeline.model.loading import LoadedModel
from pipeline.settings.parse import Bound
from pipeline.suites.samples import Sample


def loaded(decoder, sdpa):
    return LoadedModel(
        decoder=decoder,
        tokenizer=None,
        attention=sdpa,
        generation_config=None,
        name="tiny",
        fingerprint="random",
    )


def case_of(length, seed):
    answer = tuple(document(12, seed=seed + 50).input_ids[:5].tolist())
    sample = Sample(
        id=str(seed),
        task="data",
        text="",
        question="",
        references=(),
        metric="token_f1",
        document_key=str(seed),
    )
    return CheckRow(
        sample=sample,
        document=document(length, seed=seed, row=seed),
        reference=answer,
        reference_cut=0,
        row_hash="",
    )


CASES = [case_of(length, seed) for seed, length in enumerate((600, 700, 900))]
BOUNDS = Bounds(
    main=Bound(value=2, relative=False), needles=Bound(value=2, relative=False), main_name="agreement"
)


@pytest.fixture
def bench(sdpa):
    sdpa.sparse_from = 1
    return Workbench.of(loaded(tiny_model("qwen2"), sdpa))


def probed(bench, **options):
    cases = [(case, bench.run(DENSE, case, top=20)) for case in CASES]
    return measure_sensitivity(bench, cases, BOUNDS, **{"mass": 0.02, **options})


def test_a_layer_is_made_sparse_alone(bench):
    rows = probed(bench)
    assert [(row.layer, row.mass, row.cases) for row in rows] == [(layer, 0.02, 3) for layer in range(4)]
    assert all(0.8 < row.attended < 0.99 for row in rows[:3])
    # of the last layer only the last token's queries are computed
    assert (rows[3].attended, rows[3].divergence) == (1.0, pytest.approx(0, abs=1e-6))
    assert rows[0].divergence > 1e-6
    assert all(row.divergence >= 0 for row in rows)


def test_a_layer_with_all_mass_is_dense(bench):
    for row in probed(bench, mass=1.0):
        assert (row.attended, row.drop) == (1.0, 0.0)
        assert row.divergence == pytest.approx(0, abs=1e-6)


def test_too_little_time_leaves_gaps_and_no_end(bench):
    turns = iter(range(100))
    rows = probed(bench, within=lambda: next(turns) < 3)
    assert [row.layer for row in rows] == [0, 1, 3]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 28])
def test_layers_are_spread(count):
    order = list(spread(range(count)))
    assert sorted(order) == list(range(count))
    assert order[:2] == [0, count - 1][: len(order)] or count == 1
