"""A draft's reading of prompts: how its steps are run, and that the host waits for none of them."""

from __future__ import annotations

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from conftest import document, pack_of, tiny_model

from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend, SdpaAttention
from pipeline.kernels.scoring import look_ahead_importance
from pipeline.kernels.segments import Segments
from pipeline.model.cache import RaggedCache
from pipeline.model.pack import Pack
from pipeline.model.reading_ahead import read_ahead
from pipeline.pruning.speculative import Speculative


class Draft(NamedTuple):
    decoder: Decoder
    attention: AttentionBackend = SdpaAttention()


def method(look_ahead, **changed):
    return Speculative(keep=0.3, chunk=8, look_ahead=look_ahead, sink=3, window=4, most=16, **changed)


def reading(look_ahead):
    pack = pack_of(document(150), document(9, seed=1), document(71, seed=2))
    with torch.inference_mode():
        return read_ahead(Draft(tiny_model("qwen2", seed=7)), method(look_ahead), pack)


def test_the_drafts_memory_is_given_back_at_once(monkeypatch):
    """Nothing holds the keys and values in a circle, until garbage is collected."""
    caches = []

    def noted(*arguments):
        cache = RaggedCache(*arguments)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr("pipeline.model.reading_ahead.RaggedCache", noted)
    gc.disable()
    try:
        made = reading(8)
        assert [cache() for cache in caches] == [None]
        assert len(made.chosen_C)
    finally:
        gc.enable()


def test_the_draft_computes_of_its_last_layer_only_what_is_scored():
    work = reading(8).work
    assert work.last_only == [False, False, False, True]
    assert work.scored_pairs == [(8 * 150, 8 * 9, 8 * 71)] * 4  # the eight tokens behind each document


class Stops(Speculative):
    """Stands in for the choice, in which the host waits once, for the tokens that were chosen."""

    def chosen(self, scores_ST, segments, protected_T):
        with pytest.raises(NotImplementedError, match="nonzero"):  # of a tensor without data
            super().chosen(scores_ST, segments, protected_T)
        assert scores_ST.shape == (1 + self.look_ahead, segments.total)
        return torch.arange(3, device=scores_ST.device)


def test_the_host_waits_for_nothing_before_the_choice():
    """On tensors without data, of which nothing can be read."""
    decoder = Decoder(tiny_model("qwen2").model.to("meta"))
    own = pack_of(document(150), document(9, seed=1))
    pack = Pack(
        input_ids=own.input_ids.to("meta"), segments=Segments.of(own.lengths, "meta"), spans=own.spans
    )
    with torch.inference_mode():
        made = read_ahead(Draft(decoder), Stops(look_ahead=8, window=4), pack)
    assert made.look_ahead == 8


@pytest.mark.parametrize("at_once", [1, 4000, 1 << 22])
def test_attention_of_several_layers_is_that_of_each(monkeypatch, at_once):
    monkeypatch.setattr("pipeline.kernels.scoring.AHEAD_AT_ONCE", at_once)
    drawn = torch.Generator().manual_seed(0)
    layers, steps, length = 3, 2, 40
    q_NSHd = torch.randn(layers, steps, 6, 8, generator=drawn)
    keys = [torch.randn(length + steps, 2, 8, generator=drawn) for _ in range(layers)]
    expected_ST = torch.zeros(steps, length)
    for q_SHd, k_LKd in zip(q_NSHd, keys, strict=True):
        for step in range(steps):
            seen = length + step + 1
            scores_HL = torch.einsum("hd,lhd->hl", q_SHd[step], k_LKd[:seen].repeat_interleave(3, 1)) / 8**0.5
            weights_HT = scores_HL.softmax(-1)[:, :length]
            padded_HT = torch.nn.functional.pad(weights_HT, (2, 2))
            pooled_HT = sum(padded_HT[:, place : place + length] for place in range(5)) / 5
            expected_ST[step] = torch.maximum(expected_ST[step], pooled_HT.amax(0))
    assert torch.allclose(look_ahead_importance(q_NSHd, keys, 5), expected_ST, atol=1e-6)
