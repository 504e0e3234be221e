"""What only a GPU can show: each attention backend, bf16 scoring, and the whole prefill and decode."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document

from pipeline.checkpoints.building import random_model
from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.kernels import reference
from pipeline.kernels.attention import BACKENDS, SdpaAttention, choose_attention
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.scoring import window_importance
from pipeline.kernels.segments import Segments
from pipeline.model.layers import run_layers
from pipeline.model.offload import Copier, KvLimits, OffloadedCache, make_cache
from pipeline.model.pack import PartialPrefill
from pipeline.model.prefill import Pack, prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.pruning.registry import make_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
HEADS = {"heads": 8, "kv_heads": 2, "head_dim": 64}


def backend_named(name, dtype=torch.bfloat16, sizes=HEADS):
    try:
        return choose_attention(name, device=CUDA, dtype=dtype, **sizes)[0]
    except ConfigError as error:
        pytest.skip(str(error))


def random_qkv(segments, dtype):
    generator = torch.Generator(device=CUDA).manual_seed(0)
    return [
        torch.randn(segments.total, heads, 64, generator=generator, device=CUDA).to(dtype)
        for heads in (8, 2, 2)
    ]


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_agrees_with_the_reference_on_a_mixed_pack(name):
    backend = backend_named(name)
    segments = Segments.of((700, 1, 64, 1025), CUDA)
    q, k, v = random_qkv(segments, torch.bfloat16)
    expected = reference.causal_attention(q, k, v, segments)
    got = backend.prefill(q, k, v, segments)
    assert (got - expected).norm() / expected.norm() < 0.01
    last = segments.last_indices()
    # slots with room after each document, as in a cache that will grow, filled with what must not be read
    starts = [start + 5 * b for b, start in enumerate(segments.offsets[:-1])]
    slots = torch.arange(segments.total, device=CUDA) + 5 * segments.document_T
    keys, values = (torch.full((segments.total + 20, 2, 64), 1e4, device=CUDA, dtype=k.dtype) for _ in "kv")
    keys[slots], values[slots] = k, v
    at = DecodeSlots.of(starts, segments.lengths, len(keys), CUDA)
    decoded = backend.decode(q[last], keys, values, at)
    assert (decoded - expected[last]).norm() / expected[last].norm() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_agrees_with_the_reference(dtype):
    segments = Segments.of((2000, 30, 333), CUDA)
    q, k, _ = random_qkv(segments, dtype)
    expected = reference.window_importance(q, k, segments, window=50)
    assert (
        window_importance(q, k, segments, window=50) - expected
    ).abs().max() < 1e-4 * expected.max() + 1e-7


def cuda_decoder(family, dtype):
    sizes = {**SIZES, **FAMILY_SETTINGS[family], "num_attention_heads": 4, "head_dim": 64}
    model = random_model(family, sizes, device=CUDA, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return Decoder(model)


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
def test_dense_in_fp32_gives_the_logits_and_tokens_of_stock_transformers(family):
    decoder = cuda_decoder(family, torch.float32)
    backend = backend_named("sdpa", torch.float32)
    doc = document(300)
    prefilled = prefill(decoder, backend, Dense(), Pack.of([doc], CUDA), new_tokens=8)
    ids = torch.from_numpy(doc.input_ids)[None].to(CUDA)
    with torch.inference_mode():
        stock = decoder.model(ids).logits[0, -1]
    assert (prefilled.logits_BV[0] - stock).abs().max() < 1e-3
    answer = decode(decoder, backend, prefilled, StopRules(max_new_tokens=8))[0].tokens
    mask = torch.ones_like(ids)
    assert (
        answer
        == decoder.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[
            0, 300:
        ].tolist()
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_a_bf16_pack_agrees_with_its_documents_alone(name):
    """Matrix shapes change bf16 sums, so the logits' distance is bounded rather than zero."""
    decoder = cuda_decoder("qwen2", torch.bfloat16)
    backend = backend_named(name, sizes={"heads": 4, "kv_heads": 2, "head_dim": 64})
    method = MarsInfer(share=0.5, start_layer=1, window=8, prefix=8)
    documents = [document(n, seed=n) for n in (400, 33, 120)]
    together = prefill(decoder, backend, method, Pack.of(documents, CUDA))
    for b, doc in enumerate(documents):
        alone = prefill(decoder, backend, method, Pack.of([doc], CUDA))
        distance = (together.logits_BV[b] - alone.logits_BV[0]).norm() / alone.logits_BV[0].norm()
        assert distance < 0.05
        assert [row[b] for row in together.work.ffn()] == [row[0] for row in alone.work.ffn()]


