"""Cascading caches against a plain version of their steps, a token at a time, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import document, loaded, pack_of, tiny_model

from pipeline.errors import ConfigError
from pipeline.evaluate.predicting import generate, score_answer
from pipeline.generation.generated import StopRules
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.prefill import prefill
from pipeline.pruning.cascade import Cascade
from pipeline.pruning.dense import Dense
from pipeline.pruning.memories.cascade_memory import CascadeMemory, CascadeSizes, entered
from pipeline.pruning.memories.key_memory import MemoryNeeds, Rotation

HEADS, KV_HEADS, WIDTH, DECAY = 4, 2, 8, 0.98
SHAPE = replace(tiny_model("qwen2").shape, layers=1, heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH)
FREQUENCIES = torch.logspace(0, -2, WIDTH // 2).double()


@dataclass
class Slot:
    """A token that one key/value head holds."""

    place: int  # in the document
    scores: list[float]  # of each query head

    @property
    def score(self):
        return max(self.scores)


class ByHand:
    """What one key/value head holds: lists of slots, the oldest first."""

    def __init__(self, sizes):
        self.sizes, self.sinks, self.caches, self.steps = sizes, [], [[] for _ in range(sizes.caches)], 0

    @property
    def held(self):
        return [*self.sinks, *(slot for cache in reversed(self.caches) for slot in cache)]

    def enter(self, slot):
        if len(self.sinks) < self.sizes.sink:
            self.sinks.append(slot)
            return
        for number, cache in enumerate(self.caches):
            if len(cache) < self.sizes.slots:
                cache.append(slot)
                break
            if self.steps % 2**number:
                if slot.score > cache[-1].score:
                    cache[-1] = slot
                break
            cache.append(slot)
            slot = cache.pop(0)
        self.steps += 1


def turned(x, position):
    first, second = x[: WIDTH // 2], x[WIDTH // 2 :]
    cos, sin = (position * FREQUENCIES).cos(), (position * FREQUENCIES).sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin))


def by_hand(q, k, v, sizes):
    """(T, H, d), and what each key/value head holds in the end, with what waits."""
    out, heads = torch.zeros_like(q), [ByHand(sizes) for _ in range(KV_HEADS)]
    for start in range(0, len(q), sizes.chunk):
        for kv_head, own in enumerate(heads):
            for place in own.waiting if start else []:
                own.enter(place)
            own.waiting = []
            for at in range(start, min(start + sizes.chunk, len(q))):
                own.waiting.append(Slot(at, [0.0, 0.0]))
                seen = [*own.held, *own.waiting]
                keys = torch.stack([turned(k[s.place, kv_head], rank) for rank, s in enumerate(seen)])
                values = v[[s.place for s in seen], kv_head]
                for slot in seen:
                    slot.scores = [DECAY * score for score in slot.scores]
                for number, head in enumerate((2 * kv_head, 2 * kv_head + 1)):
                    weights = (keys @ turned(q[at, head], len(seen) - 1) / math.sqrt(WIDTH)).softmax(0)
                    out[at, head] = weights @ values
                    for slot, weight in zip(seen, weights.tolist(), strict=True):
                        slot.scores[number] += (1 - DECAY) * weight
    return out, heads


def memory(tokens, sizes):
    def rotation(positions):
        angles = torch.arange(positions).double()[:, None] * torch.cat((FREQUENCIES, FREQUENCIES))
        return Rotation(kinds=("rope",), tables={"rope": (angles.cos(), angles.sin())})

    needs = MemoryNeeds(
        shape=SHAPE,
        length=tokens,
        new_tokens=0,
        dtype=torch.float64,
        device=torch.device("cpu"),
        attention=SdpaAttention(),
        rotation=rotation,
    )
    return CascadeMemory(needs, sizes, decay=DECAY)


def qkv(tokens):
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes)


@pytest.mark.parametrize(
    "sizes",
    [
        CascadeSizes(sink=3, caches=4, slots=5, chunk=16),
        CascadeSizes(sink=0, caches=3, slots=1, chunk=7),
        CascadeSizes(sink=20, caches=2, slots=30, chunk=8),
    ],
    ids=str,
)
def test_all_is_as_by_hand(sizes):
    tokens = 150
    q, k, v = qkv(tokens)
    held = memory(tokens, sizes)
    parts = [held.attend(0, q[a:b], k[a:b], v[a:b]) for a, b in ((0, 40), (40, 41), (41, tokens))]
    expected, heads = by_hand(q, k, v, sizes)
    assert (torch.cat(parts) - expected).abs().max() < 1e-9
    (of,) = held._layers
    for kv_head, own in enumerate(heads):
        places = [slot.place for slot in [*own.held, *own.waiting]]
        assert held.stored == [len(places)]
        assert torch.equal(of.keys[: len(places), kv_head], k[places, kv_head])
        scores = torch.tensor([slot.score for slot in [*own.held, *own.waiting]])
        found = of.score_HM[2 * kv_head : 2 * kv_head + 2, sizes.sink : len(places)].amax(0)
        assert (found - scores[sizes.sink :]).abs().max() < 1e-5
        assert len(own.held) == sizes.held(tokens - len(own.waiting))


def test_many_tokens_enter_as_one_by_one():
    sizes, scores = CascadeSizes(sink=0, caches=5, slots=6, chunk=1), torch.rand(1, 1000)
    own = ByHand(sizes)
    for place in range(1000):
        own.enter(Slot(place, [float(scores[0, place])]))
    expected = [slot.place for slot in own.held]
    places, held = entered(scores, [0] * 5, slots=6, first=0)
    assert places[0].tolist() == expected
    assert held == [len(cache) for cache in own.caches]
    first, held = entered(scores[:, :417], [0] * 5, slots=6, first=0)
    joined = torch.cat((first, torch.arange(417, 1000)[None]), dim=1)
    places, _ = entered(scores.gather(1, joined), held, slots=6, first=417)
    assert joined.gather(1, places)[0].tolist() == expected


def test_who_keeps_everything_is_dense(decoder, sdpa):
    pack, method = pack_of(document(300), document(90, seed=1)), Cascade(tokens=360, caches=2, chunk=64)
    dense, cascade = (prefill(decoder, sdpa, each, pack, 4) for each in (Dense(), method))
    assert (dense.logits_BV - cascade.logits_BV).abs().max() <= 1e-4
    model, answer = loaded(decoder), [1, 2, 3, 4]
    of_dense, of_cascade = (score_answer(model, each, document(300), answer)[0] for each in (Dense(), method))
    assert abs(of_dense.logprobs - of_cascade.logprobs).max() <= 1e-4


def test_memory_is_flat_and_work_linear():
    model, method = loaded(tiny_model("qwen3")), Cascade(tokens=128, sink=4, chunk=32)
    short, long = (
        prefill(model.decoder, model.attention, method, pack_of(document(n))) for n in (1500, 3000)
    )
    assert short.cache.nbytes == long.cache.nbytes
    added = [b - a for a, b in zip(short.cache.memories[0].pairs, long.cache.memories[0].pairs, strict=True)]
    assert all(pairs <= 1500 * (4 + 128 + 32) for pairs in added)
    assert len(generate(model, method, document(1500), StopRules(max_new_tokens=40)).tokens) == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tokens": 500},
            "tokens=500 in caches=4 with sink=64 and chunk=1024 do not fit the model's context of 512 tokens",
        ),
        ({"caches": 0}, "caches=0 is out of range: it must be between 1 and 16"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError) as caught:
        Cascade(**settings).plan(tiny_model("qwen2").shape, [10])
    assert str(caught.value) == message
