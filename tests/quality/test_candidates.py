"""What a calibration may try: settings that probes guide, their kin, and precisions."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipeline.model.shape import ModelShape
from pipeline.quality.candidates import (
    Found,
    Precision,
    describe,
    drop_per_nat,
    greedy,
    make_candidates,
    precisions_of,
)
from pipeline.quality.sensitivity import Sensitivity

SHAPE = ModelShape(layers=8, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=320, context=9000)


def sensitivity(layer, action, rise, saved=0.05, mass=0.9, attended=1.0):
    return Sensitivity(
        layer=layer,
        action=action,
        mass=mass,
        cases=4,
        nll_rise=rise,
        nll_error=0.0,
        divergence=rise,
        drop=20 * rise,
        saved=saved,
        attended=attended,
        passes=(),
    )


def found_of(rows, **options):
    settings = {
        "shape": SHAPE,
        "longest": 9000,
        "mass": 0.9,
        "drop_per_nat": 20.0,
        "budget": 1.0,
        "saved_ms": lambda row: row.saved * 100,
        "fp8": False,
        **options,
    }
    return Found(rows=rows, **settings)


def test_layers_are_spared_by_rise_for_each_ms():
    rises = [0.5, 0.2, 0.02, 0.01, 0.01, 0.0, -0.01, 0.0]
    rows = [sensitivity(layer, "skip", rise) for layer, rise in enumerate(rises)]
    assert drop_per_nat(rows) == pytest.approx(20)
    levels = greedy(found_of(rows))
    assert levels[0] == {5, 6, 7, 4} or levels[0] == {5, 6, 7, 3, 4}
    assert all(mild < harsh for mild, harsh in pairwise(levels))
    assert not any({0} & level for level in levels)
    assert greedy(found_of(rows, saved_ms=lambda row: -1.0)) == []


def test_candidates_of_every_method_fit_the_model_and_know_their_kin():
    rows = [sensitivity(layer, action, 0.01) for layer in range(8) for action in ("skip", "park")]
    candidates = make_candidates(found_of(rows), [Precision()])
    names = {candidate.variant.method.name for candidate in candidates}
    assert names == {"dense", "mars", "marsinfer", "uniprefill", "sliminfer", "fastkv", "gemfilter"}
    assert len({candidate.variant for candidate in candidates}) == len(candidates)
    assert not any(describe(candidate) == "dense" for candidate in candidates)
    mars = [candidate for candidate in candidates if candidate.family == "mars"]
    early, late = (next(c for c in mars if c.settings["last_full"] == layer) for layer in (1, 6))
    assert early.harsher(late)
    assert not late.harsher(early)
    # short prompts are not block-sparse whatever is asked
    short = make_candidates(found_of(rows, longest=1000), [Precision()])
    assert {c.variant.method.sparse_attention for c in short if c.family == "mars"} == {None}
    in_fp8 = make_candidates(found_of(rows), [Precision(linears="fp8")])
    assert "dense linears:fp8" in {describe(candidate) for candidate in in_fp8}


def tried(linears, drop, speed_up):
    return Precision(linears=linears, drop=drop, speed_up=speed_up)


def test_precisions_are_searched_down_to_one_that_costs_nothing():
    own, mixed = Precision(), tried("mixed", 0.5, 1.1)
    free, paid, dear = (tried("fp8", drop, 1.3) for drop in (0.1, 0.4, 3.0))
    assert precisions_of([own], 1.0) == [own]
    assert precisions_of([own, mixed, free], 1.0) == [free]
    assert precisions_of([own, mixed, paid], 1.0) == [paid, mixed, own]
    assert precisions_of([own, mixed, dear], 1.0) == [mixed, own]
    assert precisions_of([own, tried("mixed", 0.05, 1.2), paid], 1.0) == [paid, tried("mixed", 0.05, 1.2)]


def test_a_precision_hardly_faster_than_a_more_exact_one_is_not_searched_with():
    own, mixed = Precision(), tried("mixed", 0.4, 1.2)
    assert precisions_of([own, mixed, tried("fp8", 0.2, 1.22)], 1.0) == [mixed, own]
    assert precisions_of([own, mixed, tried("fp8", 0.2, 1.4)], 1.0)[0].linears == "fp8"


def test_layers_that_feel_sparse_attention_keep_more_of_it():
    # layers 2 and 5 feel it, 6 and 7 not at all; what 0.9 seems to cost layer 3 beside 0.6 is chance
    costs = {0.9: 0.001, 0.6: 0.01, 0.0: 0.05}
    attended = {0.9: 0.3, 0.6: 0.1, 0.0: 0.02}

    def cost(layer, mass):
        if layer == 3:
            return 0.02 if mass == 0.9 else 0.001
        return costs[mass] * (20 if layer in (2, 5) else 0 if layer >= 6 else 1)

    rows = [
        sensitivity(layer, "sparse", cost(layer, mass), mass=mass, attended=attended[mass])
        for layer in range(8)
        for mass in costs
    ]
    candidates = make_candidates(found_of(rows), [Precision()])
    by_layer = [c for c in candidates if c.family == "mars by layer"]
    chosen = [c.variant.method.sparse_attention for c in by_layer]
    assert chosen[0] == (0.9, 0.9, 1.0, 1.0, 0.9, 1.0, 0.0, 0.0)
    assert chosen[-1] == (0.6, 0.6, 0.9, 0.0, 0.6, 0.9, 0.0, 0.0)
    for mild, harsh in pairwise(by_layer):
        assert harsh.harsher(mild)
        assert not mild.harsher(harsh)
        pairs = zip(harsh.variant.method.sparse_attention, mild.variant.method.sparse_attention, strict=True)
        assert all(after <= before for after, before in pairs)
    # half of the layers probed say nothing of the others; short prompts are never block-sparse
    for few in (found_of(rows[:12]), found_of(rows, longest=1000)):
        made = make_candidates(few, [Precision()])
        assert not any(c.family.startswith("mars by layer") for c in made)