@pytest.mark.parametrize("name", BACKENDS)
def test_what_memory_held_before_does_not_reach_an_answer(name):
    decoder = cuda_decoder("qwen2", torch.bfloat16)
    backend = backend_named(name, sizes={"heads": 4, "kv_heads": 2, "head_dim": 64})
    doc = document(200)

    def answer():
        prefilled = prefill(decoder, backend, Dense(), Pack.of([doc], CUDA), new_tokens=40)
        return decode(decoder, backend, prefilled, StopRules(max_new_tokens=40))[0].tokens

    expected = answer()
    torch.cuda.empty_cache()
    waste = [
        torch.full((n,), float("nan"), device=CUDA, dtype=torch.bfloat16) for n in [2**15] * 200 + [2**26]
    ]
    del waste
    assert answer() == expected


@pytest.mark.parametrize("method", [Dense(), Mars(last_full=1, window=16)], ids=lambda method: method.name)
def test_the_layers_wait_for_nothing(method):
    """Of a method that knows beforehand who goes on."""
    decoder = cuda_decoder("llama", torch.bfloat16)
    backend = backend_named("sdpa")
    pack = Pack.of([document(200), document(50, seed=1)], CUDA)
    plan = method.plan(decoder.shape, pack.segments.lengths)

    def run():
        cache = make_cache(plan, 0, None, device=CUDA, itemsize=decoder.dtype.itemsize, score=None)
        begun = PartialPrefill.afresh(decoder, pack, cache)
        return run_layers(decoder, backend, method, pack, method.begin(plan), begun, lambda: None)

    with torch.inference_mode():
        run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            survivors = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert np.isfinite(decoder.logits(survivors.hidden_TD).cpu().numpy()).all()


METHODS = {
    "fastkv": {"layer": 1, "share": 0.4, "kv_share": 0.3},
    "frugal": {"layer": 1, "keep": 0.4, "judges": 50, "sink": 8, "window": 8, "most": 32},
    "gemfilter": {"layer": 1, "keep": 64.0},
    "marsinfer": {"start_layer": 1, "share": 0.5, "window": 8, "prefix": 8},
    "sliminfer": {"layers": (1, 2, 3), "budget": (0.6, 0.4, 0.3), "block": 16, "unit": 4},
    "speculative": {"keep": 0.3, "chunk": 16, "sink": 8, "window": 8, "most": 32},
    "uniprefill": {"first_layer": 1, "every": 1, "p": 0.7, "block": 16, "sink": 16, "window": 16},
}


def answer_of(decoder, backend, prefilled, new_tokens, late=None):
    rules = StopRules(max_new_tokens=new_tokens)
    return [generated.tokens for generated in decode(decoder, backend, prefilled, rules, late=late)]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_works_on_the_gpu_as_on_the_cpu(name):
    """Sums in another order may choose the other of two tokens that score alike, which moves little."""
    method = make_method(name, METHODS[name])
    documents = [document(n, seed=n) for n in (400, 210, 120)]
    counts, logits = [], []
    for device in (torch.device("cpu"), CUDA):
        decoder = cuda_decoder("qwen2", torch.float32)
        decoder.model.to(device)
        decoder = Decoder(decoder.model)
        prefilled = prefill(decoder, SdpaAttention(), method, Pack.of(documents, device), new_tokens=12)
        counts.append(prefilled.by_document())
        logits.append(prefilled.logits_BV.cpu())
        assert all(len(tokens) == 12 for tokens in answer_of(decoder, SdpaAttention(), prefilled, 12))
    assert counts[0] == counts[1]
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 0.02


def offloading(share, **options):
    """SlimInfer, a long document, and limits under which `share` of its K/V stay on the device."""
    method = make_method("sliminfer", {**METHODS["sliminfer"], **options})
    decoder = cuda_decoder("llama", torch.bfloat16)
    planned = method.plan(decoder.shape, [490]).kv_bytes(2, 40)
    limits = KvLimits(device_bytes=int(planned * share), host_bytes=1 << 30)
    return method, decoder, Pack.of([document(490, seed=3)], CUDA), limits


@pytest.mark.parametrize("name", BACKENDS)
def test_with_every_block_active_an_offloaded_cache_answers_as_one_that_stays(name, monkeypatch):
    method, decoder, pack, _ = offloading(1.0)
    backend = backend_named(name, sizes={"heads": 4, "kv_heads": 2, "head_dim": 64})
    expected = answer_of(decoder, backend, prefill(decoder, backend, method, pack, 40), 40)

    def always_offload(plan, new_tokens, _, *, device, itemsize, score, dtype):
        room = KvLimits(device_bytes=plan.kv_bytes(itemsize, new_tokens), host_bytes=1 << 30)
        return OffloadedCache(plan, plan.rescoring, new_tokens, room, device, itemsize, score)

    monkeypatch.setattr("pipeline.model.prefill.make_cache", always_offload)
    moved = prefill(decoder, backend, method, pack, 40)
    assert answer_of(decoder, backend, moved, 40) == expected
    assert moved.cache.counts.decisions > 0


