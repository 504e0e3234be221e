"""FrugalPrompt against a naive reference written straight from its docstring: two passes over one text."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, inf

import pytest
import torch
from conftest import document, pack_of, tiny_model
from naive import Choice, Watched, assert_same, best, generated, naive_decode, naive_prefill

from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.frugal import Frugal
from pipeline.records import Spans

SETTINGS = [
    {"keep": 0.5, "layer": 1, "judges": 1024, "sink": 3, "window": 4, "most": 16},
    {"keep": 0.3, "layer": 0, "judges": 7, "sink": 0, "window": 1, "most": 2},
    {"keep": 0.8, "layer": 3, "judges": 40, "sink": 9, "window": 12, "most": 12},
]


def documents():
    """Long with the question in front, short, one token, a middling one."""
    ahead = Spans(document=(30, 146), question=(20, 28))
    return [
        replace(document(150), spans=ahead),
        document(9, seed=1),
        document(1, seed=4),
        document(71, seed=2),
    ]


def two_passes(decoder, doc, *, keep, layer, judges, sink, window, most):
    """The tokens that stay, and the trace of the text that they make."""
    ids, length = torch.from_numpy(doc.input_ids), doc.prompt_tokens
    salience = [0.0] * length

    def look(seen):
        if seen.layer <= layer:
            own = judged(seen.weights.mean(0).tolist(), judges)
            salience[:] = [before + more for before, more in zip(salience, own, strict=True)]
        return Choice()

    naive_prefill(decoder, ids, look)
    (begin, end), (asked, stop) = doc.spans.document, doc.spans.question
    last = min(length, max(window, min(length - end, most)))
    always = {
        *range(sink),
        *range(begin - most, begin),
        *range(max(asked, stop - most), stop),
        *range(length - last, length),
    } & set(range(length))
    others = [t for t in range(length) if t not in always]
    chosen = best([salience[t] for t in others], ceil(keep * len(others)))
    kept = sorted(always | {others[place] for place in chosen})
    return kept, naive_prefill(decoder, ids[kept], lambda seen: Choice())


def judged(weights_TT, judges):
    """Of each token, the mean of what its judges attend to it, relative to attending to all alike."""
    length = len(weights_TT)
    apart = ceil(length / judges)
    places = range(length - 1, -1, -apart)
    found = []
    for token in range(length):
        own = [weights_TT[judge][token] * (judge + 1) for judge in places if judge - token >= apart]
        found.append(sum(own) / len(own) if own else inf)
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_tokens_are_chosen_and_read_as_a_text(sdpa, settings):
    decoder = tiny_model("qwen3")
    watched = Watched(Frugal(**settings))
    prefilled = prefill(decoder, sdpa, watched, pack_of(*documents()), new_tokens=6)
    answers = generated(decoder, sdpa, prefilled, 6)
    for b, doc in enumerate(documents()):
        kept, trace = two_passes(decoder, doc, **settings)
        assert watched.restarted[b] == kept
        assert_same(trace, watched, prefilled, b)
        assert answers[b] == naive_decode(decoder, trace, len(kept), 6)
    assert len(watched.restarted[0]) < 140
    assert {*range(20, 28), *range(146, 150)} - set(watched.restarted[0]) <= {*range(20, 26)}
    assert [len(one_pass.kept) for one_pass in prefilled.passes] == [settings["layer"] + 1, 4]
    planned = Frugal(**settings).plan(decoder.shape, prefilled.lengths).cache_tokens
    assert all(sum(own) <= bound for own, bound in zip(prefilled.cache.prompt_tokens(), planned, strict=True))


@pytest.mark.parametrize("keep", [1.0, 0.999])
def test_a_text_that_stays_equals_dense_in_float64(keep):
    """Also where the prefill did restart, with all tokens, since counts are rounded up."""
    decoder, sdpa = Decoder(tiny_model("qwen2").model.double()), SdpaAttention()
    pack = pack_of(*documents())
    dense = prefill(decoder, sdpa, Dense(), pack)
    whole = prefill(decoder, sdpa, Frugal(keep=keep, layer=1), pack)
    assert len(whole.passes) == (1 if keep == 1 else 2)
    assert (whole.logits_BV - dense.logits_BV).abs().max() <= 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.5}, "keep=1.5 is out of range: it must be between 0 and 1"),
        ({"judges": 0}, "judges=0 is out of range: it must be at least 1"),
        ({"most": 16}, "most=16 is less than sink=32"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        Frugal(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(("depth", "layer"), [(32, 3), (28, 3), (80, 8), (4, 0), (1, 0)])
def test_the_layer_is_scaled_to_the_models_depth(depth, layer):
    assert Frugal().last_judging(depth) == layer
