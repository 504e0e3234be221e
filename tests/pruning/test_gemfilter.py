"""GemFilter against a naive reference written straight from its docstring: two whole passes."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from conftest import document, loaded, pack_of, tiny_model
from naive import Choice, Watched, assert_same, best, generated, naive_decode, naive_prefill, pooled
from torch.utils.flop_counter import FlopCounterMode

from pipeline.engines.local import LocalEngine
from pipeline.errors import ConfigError
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.model.prefill import prefill
from pipeline.pruning.gemfilter import GemFilter
from pipeline.pruning.operations import attended_flops, passes_flops

SETTINGS = [
    {"layer": 1, "keep": 20.0, "pool": 5},
    {"layer": 3, "keep": 0.3, "pool": 3},
    {"layer": 0, "keep": 7.0, "pool": 1},
    {"layer": 2, "keep": 0.0, "pool": 9},
]


def documents():
    """Long, shorter than the pool, one token, a middling one."""
    return [document(150), document(3, seed=1), document(1, seed=4), document(71, seed=2)]


def two_passes(decoder, doc, layer, keep, pool):
    """The chosen tokens, and the trace of the second pass, whose tokens count from 0."""
    ids = torch.from_numpy(doc.input_ids)
    scores = []

    def look(seen):
        if seen.layer == layer:
            scores.extend(last_query_scores(seen))
        return Choice()

    naive_prefill(decoder, ids, look)
    scores = pooled(scores, pool)
    scores[-1] = float("inf")
    chosen = sorted(best(scores, max(1, ceil(keep * len(ids) if keep <= 1 else keep))))
    return chosen, naive_prefill(decoder, ids[chosen], lambda seen: Choice())


def last_query_scores(seen):
    """Of each token, the sum over heads of q.k, without softmax or scaling."""
    sharing = len(seen.queries) // len(seen.keys)
    products = [seen.keys[head // sharing] @ query[-1] for head, query in enumerate(seen.queries)]
    return sum(products).tolist()


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_tokens_are_chosen_and_run_anew(decoder, sdpa, settings):
    watched = Watched(GemFilter(**settings))
    prefilled = prefill(decoder, sdpa, watched, pack_of(*documents()))
    for b, doc in enumerate(documents()):
        chosen, trace = two_passes(decoder, doc, **settings)
        assert watched.restarted[b] == chosen
        assert_same(trace, watched, prefilled, b)
    assert len(watched.restarted[0]) < 150
    assert [len(one_pass.kept) for one_pass in prefilled.passes] == [settings["layer"] + 1, 4]
    assert prefilled.lengths == (150, 3, 1, 71)


def test_decoding_goes_on_from_the_second_pass(decoder, sdpa):
    settings = SETTINGS[0]
    prefilled = prefill(decoder, sdpa, GemFilter(**settings), pack_of(*documents()), new_tokens=12)
    answers = generated(decoder, sdpa, prefilled, 12)
    for doc, answer in zip(documents(), answers, strict=True):
        chosen, trace = two_passes(decoder, doc, **settings)
        assert answer == naive_decode(decoder, trace, len(chosen), 12)
    _, left = two_passes(decoder, documents()[0], **settings)
    assert answers[0] != naive_decode(decoder, left, 150, 12)  # the position matters


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_plan_is_what_is_stored(sdpa, settings):
    decoder, method = tiny_model("llama"), GemFilter(**settings)
    plan = method.plan(decoder.shape, [doc.prompt_tokens for doc in documents()])
    cache = prefill(decoder, sdpa, method, pack_of(*documents())).cache
    assert plan.cache_tokens == tuple(map(sum, cache.prompt_tokens()))
    assert plan.kv_bytes(itemsize=4) == cache.nbytes


def test_prompts_that_all_fit_run_once(sdpa):
    short = pack_of(document(20), document(7, seed=1))
    prefilled = prefill(tiny_model("llama"), sdpa, GemFilter(keep=20.0), short)
    assert [one_pass.kept for one_pass in prefilled.passes] == [[(20, 7)] * 4]
    assert prefilled.work.scored_pairs == [(0, 0)] * 4


def test_prompts_that_fit_run_once_beside_others_too():
    """In packs of their own."""
    method = GemFilter(keep=20.0, layer=3)
    rows = [document(length, seed=seed, row=seed) for seed, length in enumerate((150, 20, 71, 9))]
    told = []
    for options in ({"pack_tokens": 1}, {}):
        rules = StopRules(max_new_tokens=1)
        engine = LocalEngine(loaded(), method, rules=rules, sampling=Sampling(), **options)
        told.append([(row.kept_tokens, row.ffn_ratio, row.flops_ratio) for row in engine.answer(rows)])
    assert told[0] == told[1]
    assert [kept for kept, *_ in told[0]] == [[170] * 4, [20] * 4, [91] * 4, [9] * 4]


def test_operations_are_those_of_the_matrix_products_that_ran(sdpa):
    """Of the layer that chooses, queries, keys and values, and no output of attention."""

    def added(into, one, other, **rest):
        return 2 * one[0] * one[1] * other[1]

    decoder = tiny_model("llama")
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})
    with counter, torch.inference_mode():
        prefilled = prefill(decoder, sdpa, GemFilter(keep=30.0, layer=0), pack_of(document(150)))
    made = counter.get_flop_counts()["Global"]
    (passes,) = prefilled.by_document()
    attended = sum(attended_flops(decoder.shape, work) for layers in passes for work in layers)
    scored = 2 * 150 * decoder.shape.heads * decoder.shape.head_dim
    counted = made[torch.ops.aten.mm] + made[torch.ops.aten.addmm_]
    told = passes_flops(decoder.shape, passes) - attended - scored
    assert counted == pytest.approx(told, rel=0.002)  # the last token's keys are made twice


@pytest.mark.parametrize(("depth", "layer"), [(32, 13), (28, 11), (80, 32), (4, 2), (2, 1), (1, 0)])
def test_the_papers_layer_is_scaled_to_the_models_depth(depth, layer):
    assert GemFilter().filter_layer(depth) == layer


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0.5, 0.2), "method gemfilter keeps one share of the tokens, not 2"),
        ((2.0,), "share=2.0 is out of range: it must be between 0 and 1"),
    ],
)
def test_a_fixed_share_replaces_the_count(shares, message):
    assert GemFilter(pool=3).with_keep((0.5,)) == GemFilter(pool=3, keep=0.5)
    with pytest.raises(ConfigError) as caught:
        GemFilter().with_keep(shares)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": -1}, "layer=-1 is out of range: it must be at least 0"),
        ({"keep": -1.0}, "keep=-1.0 is out of range: it must be at least 0"),
        ({"keep": float("inf")}, "keep must be a number, not inf"),
        ({"pool": 0}, "pool=0 is out of range: it must be at least 1"),
        ({"pool": 1.5}, "pool=1.5 is a count: give a whole number"),
        ({"pool": 4}, "pool=4 must be odd, so that a score keeps its place"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        GemFilter(**settings)
    assert str(caught.value) == message


def test_a_layer_that_the_model_has_not_is_refused():
    with pytest.raises(ConfigError) as caught:
        GemFilter(layer=4).plan(tiny_model("llama").shape, [100])
    assert str(caught.value) == "layer=4, and the model has layers 0 to 3"
