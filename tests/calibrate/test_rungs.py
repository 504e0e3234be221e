"""What a ladder may be made of: masses that probes guide, exits, and published settings."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipeline.calibration.rungs import OTHERS, describe, exchanged, exit_rungs, other_rungs, sparse_rungs
from pipeline.calibration.sensitivity import Sensitivity
from pipeline.pruning.mars import Mars
from pipeline.pruning.shape import ModelShape

SHAPE = ModelShape(layers=8, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=320, context=9000)


def probe(layer, mass, divergence, attended):
    return Sensitivity(
        layer=layer, mass=mass, cases=4, divergence=divergence, drop=20 * divergence, attended=attended
    )


def probes():
    # layers 2 and 5 feel it, 6 and 7 not at all; what 0.9 seems to cost layer 3 beside 0.6 is chance
    costs = {0.9: 0.001, 0.6: 0.01, 0.0: 0.05}
    attended = {0.9: 0.3, 0.6: 0.1, 0.0: 0.02}

    def cost(layer, mass):
        if layer == 3:
            return 0.02 if mass == 0.9 else 0.001
        return costs[mass] * (20 if layer in (2, 5) else 0 if layer >= 6 else 1)

    return [probe(layer, mass, cost(layer, mass), attended[mass]) for layer in range(8) for mass in costs]


def test_layers_that_feel_sparse_attention_keep_more_of_it():
    levels = exchanged(8, probes())
    assert levels[0] == (0.9, 0.9, 1.0, 1.0, 0.9, 1.0, 0.0, 0.0)
    assert levels[-1] == (0.6, 0.6, 0.9, 0.0, 0.6, 0.9, 0.0, 0.0)
    for mild, harsh in pairwise(levels):
        assert all(after <= before for after, before in zip(harsh, mild, strict=True))
    rungs = sparse_rungs(8, probes(), "mixed")
    assert [rung.method for rung in rungs] == [Mars(sparse_attention=masses) for masses in levels]
    assert {rung.linears for rung in rungs} == {"mixed"}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        probes()[:12],  # half of the layers say nothing of the others
        [probe(layer, 0.9, 0.0, 0.3) for layer in range(8)],
        [probe(layer, 0.9, 0.1, 1.0) for layer in range(8)],  # nothing is saved
    ],
)
def test_probes_that_tell_nothing_make_no_rungs(rows):
    assert exchanged(8, rows) == []


@pytest.mark.parametrize(("depth", "layers"), [(28, [26, 23, 20, 18, 13]), (4, [2, 1]), (2, [0]), (1, [0])])
def test_tokens_stop_ever_earlier(depth, layers):
    rungs = exit_rungs(depth, "auto")
    assert [rung.method.last_full for rung in rungs] == layers


def test_other_methods_are_tried_as_published_where_the_model_is_deep_enough():
    rungs = other_rungs(SHAPE, "fp8")
    assert {rung.method.name for rung in rungs} == {*OTHERS} - {"marsinfer"}  # which begins at layer 10
    assert describe(rungs[0]) == f"{rungs[0].method.name} linears:fp8"
    assert {rung.method.name for rung in other_rungs(_deep(), "auto")} == {*OTHERS}


def _deep():
    return ModelShape(layers=28, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=320, context=9000)


def test_values_a_layer_are_told_in_short():
    (rung, *_) = sparse_rungs(8, probes(), "auto")
    assert describe(rung) == "mars sparse_attention=(5 of 8 layers, mean 0.71)"
    assert describe(exit_rungs(4, "auto")[1]) == "mars sparse_attention=none last_full=1"
