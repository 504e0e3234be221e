"""The model's last layer, of which only the last token is read: the same logits, keys and values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import pytest
import torch
from conftest import document, pack_of, tiny_model

from pipeline.doctor.selftest import full, small
from pipeline.errors import MarsError
from pipeline.kernels import sparse
from pipeline.kernels.attention import SdpaAttention
from pipeline.model import layers as module
from pipeline.model.prefill import prefill
from pipeline.pruning.base import KEEP_ALL, PruningMethod, Selection
from pipeline.pruning.dense import Dense
from pipeline.pruning.fastkv import FastKV
from pipeline.pruning.gemfilter import GemFilter
from pipeline.pruning.mars import Mars
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.pruning.operations import (
    LayerWork,
    attended_pairs,
    attention_ratio,
    dense_flops,
    dense_work,
    ffn_ratio,
    kept_ratio,
    layer_flops,
    passes_flops,
)
from pipeline.pruning.registry import make_method, method_class, method_names
from pipeline.pruning.sliminfer import SlimInfer
from pipeline.pruning.uniprefill import UniPrefill
from pipeline.pruning.unrotated import UnrotatedMethod

SELECTING = [name for name in method_names() if not issubclass(method_class(name), UnrotatedMethod)]

pytestmark = pytest.mark.slow

LENGTHS = (120, 9, 64)
RESTARTING = ("frugal", "gemfilter")
# settings with which the last of four layers does nothing of its own
EASY = {
    "fastkv": {"layer": "1", "share": "0.5", "kv_share": "1.0", "window": "4"},
    "sliminfer": {"layers": "1,2", "budget": "0.6,0.4", "block": "8", "unit": "2"},
    "uniprefill": {"first_layer": "1", "every": "3", "p": "0.6", "block": "4", "sink": "3", "window": "5"},
}


def documents():
    return [document(length, seed=seed) for seed, length in enumerate(LENGTHS)]


def easy(name):
    return make_method(name, EASY[name]) if name in EASY else small(name)


@cache
def asking(kind):
    """The same kind of method, which sees the last layer, so that attention is computed of all tokens."""

    class Asking(kind):
        def needs_last_layer(self, shape):
            return True

    return Asking


def asked(method):
    kind = asking(type(method))
    return kind(**{field.name: getattr(method, field.name) for field in fields(method)})


def assert_same(ours, reference):
    assert (ours.logits_BV - reference.logits_BV).abs().max() <= 1e-4
    assert ours.next_positions == reference.next_positions
    assert ours.cache.prompt_tokens() == reference.cache.prompt_tokens()
    for kind in ("keys", "values"):
        for a, b in zip(getattr(ours.cache, kind), getattr(reference.cache, kind), strict=True):
            assert (a - b).abs().max() <= 1e-4


# cascade holds what attention of all tokens chooses, in the last layer too
@pytest.mark.parametrize("name", [name for name in method_names() if name != "cascade"])
def test_what_is_read_is_what_would_be_without(decoder, sdpa, name):
    method, pack = easy(name), pack_of(*documents())
    assert not method.needs_last_layer(decoder.shape)
    ours = prefill(decoder, sdpa, method, pack, new_tokens=2)
    reference = prefill(decoder, sdpa, asked(method), pack, new_tokens=2)
    assert_same(ours, reference)
    assert ours.work.last_only == [False, False, False, True]
    assert reference.work.last_only == [False] * 4
    assert ours.work.kept == reference.work.kept
    assert ours.work.ffn() == reference.work.ffn()
    assert ours.work.ffn()[-1] == [1, 1, 1]


@pytest.mark.parametrize("name", SELECTING)
def test_what_the_last_layers_ffn_makes_of_other_tokens_is_not_read(decoder, sdpa, name, monkeypatch):
    """All of it, as a layer that is not the last computes it, gives the same."""
    method, pack = asked(small(name)), pack_of(*documents())
    ours = prefill(decoder, sdpa, method, pack, new_tokens=2)
    real = module.feed_forward
    monkeypatch.setattr(module, "feed_forward", lambda *given, **how: real(*given[:-1], None, **how))
    reference = prefill(decoder, sdpa, method, pack, new_tokens=2)
    assert reference.work.ffn()[-1] != [1, 1, 1]
    assert_same(ours, reference)


def test_block_sparse_attention_of_the_last_token_is_whole(sdpa, monkeypatch):
    sdpa.sparse_from = 300
    monkeypatch.setattr(sparse, "BLOCK", 32)
    decoder, pack = tiny_model("qwen3"), pack_of(document(450), document(40, seed=1))
    method = Dense(sparse_attention=0.2)
    ours, reference = (prefill(decoder, sdpa, each, pack) for each in (method, asked(method)))
    assert reference.by_document()[0][0][-1].pairs < 450 * 451 // 2
    assert_same(ours, reference)


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        (Dense(), False),
        (Mars(last_full=3), False),
        (MarsInfer(start_layer=1), False),
        (MarsInfer(low="fp8", start_layer=3), True),
        (MarsInfer(low="fp8", start_layer=4), False),
        (SlimInfer(layers=(1, 3), budget=0.5), True),
        (SlimInfer(layers=(1, 2), budget=0.5), False),
        (UniPrefill(first_layer=1, every=2), True),
        (UniPrefill(first_layer=1, every=2, p=1.0), False),
        (UniPrefill(first_layer=1, every=2, p=1.0, share=1.0), True),
        (UniPrefill(first_layer=0, every=2), False),
        (FastKV(layer=1), True),
        (FastKV(layer=1, kv_share=1.0), False),
        (FastKV(layer=3, kv_share=1.0), True),
        (GemFilter(layer=2), False),
        (GemFilter(layer=3), True),
    ],
    ids=str,
)
def test_a_method_says_whether_it_is_to_be_asked(method, needed):
    assert method.needs_last_layer(tiny_model("llama").shape) is needed


@dataclass(frozen=True, kw_only=True)
class AtTheLast(PruningMethod):
    """Stores every second token of the last layer, and says nothing of whether it needs to."""

    name = "at-the-last"
    drops: bool = False
    ffn: bool = True

    def select(self, layer: int, view: Any, state: Any) -> Selection:
        if layer < 3:
            return KEEP_ALL
        if self.drops:
            return Selection(live=view.all_indices[:-1])
        return Selection(cache=view.all_indices[::2], ffn=None if self.ffn else view.all_indices[:0])


def test_a_method_that_does_not_say_is_asked(sdpa):
    decoder, pack = tiny_model("llama"), pack_of(*documents())
    ours, dense = (prefill(decoder, sdpa, method, pack) for method in (AtTheLast(), Dense()))
    assert ours.cache.prompt_tokens() == [list(LENGTHS)] * 3 + [[60, 5, 32]]
    assert torch.equal(ours.cache.keys[-1][:60], dense.cache.keys[-1][:120:2])
    assert (ours.logits_BV - dense.logits_BV).abs().max() <= 1e-4
    skips = prefill(decoder, sdpa, AtTheLast(ffn=False), pack)
    assert skips.work.ffn()[-1] == [0, 0, 0]
    assert (skips.logits_BV - dense.logits_BV).abs().max() > 1e-2


def test_a_last_token_that_is_dropped_by_the_last_layer_is_missed(sdpa):
    with pytest.raises(MarsError, match=r"^method at-the-last dropped a prompt's last token"):
        prefill(tiny_model("llama"), sdpa, AtTheLast(drops=True), pack_of(*documents()))


class Leaves(PruningMethod):
    """All of the second document leaves before the last layer, which the method need not see."""

    name = "leaves"

    def needs_last_layer(self, shape):
        return False

    def select(self, layer, view, state):
        start, end = view.segments.ranges()[1]
        indices = view.all_indices
        return Selection(live=indices[(indices < start) | (indices >= end)]) if layer == 1 else KEEP_ALL


def test_a_document_of_which_nothing_is_left_is_missed(sdpa):
    with pytest.raises(MarsError, match=r"^method leaves dropped a prompt's last token"):
        prefill(tiny_model("llama"), sdpa, Leaves(), pack_of(*documents()))


class Counting(SdpaAttention):
    """Counts the queries that attention is computed of."""

    def __init__(self):
        self.queries = []

    def prefill(self, q_THd, *rest):
        self.queries.append(len(q_THd))
        return super().prefill(q_THd, *rest)

    def decode(self, q_QHd, *rest):
        self.queries.append(len(q_QHd))
        return super().decode(q_QHd, *rest)


def test_only_the_last_token_is_attended_for(monkeypatch):
    decoder, counting, passed = tiny_model("qwen2"), Counting(), []
    real = decoder.add_feed_forward_

    def add_feed_forward_(layer, hidden, *options, **named):
        passed.append(len(hidden))
        return real(layer, hidden, *options, **named)

    monkeypatch.setattr(decoder, "add_feed_forward_", add_feed_forward_)
    prefill(decoder, counting, Dense(), pack_of(*documents()))
    assert counting.queries == passed == [sum(LENGTHS)] * 3 + [3]


@pytest.mark.parametrize("name", method_names())
def test_shares_are_of_what_dense_does(sdpa, name):
    decoder, pack = tiny_model("qwen2"), pack_of(*documents())
    for method in (full(small(name)), easy(name), small(name)):
        prefilled = prefill(decoder, sdpa, method, pack)
        for passes, length in zip(prefilled.by_document(), LENGTHS, strict=True):
            shares = (
                kept_ratio(decoder.shape, passes, length),
                ffn_ratio(decoder.shape, passes, length),
                attention_ratio(decoder.shape, passes, length),
                passes_flops(decoder.shape, passes) / dense_flops(decoder.shape, length),
            )
            if name == "dense":
                assert shares == (1, 1, 1, 1)
                assert passes == [dense_work(decoder.shape, length)]
            # some run twice; who must see the last layer computes attention that dense does not
            assert max(shares[:2]) <= 1 or name in RESTARTING
            assert shares[2] <= 1 or name in RESTARTING or method.needs_last_layer(decoder.shape)


def test_operations_of_a_last_layer_by_hand():
    shape = tiny_model("qwen3").shape  # hidden 64, FFN 96, 4 heads and 2 of keys, 32 wide
    keys_values, query_output, ffn = 2 * 64 * 2 * 64, 2 * 64 * 2 * 128, 3 * 2 * 64 * 96
    work = LayerWork(10, 1, last_only=True)
    assert attended_pairs(work) == 10
    assert layer_flops(shape, work) == 10 * keys_values + query_output + ffn + 4 * 128 * 10
    exited = LayerWork(4, 1, kv_only=6, last_only=True)
    assert attended_pairs(exited) == 10
    assert layer_flops(shape, exited) == layer_flops(shape, work)


class CountingLayers(SdpaAttention):
    """Counts the layers whose attention was computed."""

    def __init__(self):
        self.layers = 0

    def prefill(self, *arguments, **options):
        self.layers += 1
        return super().prefill(*arguments, **options)


@pytest.mark.parametrize("name", RESTARTING)
def test_attention_is_left_out_of_the_layer_behind_which_the_prefill_begins_anew(name):
    decoder, attention = tiny_model("qwen2"), CountingLayers()
    method = make_method(name, {"layer": 1, "keep": 0.5})
    prefilled = prefill(decoder, attention, method, pack_of(document(400), document(300)))
    first, _ = prefilled.passes
    assert [pairs_B if pairs_B is None else pairs_B.tolist() for pairs_B in first.pairs_B] == [None, [0, 0]]
    assert attention.layers == 1 + decoder.shape.layers - 1
    expected = method.expected_passes(decoder.shape, 400)
    assert attended_pairs(expected[0][-1]) == attended_pairs(first.by_layer()[-1][0]) == 0


def test_a_method_may_begin_anew_where_it_has_not_said_so():
    """Behind attention, as at any layer."""

    class Unannounced(GemFilter):
        def restarting_layer(self, shape):
            return None

    decoder, pack = tiny_model("qwen2"), pack_of(document(100))
    whole, told = (
        prefill(decoder, SdpaAttention(), kind(layer=1, keep=0.5), pack) for kind in (Unannounced, GemFilter)
    )
    assert len(whole.passes) == 2
    assert whole.passes[0].pairs_B == [None, None]
    assert torch.equal(whole.logits_BV, told.logits_BV)
