"""SlimInfer against a naive reference written straight from its docstring, block by block."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
import torch
from conftest import document, pack_of, tiny_model
from naive import Choice, Watched, assert_same, best, generated, left_out, naive_decode, naive_prefill

from pipeline.errors import ConfigError
from pipeline.model.prefill import prefill
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.sliminfer import SlimInfer

BLOCKS = {"block": 8, "unit": 2, "window": 3}
SETTINGS = [
    {**BLOCKS, "layers": (1, 2, 3), "budget": (0.6, 0.4, 0.2)},
    {**BLOCKS, "layers": (0, 2), "budget": (70.0, 30.0)},
    {"block": 12, "unit": 4, "window": 100, "layers": (1,), "budget": (40.0,)},
    {**BLOCKS, "layers": (3,), "budget": (0.0,)},
]
LLAMA_8B = ModelShape(
    layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256, context=131072
)


def documents():
    """Long, shorter than a block, one token, a multiple of the block, and too short to be dropped from."""
    return [document(150), document(5, seed=1), document(1, seed=4), document(72, seed=2), document(13)]


def naive_choice(seen, layers, budget, block, unit, window):
    if seen.layer not in layers:
        return Choice()
    n = len(seen.tokens)
    query = seen.queries[:, max(0, n - window) :].mean(1)  # (H, d)
    scores = []
    for start in range(0, n, block):
        units = [seen.keys[:, at : at + unit] for at in range(start, min(start + block, n), unit)]
        scores.append(max(unit_score(query, unit_keys) for unit_keys in units))
    tokens = budget[layers.index(seen.layer)]
    tokens = tokens * seen.length if tokens <= 1 else tokens
    scores[0] = scores[-1] = float("inf")
    blocks = best(scores, max(2, ceil(tokens / block)))
    kept = [place for place in range(n) if place // block in blocks]
    return Choice(live=kept, ffn=kept, cache=[kept] * len(seen.keys))


def unit_score(query, keys):
    """Mean over heads of |q.k|, where k is the mean of the unit's keys (K, u, d)."""
    sharing = len(query) // len(keys)
    unit_key = keys.mean(1)
    products = [abs(float(query[head] @ unit_key[head // sharing])) for head in range(len(query))]
    return sum(products) / len(products)


def traces(decoder, settings):
    ids = [torch.from_numpy(doc.input_ids) for doc in documents()]
    return [naive_prefill(decoder, row, lambda seen: naive_choice(seen, **settings)) for row in ids]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_blocks_are_kept_at_every_layer(decoder, sdpa, settings):
    watched = Watched(SlimInfer(**settings))
    prefilled = prefill(decoder, sdpa, watched, pack_of(*documents()))
    expected = traces(decoder, settings)
    for b, trace in enumerate(expected):
        assert_same(trace, watched, prefilled, b)
    assert left_out(expected[:1]) > 0
    assert left_out(expected[1:3] + expected[4:]) == 0  # one block or two always stay


def test_decoding_goes_on_from_the_original_position(decoder, sdpa):
    settings = SETTINGS[0]
    prefilled = prefill(decoder, sdpa, SlimInfer(**settings), pack_of(*documents()), new_tokens=12)
    answers = generated(decoder, sdpa, prefilled, 12)
    for doc, trace, answer in zip(documents(), traces(decoder, settings), answers, strict=True):
        assert answer == naive_decode(decoder, trace, doc.prompt_tokens, 12)
    left = traces(decoder, settings)[0]
    assert answers[0] != naive_decode(decoder, left, len(left.entered[-1]), 12)  # the position matters


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_plan_is_what_is_stored(sdpa, settings):
    decoder, method = tiny_model("llama"), SlimInfer(**settings)
    plan = method.plan(decoder.shape, [doc.prompt_tokens for doc in documents()])
    cache = prefill(decoder, sdpa, method, pack_of(*documents())).cache
    assert plan.cache_tokens == tuple(map(sum, cache.prompt_tokens()))
    assert plan.kv_bytes(itemsize=4) == cache.nbytes


def test_llama_8b_keeps_43_percent_of_the_keys_and_values_of_32768_tokens():
    stored = SlimInfer().plan(LLAMA_8B, [32768]).cache_tokens
    assert stored == (32768,) * 10 + (8192,) * 10 + (4096,) * 10 + (2048,) * 2
    assert sum(stored) / (32 * 32768) == pytest.approx(0.4336, abs=5e-5)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(32, (10, 20, 30)), (28, (9, 18, 26)), (80, (25, 50, 75)), (4, (1, 2, 3)), (2, (1,)), (1, (0,))],
)
def test_the_papers_layers_are_scaled_to_the_models_depth(depth, layers):
    assert SlimInfer().pruning_layers(depth) == layers


def test_a_two_layer_model_prunes_by_the_first_budget():
    method = SlimInfer(budget=(0.5, 0.3, 0.1), block=8)
    assert method.plan(replace(LLAMA_8B, layers=2), [160]).cache_tokens == (160, 80)


def test_one_layer_and_one_budget_need_no_tuple():
    method = SlimInfer(layers=1, budget=0.5, block=8)
    assert method.plan(replace(LLAMA_8B, layers=3), [160]).cache_tokens == (160, 80, 80)


def test_fixed_shares_replace_the_budgets():
    method = SlimInfer(layers=(1, 2))
    assert method.with_keep((0.5,)).plan(LLAMA_8B, [6400]).cache_tokens[:3] == (6400, 3200, 3200)
    assert method.with_keep((0.5, 0.25)) == SlimInfer(layers=(1, 2), budget=(0.5, 0.25))
    with pytest.raises(ConfigError) as caught:
        method.with_keep((2.0,))
    assert str(caught.value) == "share=2.0 is out of range: it must be between 0 and 1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, "block=0 is out of range: it must be at least 1"),
        ({"unit": 0}, "unit=0 is out of range: it must be at least 1"),
        ({"window": 2.0}, "window=2.0 is a count: give a whole number"),
        ({"gamma": 1.5}, "gamma=1.5 is out of range: it must be between 0 and 1"),
        ({"budget": -1.0}, "budget=-1.0 is out of range: it must be at least 0"),
        ({"budget": (0.5, float("nan"))}, "budget must be a number, not nan"),
        ({"budget": float("inf")}, "budget must be a number, not inf"),
        ({"layers": -1}, "layers=-1 is out of range: it must be at least 0"),
        ({"block": 60}, "block=60 must be a multiple of unit=8"),
        ({"layers": (3, 2)}, "layers must ascend, each once"),
        ({"layers": (2, 2)}, "layers must ascend, each once"),
        ({"layers": ()}, "layers names no layer"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        SlimInfer(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (9, 32), "budget": 0.5}, "layers=32, and the model has layers 0 to 31"),
        ({"layers": (1, 2)}, "budget has 3 values for 2 pruning layers"),
        ({"budget": (0.5, 0.2)}, "budget has 2 values for 3 pruning layers"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        SlimInfer(**settings).plan(LLAMA_8B, [100])
    assert str(caught.value) == message
