"""Speculative prefill against a naive reference written straight from its docstring, of two models."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import NamedTuple

import pytest
import torch
from conftest import SIZES, document, pack_of, tiny_model
from naive import Choice, Watched, assert_same, best, generated, naive_decode, naive_prefill, pooled

from pipeline.engines.memory import Packer
from pipeline.errors import ConfigError
from pipeline.estimate import expected_flops
from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend, SdpaAttention
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import passes_flops
from pipeline.pruning.speculative import Speculative
from pipeline.records import Spans

SETTINGS = [
    {"keep": 0.3, "chunk": 8, "look_ahead": 3, "pool": 5, "sink": 3, "window": 4, "most": 16},
    {"keep": 0.2, "chunk": 5, "look_ahead": 0, "pool": 1, "sink": 0, "window": 1, "most": 2},
    {"keep": 0.5, "chunk": 16, "look_ahead": 1, "pool": 13, "sink": 20, "window": 30, "most": 40},
]


class Draft(NamedTuple):
    decoder: Decoder
    attention: AttentionBackend


@pytest.fixture
def draft(monkeypatch):
    """A model of another shape and of other weights."""
    monkeypatch.setitem(SIZES, "num_hidden_layers", 3)
    monkeypatch.setitem(SIZES, "hidden_size", 32)
    monkeypatch.setitem(SIZES, "num_attention_heads", 2)
    drawn = Draft(tiny_model("qwen2", seed=7), SdpaAttention())
    monkeypatch.undo()
    return drawn


def documents():
    """Long with the question in front, shorter than a chunk, one token, a middling one."""
    long = document(150)
    ahead = Spans(document=(30, 146), question=(20, 28))
    return [replace(long, spans=ahead), document(7, seed=1), document(1, seed=4), document(71, seed=2)]


def kept(draft, doc, *, keep, chunk, look_ahead, pool, sink, window, most):
    """The tokens that stay, from the steps of the docstring."""
    ids = torch.from_numpy(doc.input_ids)
    length, (begin, end), (asked, stop) = len(ids), doc.spans.document, doc.spans.question
    last = min(length, max(window, min(length - end, most)))
    steps = [read(draft, ids, length, last, pool)]
    tokens = ids
    for _ in range(look_ahead):
        logits = naive_prefill(draft.decoder, tokens, lambda seen: Choice()).logits
        tokens = torch.cat([tokens, logits.argmax()[None]])
        steps.append(read(draft, tokens, length, 1, pool))
    scores = [sum(of_token) / len(steps) for of_token in zip(*steps, strict=True)]
    always = {
        *range(min(sink, length)),
        *range(max(0, begin - most), max(0, begin)),
        *range(max(asked, stop - most), max(0, stop)),
        *range(length - last, length),
    }
    always &= set(range(length))  # short prompts of tests have spans that reach beyond them
    judged = {}
    for number in range(ceil(length / chunk)):
        own = [t for t in range(number * chunk, min(length, (number + 1) * chunk)) if t not in always]
        if own:
            judged[number] = sum(scores[t] for t in own) / len(own)
    order = list(judged)
    chosen = {order[place] for place in best([judged[number] for number in order], ceil(keep * len(order)))}
    return sorted(always | {t for t in range(length) if t // chunk in chosen})


def read(draft, ids, length, last, pool):
    """What the last tokens attend to on average among the first `length`, the largest of heads and layers."""
    largest = [0.0] * length

    def look(seen):
        weights_HT = seen.weights[:, -last:, :length].mean(1)
        if last > 1 or len(ids) == length:
            rows = [pooled(weights_HT.amax(0).tolist(), pool)]
        else:
            rows = [pooled(row.tolist(), pool) for row in weights_HT]
        largest[:] = [max(column) for column in zip(largest, *rows, strict=True)]
        return Choice()

    naive_prefill(draft.decoder, ids, look)
    return largest


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_chosen_tokens_run_alone_at_their_positions(draft, sdpa, settings):
    decoder = tiny_model("qwen3")
    watched = Watched(Speculative(**settings))
    prefilled = prefill(decoder, sdpa, watched, pack_of(*documents()), new_tokens=6, draft=draft)
    answers = generated(decoder, sdpa, prefilled, 6)
    start, left = 0, 0
    for b, doc in enumerate(documents()):
        tokens, length = kept(draft, doc, **settings), doc.prompt_tokens
        inside = (prefilled.reading.chosen_C >= start) & (prefilled.reading.chosen_C < start + length)
        assert (prefilled.reading.chosen_C[inside] - start).tolist() == tokens
        trace = naive_prefill(decoder, torch.from_numpy(doc.input_ids), lambda seen: Choice(), tokens)
        assert_same(trace, watched, prefilled, b)
        assert answers[b] == naive_decode(decoder, trace, length, 6)
        start, left = start + length, left + length - len(tokens)
    assert left > 40, "nothing was left out"
    assert prefilled.next_positions == prefilled.lengths == (150, 7, 1, 71)


def test_the_question_in_front_and_the_instruction_stay(draft, sdpa):
    method = Speculative(**SETTINGS[0])
    prefilled = prefill(tiny_model("qwen3"), sdpa, method, pack_of(documents()[0]), draft=draft)
    chosen = set(prefilled.reading.chosen_C.tolist())
    assert {*range(3), *range(14, 30), *range(146, 150)} <= chosen
    assert len(chosen) < 100


def test_the_draft_decides_and_no_other_model(draft, sdpa):
    decoder, method, pack = tiny_model("qwen3"), Speculative(**SETTINGS[0]), pack_of(*documents())
    own, other = (prefill(decoder, sdpa, method, pack, draft=each) for each in (None, draft))
    assert own.reading.chosen_C.tolist() != other.reading.chosen_C.tolist()
    assert own.draft_flops != other.draft_flops
    assert min(other.draft_flops) > 0


def test_with_all_chunks_it_equals_dense_in_float64(draft):
    decoder, sdpa = Decoder(tiny_model("qwen2").model.double()), SdpaAttention()
    pack, method = pack_of(*documents()), Speculative(keep=1.0, chunk=4)
    dense = prefill(decoder, sdpa, Dense(), pack, new_tokens=8)
    whole = prefill(decoder, sdpa, method, pack, new_tokens=8, draft=draft)
    assert (whole.logits_BV - dense.logits_BV).abs().max() <= 1e-6
    answers = [generated(decoder, sdpa, each, 8) for each in (whole, dense)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_plan_bounds_what_is_stored(draft, sdpa, settings):
    decoder, method = tiny_model("llama"), Speculative(**settings)
    plan = method.plan(decoder.shape, [doc.prompt_tokens for doc in documents()])
    cache = prefill(decoder, sdpa, method, pack_of(*documents()), draft=draft).cache
    stored = [sum(layer) for layer in cache.prompt_tokens()]
    assert all(own <= bound for own, bound in zip(stored, plan.cache_tokens, strict=True))
    assert max(stored) < sum(doc.prompt_tokens for doc in documents())


def test_the_expected_work_is_near_what_is_done(draft, sdpa):
    decoder, doc = tiny_model("qwen3"), document(400)
    method = Speculative(keep=0.3, chunk=8, look_ahead=2, sink=4, window=4, most=4)
    shapes = {"draft": draft.decoder.shape, "itemsize": 4, "new_tokens": 2, "pack_tokens": None}
    packer = Packer.on(decoder.device, method, decoder.shape, **shapes)
    done = prefill(decoder, sdpa, method, pack_of(doc), draft=draft)
    own = passes_flops(decoder.shape, done.by_document()[0])
    assert expected_flops(packer, 400) == pytest.approx(own + done.draft_flops[0], rel=0.1)


def test_memory_is_that_of_the_larger_of_both_prefills(draft):
    decoder, method = tiny_model("qwen3"), Speculative(keep=0.1, look_ahead=2, most=40)
    packers = [
        Packer.on(
            decoder.device, each, decoder.shape, itemsize=4, new_tokens=2, pack_tokens=None, draft=shape
        )
        for each, shape in ((method, draft.decoder.shape), (method, decoder.shape), (Dense(), None))
    ]
    small, own, dense = (packer.planned_bytes([4000]) for packer in packers)
    assert small < own
    assert small < dense
    assert packers[0].kv_bytes([4000]) < packers[2].kv_bytes([4000]) / 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.5}, "keep=1.5 is out of range: it must be between 0 and 1"),
        ({"pool": 12}, "pool=12 must be odd, so that a score keeps its place"),
        ({"most": 16}, "most=16 is less than sink=32"),
        ({"window": 300}, "most=256 is less than window=300"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        Speculative(**settings)
    assert str(caught.value) == message


def test_a_fixed_share_replaces_its_own():
    assert Speculative(chunk=8).with_keep((0.5,)) == Speculative(chunk=8, keep=0.5)
