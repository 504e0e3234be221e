"""FastKV against a naive reference written straight from its docstring, head by head."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from conftest import document, pack_of, tiny_model
from naive import (
    Choice,
    Watched,
    assert_same,
    best,
    generated,
    left_out,
    naive_decode,
    naive_prefill,
    pooled,
)

from pipeline.errors import ConfigError
from pipeline.model.prefill import prefill
from pipeline.pruning.fastkv import FastKV

SETTINGS = [
    {"layer": 1, "share": 0.4, "kv_share": 0.2, "window": 4, "pool": 5},
    {"layer": 0, "share": 0.2, "kv_share": 0.5, "window": 8, "pool": 7},
    {"layer": 3, "share": 0.5, "kv_share": 0.1, "window": 1, "pool": 1},
    {"layer": 2, "share": 0.3, "kv_share": 1.0, "window": 6, "pool": 3},
    {"layer": 1, "share": 1.0, "kv_share": 0.3, "window": 6, "pool": 9},
]


def documents():
    """Long, shorter than the window, one token, barely longer than the window."""
    return [document(150), document(5, seed=1), document(1, seed=4), document(71, seed=2), document(9)]


def naive_choice(seen, layer, share, kv_share, window, pool):
    n, kv_heads = len(seen.tokens), len(seen.keys)
    before = max(0, n - window)
    late = list(range(before, n))
    sharing = len(seen.queries) // kv_heads
    by_head = [pooled(row.tolist(), pool) for row in seen.weights[:, before:, :before].sum(1)]
    scores = []  # of each key/value head, where the above is of each query head
    for head in range(kv_heads):
        group = by_head[head * sharing : (head + 1) * sharing]
        scores.append([sum(column) for column in zip(*group, strict=True)])

    def chosen(scores, share):
        return sorted(best(scores, max(0, ceil(share * seen.length) - window))) + late

    live = None
    if seen.layer == layer:
        live = chosen([sum(column) for column in zip(*scores, strict=True)], share)
    return Choice(live=live, cache=[chosen(row, kv_share) for row in scores])


def traces(decoder, settings):
    ids = [torch.from_numpy(doc.input_ids) for doc in documents()]
    return [naive_prefill(decoder, row, lambda seen: naive_choice(seen, **settings)) for row in ids]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_tokens_go_on_and_each_head_stores_its_own(decoder, sdpa, settings):
    watched = Watched(FastKV(**settings))
    prefilled = prefill(decoder, sdpa, watched, pack_of(*documents()))
    expected = traces(decoder, settings)
    for b, trace in enumerate(expected):
        assert_same(trace, watched, prefilled, b)
    after_the_drop = settings["layer"] < 3 and settings["share"] < 1
    assert (left_out(expected) > 0) == after_the_drop
    heads_differ = [first != second for first, second in expected[0].cached]
    assert any(heads_differ) == (settings["kv_share"] < 1)


def test_decoding_goes_on_from_the_original_position(decoder, sdpa):
    settings = SETTINGS[0]
    prefilled = prefill(decoder, sdpa, FastKV(**settings), pack_of(*documents()), new_tokens=12)
    answers = generated(decoder, sdpa, prefilled, 12)
    for doc, trace, answer in zip(documents(), traces(decoder, settings), answers, strict=True):
        assert answer == naive_decode(decoder, trace, doc.prompt_tokens, 12)
    left = traces(decoder, settings)[0]
    assert answers[0] != naive_decode(decoder, left, len(left.entered[-1]), 12)  # the position matters


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_plan_is_what_is_stored(sdpa, settings):
    decoder, method = tiny_model("llama"), FastKV(**settings)
    plan = method.plan(decoder.shape, [doc.prompt_tokens for doc in documents()])
    cache = prefill(decoder, sdpa, method, pack_of(*documents())).cache
    assert plan.cache_tokens == tuple(map(sum, cache.prompt_tokens()))
    assert plan.kv_bytes(itemsize=4) == cache.nbytes


@pytest.mark.parametrize(("depth", "layer"), [(32, 15), (28, 13), (80, 38), (4, 2), (2, 1), (1, 0)])
def test_the_papers_layer_is_scaled_to_the_models_depth(depth, layer):
    assert FastKV().drop_layer(depth) == layer


def test_a_fixed_share_replaces_what_goes_on_and_leaves_the_stored():
    assert FastKV(kv_share=0.3).with_keep((0.5,)) == FastKV(kv_share=0.3, share=0.5)
    with pytest.raises(ConfigError) as caught:
        FastKV().with_keep((0.5, 0.2))
    assert str(caught.value) == "method fastkv keeps one share of the tokens, not 2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": -1}, "layer=-1 is out of range: it must be at least 0"),
        ({"share": 1.5}, "share=1.5 is out of range: it must be between 0 and 1"),
        ({"kv_share": float("nan")}, "kv_share must be a number, not nan"),
        ({"kv_share": -0.5}, "kv_share=-0.5 is out of range: it must be between 0 and 1"),
        ({"window": 0}, "window=0 is out of range: it must be at least 1"),
        ({"pool": 1.5}, "pool=1.5 is a count: give a whole number"),
        ({"pool": 4}, "pool=4 must be odd, so that a score keeps its place"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        FastKV(**settings)
    assert str(caught.value) == message


def test_a_layer_that_the_model_has_not_is_refused():
    with pytest.raises(ConfigError) as caught:
        FastKV(layer=4).plan(tiny_model("llama").shape, [100])
    assert str(caught.value) == "layer=4, and the model has layers 0 to 3"
