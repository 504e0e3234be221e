"""Probes of single layers: they act where they are told to and nowhere else."""

from __future__ import annotations

import pytest
import torch
from conftest import document, pack_of, tiny_model

from pipeline.errors import ConfigError
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.quality.evaluate import Case
from pipeline.quality.sensitivity import Probe, measure_sensitivity, spread
from pipeline.quality.workbench import DENSE, Workbench

ACTIONS = ("skip", "drop", "park")


def loaded(adapter, sdpa):
    return LoadedModel(
        adapter=adapter,
        tokenizer=None,
        attention=sdpa,
        generation_config=None,
        name="tiny",
        fingerprint="random",
    )


def case_of(length, seed):
    answer = tuple(document(12, seed=seed + 50).input_ids[:5].tolist())
    return Case(
        id=str(seed),
        task="data",
        document_key=str(seed),
        document=document(length, seed=seed, row=seed),
        answer=answer,
    )


CASES = [case_of(length, seed) for seed, length in enumerate((97, 180, 233))]


def bench_of(adapter, sdpa):
    return Workbench.of(loaded(adapter, sdpa))


def probed(bench, **options):
    settings = {"layers": range(4), "actions": ACTIONS, "mass": 0.5, **options}
    dense = [bench.run(DENSE, case, top=20) for case in CASES]
    rows = measure_sensitivity(bench, CASES, dense, **settings)
    return {(row.layer, row.action): row for row in rows}


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("action", ACTIONS)
def test_a_probe_acts_at_its_layer_alone(sdpa, at, action):
    adapter = tiny_model("qwen2")
    pack = pack_of(document(150, seed=1), document(81, seed=2))
    dense = prefill(adapter, sdpa, Dense(), pack)
    probe = prefill(adapter, sdpa, Probe(layer=at, action=action, mass=0.4, window=20), pack)
    for (before,), (after,) in zip(dense.by_document(), probe.by_document(), strict=True):
        assert after[:at] == before[:at]
        if at == 3:  # of the last layer nothing is read that a probe touches
            assert after == before
            continue
        length = before[0].tokens
        assert after[at].tokens == length
        later = after[at + 1 :]
        if action == "skip":
            assert 20 <= after[at].ffn_tokens < length
            assert later == before[at + 1 :]
        elif action == "drop":
            kept = after[at].ffn_tokens
            assert 20 <= kept < length
            assert [(work.tokens, work.parked) for work in later] == [(kept, 0)] * len(later)
        else:
            assert after[at].ffn_tokens == length
            assert {work.tokens + work.parked for work in later} <= {length}
            assert all(20 <= work.tokens < length for work in later)


def test_a_sparse_probe_thins_the_attention_of_its_layer_alone(sdpa):
    sdpa.sparse_from = 1
    adapter, pack = tiny_model("qwen2"), pack_of(document(900, seed=1))
    probe = prefill(adapter, sdpa, Probe(layer=2, action="sparse", mass=0.3), pack)
    ((works,),) = probe.by_document()
    assert [work.pairs is None for work in works] == [True, True, False, True]
    assert works[2].pairs < 900 * 901 // 2
    assert [(work.tokens, work.ffn_tokens) for work in works] == [(900, 900)] * 3 + [(900, 1)]


def test_a_probe_of_all_mass_is_dense(sdpa):
    adapter, pack = tiny_model("llama"), pack_of(document(90))
    dense = prefill(adapter, sdpa, Dense(), pack)
    probe = prefill(adapter, sdpa, Probe(layer=1, action="drop", mass=1.0), pack)
    assert torch.equal(dense.logits_BV, probe.logits_BV)


def test_a_layer_that_adds_nothing_misses_nothing(sdpa):
    adapter = tiny_model("qwen2")
    adapter.model.model.layers[1].mlp.down_proj.weight.data.zero_()
    bench = bench_of(adapter, sdpa)
    rows = probed(bench)
    assert rows[1, "skip"].nll_rise == rows[1, "skip"].nll_error == rows[1, "skip"].drop == 0
    assert rows[1, "skip"].cases == len(CASES)
    assert rows[1, "skip"].divergence == pytest.approx(0, abs=1e-6)
    assert abs(rows[0, "skip"].nll_rise) > 1e-3
    assert rows[0, "skip"].divergence > 1e-4
    # the last layer's feed-forward network matters to the last token alone, and none is left to park for
    for action in ACTIONS:
        assert rows[3, action].nll_rise == pytest.approx(0, abs=1e-6)
    # all that the last layer does with a parked token is to read its keys and values
    assert rows[2, "park"].nll_rise == pytest.approx(0, abs=1e-5)
    assert rows[0, "drop"].saved > rows[2, "drop"].saved > 0
    assert all(len(row.passes) == len(CASES) for row in rows.values())


def test_too_little_time_leaves_gaps_and_no_end(sdpa):
    bench = bench_of(tiny_model("qwen2"), sdpa)
    turns = iter(range(100))
    rows = probed(bench, actions=("skip",), within=lambda: next(turns) < 3)
    assert sorted(layer for layer, _ in rows) == [0, 1, 3]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 28])
def test_layers_are_spread(count):
    order = list(spread(range(count)))
    assert sorted(order) == list(range(count))
    assert order[:2] == [0, count - 1][: len(order)] or count == 1


def test_what_cannot_be_probed_is_refused(sdpa):
    with pytest.raises(ConfigError, match="action=burn: choose from skip, fp8, drop, park"):
        Probe(action="burn")
    with pytest.raises(ConfigError, match="layer=4, and the model has layers 0 to 3"):
        prefill(tiny_model("qwen2"), sdpa, Probe(layer=4), pack_of(document(90)))
