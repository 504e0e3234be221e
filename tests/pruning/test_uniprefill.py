"""UniPrefill against a naive reference written straight from its docstring, block by block."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from conftest import document, pack_of, tiny_model
from naive import Choice, Watched, assert_same, best, generated, left_out, naive_decode, naive_prefill

from pipeline.errors import ConfigError
from pipeline.model.prefill import prefill
from pipeline.pruning.uniprefill import UniPrefill

SMALL = {"first_layer": 0, "every": 1, "block": 8, "sink": 5, "window": 7, "share": None}
SETTINGS = [
    {**SMALL, "p": 0.3},
    {**SMALL, "p": 0.8, "first_layer": 1, "every": 2},
    {**SMALL, "p": 0.9, "sink": 0, "window": 1, "block": 3},
    {**SMALL, "p": 0.99, "share": 0.3, "every": 2},
    {**SMALL, "p": 0.99, "share": (0.6, 0.4)},
    {**SMALL, "p": 0.5, "heads": "max"},
]


def documents():
    """Long, shorter than the window, one token, a multiple of the block."""
    return [document(150), document(5, seed=1), document(1, seed=4), document(72, seed=2)]


def naive_choice(seen, first_layer, every, p, share, block, sink, window, heads="mean"):
    if seen.layer < first_layer or (seen.layer - first_layer) % every:
        return Choice()
    n = len(seen.tokens)
    by_head = seen.weights[:, max(0, n - window) :].mean(dim=1)
    importance = (by_head.amax(0) if heads == "max" else by_head.mean(0)).tolist()
    means = []
    for start in range(0, n, block):
        part = importance[start : start + block]
        means.append(sum(part) / len(part))
    if share is None:
        blocks = smallest_set(means, p)
    else:
        shares = share if isinstance(share, tuple) else (share,)
        drop = (seen.layer - first_layer) // every
        blocks = best(means, ceil(shares[min(drop, len(shares) - 1)] * seen.length / block))
    late = seen.length - window
    kept = [
        place
        for place, token in enumerate(seen.tokens)
        if place // block in blocks or token < sink or token >= late
    ]
    return Choice(live=kept, ffn=kept)


def smallest_set(means, p):
    chosen, mass = set(), 0.0
    for block in sorted(range(len(means)), key=lambda block: -means[block]):
        if mass >= p * sum(means):
            break
        chosen.add(block)
        mass += means[block]
    return chosen


def traces(decoder, settings):
    ids = [torch.from_numpy(doc.input_ids) for doc in documents()]
    return [naive_prefill(decoder, row, lambda seen: naive_choice(seen, **settings)) for row in ids]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_blocks_are_kept_at_every_layer(decoder, sdpa, settings):
    watched = Watched(UniPrefill(**settings))
    prefilled = prefill(decoder, sdpa, watched, pack_of(*documents()))
    expected = traces(decoder, settings)
    for b, trace in enumerate(expected):
        assert_same(trace, watched, prefilled, b)
    assert left_out(expected[:1]) > 0
    assert left_out(expected[2:3]) == 0  # a lone token stays


def test_decoding_goes_on_from_the_original_position(decoder, sdpa):
    settings = SETTINGS[1]
    prefilled = prefill(decoder, sdpa, UniPrefill(**settings), pack_of(*documents()), new_tokens=12)
    answers = generated(decoder, sdpa, prefilled, 12)
    for doc, trace, answer in zip(documents(), traces(decoder, settings), answers, strict=True):
        assert answer == naive_decode(decoder, trace, doc.prompt_tokens, 12)
    left = traces(decoder, settings)[0]
    assert answers[0] != naive_decode(decoder, left, len(left.entered[-1]), 12)  # the position matters


def test_the_dropping_layer_stores_all_tokens_that_entered_it(sdpa):
    method = UniPrefill(**SMALL, p=0.3)
    prefilled = prefill(tiny_model("llama"), sdpa, method, pack_of(*documents()))
    assert prefilled.cache.prompt_tokens() == [list(lengths) for lengths in prefilled.work.kept]
    assert sum(prefilled.work.kept[1]) < sum(prefilled.work.kept[0])


def test_a_mass_of_one_keeps_all_without_asking(sdpa):
    prefilled = prefill(tiny_model("llama"), sdpa, UniPrefill(**SMALL, p=1.0), pack_of(*documents()))
    assert prefilled.work.kept == [(150, 5, 1, 72)] * 4
    assert prefilled.work.scored_pairs == [(0, 0, 0, 0)] * 4


def test_protected_tokens_come_on_top_of_a_share(sdpa):
    method = UniPrefill(**{**SMALL, "share": 0.0, "first_layer": 1})
    work = prefill(tiny_model("llama"), sdpa, method, pack_of(*documents())).work
    assert work.kept == [(150, 5, 1, 72)] * 2 + [(12, 5, 1, 12)] * 2


def test_fixed_shares_replace_the_mass():
    assert UniPrefill(p=0.9).with_keep((0.5, 0.25)) == UniPrefill(p=0.9, share=(0.5, 0.25))
    with pytest.raises(ConfigError) as caught:
        UniPrefill().with_keep((2.0,))
    assert str(caught.value) == "share=2.0 is out of range: it must be between 0 and 1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_layer": -1}, "first_layer=-1 is out of range: it must be at least 0"),
        ({"every": 0}, "every=0 is out of range: it must be at least 1"),
        ({"block": 0}, "block=0 is out of range: it must be at least 1"),
        ({"window": 0}, "window=0 is out of range: it must be at least 1"),
        ({"window": 1.5}, "window=1.5 is a count: give a whole number"),
        ({"p": -0.1}, "p=-0.1 is out of range: it must be between 0 and 1"),
        ({"p": 1.5}, "p=1.5 is out of range: it must be between 0 and 1"),
        ({"p": float("nan")}, "p must be a number, not nan"),
        ({"share": 1.5}, "share=1.5 is out of range: it must be between 0 and 1"),
        ({"share": (0.5, -1)}, "share=-1 is out of range: it must be between 0 and 1"),
        ({"sink": -1}, "sink=-1 is out of range: it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        UniPrefill(**settings)
    assert str(caught.value) == message