def test_copies_that_lag_or_hurry_change_no_token(monkeypatch):
    """Delays of the copying and of the computing stream, drawn anew for each copy and each layer.

    Also where tokens are looked at while the next step is on its way, and where they are not.
    """
    method, decoder, pack, limits = offloading(0.55, gamma=1.0)
    backend = backend_named("sdpa", sizes={"heads": 4, "kv_heads": 2, "head_dim": 64})
    synchronous = prefill(decoder, backend, method, pack, 40, limits=replace(limits, synchronous=True))
    expected = answer_of(decoder, backend, synchronous, 40)
    assert synchronous.cache.counts.swaps > 10
    real_copy, real_qkv, real_step = Copier.copy, decoder.qkv, decoder.step_layer_
    random = np.random.default_rng(0)

    def slow_copy(self, target, source):
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(int(random.integers(0, 200_000)) * int(random.integers(0, 2)))
        real_copy(self, target, source)

    def delay():
        torch.cuda._sleep(int(random.integers(0, 2_000_000)) * int(random.integers(0, 2)))

    def slow_qkv(*arguments, **named):  # of a prefill, and of a step without kernels of its own
        delay()
        return real_qkv(*arguments, **named)

    def slow_step(layer, hidden, rope, target, attend, normed=None):
        def slow_attend(q):
            delay()
            return attend(q)

        delay()
        return real_step(layer, hidden, rope, target, slow_attend, normed)

    monkeypatch.setattr(Copier, "copy", slow_copy)
    monkeypatch.setattr(decoder, "qkv", slow_qkv)
    monkeypatch.setattr(decoder, "step_layer_", slow_step)
    for turn in range(6):
        prefilled = prefill(decoder, backend, method, pack, 40, limits=limits)
        assert answer_of(decoder, backend, prefilled, 40, late=turn % 2) == expected
        assert prefilled.cache.counts.swaps == synchronous.cache.counts.swaps


def test_offloading_frees_the_device_after_a_pack_and_after_an_exception():
    method, decoder, pack, limits = offloading(0.55)
    backend = backend_named("sdpa", sizes={"heads": 4, "kv_heads": 2, "head_dim": 64})
    layers = iter(range(2))

    def run():
        answer_of(decoder, backend, prefill(decoder, backend, method, pack, 40, limits=limits), 40)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = run()
    assert run() == before
    with pytest.raises(StopIteration):
        prefill(decoder, backend, method, pack, 40, lambda: next(layers), limits)
    assert run() == before


def test_linear_layers_in_fp8_stay_close_and_tiers_count(monkeypatch):
    decoder = cuda_decoder("qwen2", torch.bfloat16)
    backend = backend_named("sdpa")
    pack = Pack.of([document(400), document(33, seed=1)], CUDA)
    full = prefill(decoder, backend, Dense(), pack).logits_BV
    tiers = MarsInfer(low="fp8", start_layer=1, eta=0.8, eta_high=0.4, window=8, prefix=8)
    decoder.use_linears("fp8", ffn=True, keep=True)
    for method in (Dense(), tiers):
        prefilled = prefill(decoder, backend, method, pack)
        assert torch.isfinite(prefilled.logits_BV).all()
    assert all(work.ffn_fp8_tokens > 0 for (layers,) in prefilled.by_document() for work in layers[1:-1])
    assert [layers[-1].ffn_tokens for (layers,) in prefilled.by_document()] == [1, 1]
    fp8 = prefill(decoder, backend, Dense(), pack).logits_BV
    assert 0 < (fp8 - full).norm() / full.norm() < 0.3
    decoder.use_linears("mixed", keep=True)
    # on a GPU documents as short as these gain nothing
    assert torch.equal(prefill(decoder, backend, Dense(), pack).logits_BV, full)
    monkeypatch.setattr("pipeline.model.precision.LEAST_WORK", 0)
    mixed = prefill(decoder, backend, Dense(), pack)
    assert 0 < (mixed.logits_BV - full).norm() < (fp8 - full).norm() / 2
    assert [works[0].ffn_fp8_tokens for (works,) in mixed.by_document()] == [400 - 64, 0]
    decoder.use_linears("auto")
    assert torch.equal(prefill(decoder, backend, Dense(), pack).logits_BV, full)
