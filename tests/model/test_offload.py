"""A cache that offloads blocks to the host, against caches that do not."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil

import pytest
import torch
from conftest import document, pack_of, tiny_model

import pipeline.model.prefill as prefill_module
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.model.cache import RaggedCache
from pipeline.model.offload import KvLimits, OffloadedCache
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.sliminfer import SlimInfer
from pipeline.records import RowError

pytestmark = pytest.mark.slow

BLOCK, UNIT = 8, 2
SETTINGS = {"layers": (1, 2, 3), "budget": (0.7, 0.5, 0.3), "block": BLOCK, "unit": UNIT}
METHOD = SlimInfer(**SETTINGS)
NEW_TOKENS = 24


@pytest.fixture
def model():
    return tiny_model("llama")


def planned(model, length):
    return METHOD.plan(model.shape, [length]).kv_bytes(4, NEW_TOKENS)


def limits(device_bytes, host_bytes=1 << 30):
    return KvLimits(device_bytes=device_bytes, host_bytes=host_bytes)


def answer(model, sdpa, prefilled, late=0):
    (generated,) = decode(model, sdpa, prefilled, StopRules(max_new_tokens=NEW_TOKENS), late=late)
    return generated.tokens


def offloaded(model, sdpa, doc, share, method=METHOD):
    kv_limits = limits(int(planned(model, doc.prompt_tokens) * share))
    prefilled = prefill(model, sdpa, method, pack_of(doc), NEW_TOKENS, limits=kv_limits)
    assert isinstance(prefilled.cache, OffloadedCache)
    return prefilled


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("length", [128, 131, 40])
def test_with_every_block_active_the_answer_is_that_without_offloading(
    model, sdpa, monkeypatch, length, late
):
    """All K/V make the way to the host and back; not a bit changes."""
    doc = document(length)
    plain = prefill(model, sdpa, METHOD, pack_of(doc), NEW_TOKENS)
    expected = answer(model, sdpa, plain)

    def always_offload(plan, new_tokens, _, *, device, itemsize, score, dtype):
        room = limits(plan.kv_bytes(itemsize, new_tokens))
        return OffloadedCache(plan, plan.rescoring, new_tokens, room, device, itemsize, score)

    monkeypatch.setattr(prefill_module, "make_cache", always_offload)
    moved = prefill(model, sdpa, METHOD, pack_of(doc), NEW_TOKENS)
    assert answer(model, sdpa, moved, late) == expected
    for layer in range(model.shape.layers):
        assert torch.equal(moved.cache.keys[layer], plain.cache.keys[layer])
        assert torch.equal(moved.cache.values[layer], plain.cache.values[layer])
    assert moved.cache.counts.swaps == 0
    assert moved.cache.counts.decisions > 0


@dataclass(frozen=True, kw_only=True)
class Remembering(SlimInfer):
    """SlimInfer that keeps the keys and the mean query that it scored."""

    scored: dict = field(default_factory=dict)

    def select(self, layer, view, state):
        if layer in state.layers:
            self.scored[layer] = (view.keys.clone(), view.queries[-self.window :].mean(0))
        return super().select(layer, view, state)


def naive_scores(keys_TKd, q_Hd):
    groups = q_Hd.shape[0] // keys_TKd.shape[1]
    scores = []
    for first in range(0, len(keys_TKd), BLOCK):
        block = keys_TKd[first : first + BLOCK]
        units = [block[i : i + UNIT].mean(0) for i in range(0, len(block), UNIT)]
        products = [
            [abs(float(q_Hd[h] @ unit_Kd[h // groups])) for h in range(len(q_Hd))] for unit_Kd in units
        ]
        scores.append(max(sum(heads) / len(heads) for heads in products))
    return scores


def naive_best(scores, count):
    inner = sorted(range(1, len(scores) - 1), key=lambda block: -scores[block])
    return sorted({0, len(scores) - 1, *inner[: count - 2]})


def naive_answer(model, sdpa, doc, share, gamma):
    """All K/V in plain tensors; each step attends to the blocks that the rule allows, and no more."""
    method = Remembering(**SETTINGS)
    prefilled = prefill(model, sdpa, method, pack_of(doc), NEW_TOKENS)
    lengths = [tokens for (tokens,) in prefilled.cache.prompt_tokens()]
    prompt = [
        [x[:n].clone() for x, n in zip(xs, lengths, strict=True)]
        for xs in (prefilled.cache.keys, prefilled.cache.values)
    ]
    new = [[x[:0].clone() for x in prompt[0]] for _ in "kv"]
    stage_of = {0: 1, 1: 2, 2: 3}  # each layer before a pruning layer is a stage of its own
    per_token = model.shape.kv_bytes_per_token(4)
    everything = sum(lengths) * per_token + model.shape.layers * NEW_TOKENS * per_token
    movable = sum(lengths[layer] for layer in stage_of) * per_token
    room = int(everything * share) - (everything - movable)
    counts = {layer: int(room / movable * ceil(lengths[layer] / BLOCK)) for layer in stage_of}
    active = {
        layer: naive_best(naive_scores(*method.scored[at]), counts[layer]) for layer, at in stage_of.items()
    }
    tokens, swaps = [int(prefilled.logits_BV[0].argmax())], 0
    with torch.inference_mode():
        while len(tokens) < NEW_TOKENS:
            hidden = model.embed(torch.tensor(tokens[-1:]))
            rope = model.rope(hidden, torch.tensor([doc.prompt_tokens + len(tokens) - 1]))
            following = dict(active)
            for layer in range(model.shape.layers):
                q, k, v = model.qkv(layer, hidden, rope)
                new[0][layer], new[1][layer] = torch.cat([new[0][layer], k]), torch.cat([new[1][layer], v])
                seen = []
                for which in (0, 1):
                    whole = prompt[which][layer]
                    if layer in active:
                        blocks = [whole[b * BLOCK : (b + 1) * BLOCK] for b in sorted(active[layer])]
                        whole = torch.cat(blocks)
                    seen.append(torch.cat([whole, new[which][layer]]))
                slots = DecodeSlots.of([0], [len(seen[0])], len(seen[0]), q.device)
                mixed = sdpa.decode(q, *seen, slots)
                model.add_attention_(layer, hidden, mixed)
                model.add_feed_forward_(layer, hidden)
                before = layer - 1
                if stage_of.get(before) == layer:
                    best = naive_best(naive_scores(method.scored[layer][0], q[0]), counts[before])
                    if len(set(best) & set(active[before])) < gamma * len(best):
                        following[before] = best
                        swaps += 1
            active = following
            tokens.append(int(model.logits(hidden)[0].argmax()))
    return tokens, swaps


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize(("length", "share", "gamma"), [(256, 0.6, 0.9), (203, 0.5, 1.0), (203, 0.7, 0.5)])
def test_swapped_blocks_give_the_answer_of_a_cache_that_holds_them_all(
    model, sdpa, length, share, gamma, late
):
    doc = document(length, seed=5)
    expected, swaps = naive_answer(model, sdpa, doc, share, gamma)
    prefilled = offloaded(model, sdpa, doc, share, replace(METHOD, gamma=gamma))
    assert answer(model, sdpa, prefilled, late) == expected
    traffic = prefilled.cache.counts
    assert traffic.steps == NEW_TOKENS - 1
    assert traffic.swaps == swaps
    assert traffic.decisions == 3 * (NEW_TOKENS - 1)
    assert gamma < 0.9 or swaps > 0  # not vacuous
    assert (traffic.swapped_bytes > 0) == (swaps > 0)


def test_a_prefill_holds_nothing_of_the_layers_whose_blocks_are_not_scored_yet(model, sdpa, monkeypatch):
    held, settle = {}, OffloadedCache.settle

    def watched(cache, layer, scores_N):
        last = len(cache.keys) - 1
        held[last] = [buffers[last].untyped_storage().nbytes() for buffers in (cache.keys, cache.values)]
        settle(cache, layer, scores_N)

    monkeypatch.setattr(OffloadedCache, "settle", watched)
    offloaded(model, sdpa, document(256), 0.6)
    assert held == {layer: [0, 0] for layer in (0, 1, 2)}


def test_the_device_holds_no_more_than_allowed_and_the_host_what_is_offloaded(model, sdpa):
    doc = document(256)
    for share in (0.9, 0.6, 0.45):
        cache = offloaded(model, sdpa, doc, share).cache
        assert cache.nbytes <= planned(model, 256) * share
        stored = sum(tokens for (tokens,) in cache.prompt_tokens())
        last = cache.prompt_tokens()[-1][0]
        assert cache.host_bytes == (stored - last) * model.shape.kv_bytes_per_token(4)
        assert cache.prompt_tokens() == prefill(model, sdpa, METHOD, pack_of(doc)).cache.prompt_tokens()


def test_what_fits_is_not_offloaded(model, sdpa):
    prefilled = prefill(
        model, sdpa, METHOD, pack_of(document(100)), NEW_TOKENS, limits=limits(planned(model, 100))
    )
    assert type(prefilled.cache) is RaggedCache


@pytest.mark.parametrize(
    ("method", "documents", "device_bytes", "host_bytes", "message"),
    [
        (Dense(), [100], 1000, 1 << 30, r"take 0\.00 GB, more than --kv-memory allows"),
        (METHOD, [100, 90], 1000, 1 << 30, r"keys and values of 190 tokens take .* --kv-memory allows"),
        (METHOD, [100], 1000, 1 << 30, r"100 tokens cannot run in 0\.00 GB of --kv-memory: at least"),
        (METHOD, [100], 80_000, 10, r"need 0\.00 GB of host memory .* 0\.00 GB may be used"),
    ],
)
def test_what_cannot_fit_is_refused(model, sdpa, method, documents, device_bytes, host_bytes, message):
    pack = pack_of(*[document(n, seed=n) for n in documents])
    with pytest.raises(RowError, match=message):
        prefill(model, sdpa, method, pack, NEW_TOKENS, limits=limits(device_bytes, host_bytes))


@contextmanager
def without_collection():
    """What is part of a cycle of references stays, as it may for long between two collections."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_everything_is_freed_after_a_pack_and_after_an_exception(model, sdpa, monkeypatch):
    tensors = []
    real = OffloadedCache.store

    def store(cache, k, v, segments):
        real(cache, k, v, segments)
        tensors.extend(weakref.ref(x) for stage in cache._stages for pair in stage.host for x in pair)

    monkeypatch.setattr(OffloadedCache, "store", store)
    prefilled = offloaded(model, sdpa, document(256), 0.6)
    with without_collection():
        answer(model, sdpa, prefilled)
        del prefilled
        assert len(tensors) > 10
        assert all(tensor() is None for tensor in tensors)
    tensors.clear()
    layers = iter(range(3))
    allowed = limits(int(planned(model, 256) * 0.6))
    with pytest.raises(StopIteration):
        prefill(
            model,
            sdpa,
            METHOD,
            pack_of(document(256)),
            NEW_TOKENS,
            check=lambda: next(layers),
            limits=allowed,
        )
    gc.collect()
    assert tensors
    assert all(tensor() is None for tensor in tensors)
