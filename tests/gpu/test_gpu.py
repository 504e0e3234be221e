"""What only a GPU can show: each attention backend, bf16 scoring, and the whole prefill and decode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document

from pipeline.errors import ConfigError
from pipeline.kernels import reference
from pipeline.kernels.attention import BACKENDS, choose_attention
from pipeline.kernels.scoring import window_importance
from pipeline.kernels.segments import Segments
from pipeline.model.adapters import DecoderAdapter, random_model
from pipeline.model.decode import StopRules, decode
from pipeline.model.prefill import Pack, prefill
from pipeline.model.sampling import Sampler, Sampling
from pipeline.pruning.dense import Dense
from pipeline.pruning.marsinfer import MarsInfer

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
    decoded = backend.decode(q[last], keys, values, starts, list(segments.lengths))
    assert (decoded - expected[last]).norm() / expected[last].norm() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_agrees_with_the_reference(dtype):
    segments = Segments.of((2000, 30, 333), CUDA)
    q, k, _ = random_qkv(segments, dtype)
    expected = reference.window_importance(q, k, segments, window=50)
    assert (
        window_importance(q, k, segments, window=50) - expected
    ).abs().max() < 1e-4 * expected.max() + 1e-7


def cuda_adapter(family, dtype):
    sizes = {**SIZES, **FAMILY_SETTINGS[family], "num_attention_heads": 4, "head_dim": 64}
    model = random_model(family, sizes, device=CUDA, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return DecoderAdapter(model)


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
def test_dense_in_fp32_gives_the_logits_and_tokens_of_stock_transformers(family):
    adapter = cuda_adapter(family, torch.float32)
    backend = backend_named("sdpa", torch.float32)
    doc = document(300)
    prefilled = prefill(adapter, backend, Dense(), Pack.of([doc], CUDA), new_tokens=8)
    ids = torch.from_numpy(doc.input_ids)[None].to(CUDA)
    with torch.inference_mode():
        stock = adapter.model(ids).logits[0, -1]
    assert (prefilled.logits_BV[0] - stock).abs().max() < 1e-3
    sampler = Sampler(Sampling(), [0])
    first = sampler.draw(prefilled.logits_BV, [0])
    answer = decode(adapter, backend, prefilled, first, sampler, StopRules(max_new_tokens=8))[0].tokens
    mask = torch.ones_like(ids)
    assert (
        answer
        == adapter.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[
            0, 300:
        ].tolist()
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_a_bf16_pack_agrees_with_its_documents_alone(name):
    """Matrix shapes change bf16 sums, so the logits' distance is bounded rather than zero."""
    adapter = cuda_adapter("qwen2", torch.bfloat16)
    backend = backend_named(name, sizes={"heads": 4, "kv_heads": 2, "head_dim": 64})
    method = MarsInfer(share=0.5, start_layer=1, window=8, prefix=8)
    documents = [document(n, seed=n) for n in (400, 33, 120)]
    together = prefill(adapter, backend, method, Pack.of(documents, CUDA))
    for b, doc in enumerate(documents):
        alone = prefill(adapter, backend, method, Pack.of([doc], CUDA))
        distance = (together.logits_BV[b] - alone.logits_BV[0]).norm() / alone.logits_BV[0].norm()
        assert distance < 0.05
        assert [row[b] for row in together.work.ffn()] == [row[0] for row in alone.work.ffn()]


@pytest.mark.parametrize("name", BACKENDS)
def test_what_memory_held_before_does_not_reach_an_answer(name):
    adapter = cuda_adapter("qwen2", torch.bfloat16)
    backend = backend_named(name, sizes={"heads": 4, "kv_heads": 2, "head_dim": 64})
    doc = document(200)

    def answer():
        prefilled = prefill(adapter, backend, Dense(), Pack.of([doc], CUDA), new_tokens=40)
        sampler = Sampler(Sampling(), [0])
        first = sampler.draw(prefilled.logits_BV, [0])
        return decode(adapter, backend, prefilled, first, sampler, StopRules(max_new_tokens=40))[0].tokens

    expected = answer()
    torch.cuda.empty_cache()
    waste = [
        torch.full((n,), float("nan"), device=CUDA, dtype=torch.bfloat16) for n in [2**15] * 200 + [2**26]
    ]
    del waste
    assert answer() == expected


def test_dense_copies_nothing_to_the_host():
    """The prefill of a method that keeps all tokens must not wait for the device."""
    adapter = cuda_adapter("llama", torch.bfloat16)
    backend = backend_named("sdpa")
    pack = Pack.of([document(200), document(50, seed=1)], CUDA)
    prefill(adapter, backend, Dense(), pack)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefilled = prefill(adapter, backend, Dense(), pack)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(prefilled.logits_BV.cpu().numpy()).all()
