"""Methods that hold keys before RoPE, and their kernels, on a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document, sharpened

from pipeline.checkpoints.building import random_model
from pipeline.families.decoder import Decoder
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.kernels import scoring, sparse
from pipeline.kernels.attention import SdpaAttention, choose_attention
from pipeline.kernels.blocks import block_attention
from pipeline.kernels.blocks.block_attention import block_sparse_attention
from pipeline.model.prefill import Pack, prefill
from pipeline.pruning.registry import make_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
METHODS = {
    "hip": {"keys": 64, "sink": 64, "window": 64, "dense_below": 0},
    "cascade": {"tokens": 128, "sink": 4, "chunk": 32},
}


def model_on(device, dtype):
    settings = {**SIZES, **FAMILY_SETTINGS["qwen2"], "hidden_size": 256}
    drawn = sharpened(random_model("qwen2", settings, device=CPU, dtype=torch.float32))
    made = random_model("qwen2", settings, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter, weight in zip(made.parameters(), drawn.parameters(), strict=True):
            parameter.copy_(weight)
    return Decoder(made)


@pytest.mark.parametrize("length", [490, 1500], ids=["within the context", "beyond it"])
@pytest.mark.parametrize("name", METHODS)
def test_each_works_on_the_gpu_as_on_the_cpu(name, length):
    method, logits, counts = make_method(name, METHODS[name]), [], []
    for device in (CPU, CUDA):
        decoder = model_on(device, torch.float32)
        pack = Pack.of([document(length)], device)
        prefilled = prefill(decoder, SdpaAttention(), method, pack, new_tokens=12)
        logits.append(prefilled.logits_BV.cpu())
        counts.append(prefilled.by_document())
        (answer,) = decode(decoder, SdpaAttention(), prefilled, StopRules(max_new_tokens=12))
        assert len(answer.tokens) == 12
    assert counts[0] == counts[1]
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 0.05


@pytest.mark.parametrize("length", [490, 1500])
@pytest.mark.parametrize("name", METHODS)
def test_each_runs_in_bfloat16_behind_the_fastest_backend(name, length):
    decoder = model_on(CUDA, torch.bfloat16)
    shape = decoder.shape
    sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    backend, _ = choose_attention("auto", device=CUDA, dtype=torch.bfloat16, **sizes)
    method, pack = make_method(name, METHODS[name]), Pack.of([document(length)], CUDA)
    prefilled = prefill(decoder, backend, method, pack, new_tokens=40)
    assert torch.isfinite(prefilled.logits_BV).all()
    (answer,) = decode(decoder, backend, prefilled, StopRules(max_new_tokens=40))
    assert answer.finish_reason == "length"


def plain(function, *arguments, module=sparse, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_kernels", lambda x: None)
        return function(*arguments, **options)


def drawn(*shape, seed=0):
    generator = torch.Generator(device=CUDA).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=CUDA).bfloat16()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_of_64_in_bfloat16(head_dim):
    q, k, v = (drawn(2000, heads, head_dim, seed=heads) for heads in (8, 2, 2))
    rows = -(-2000 // 64)
    kept = (torch.rand(8, rows, rows, device=CUDA) < 0.3) | torch.eye(rows, device=CUDA).bool()
    blocks = sparse._lists(kept & torch.ones_like(kept).tril())
    got = block_sparse_attention(q, k, v, blocks, block=64)
    expected = plain(
        block_sparse_attention, q.float(), k.float(), v.float(), blocks, block=64, module=block_attention
    )
    assert (got - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize(("chunk", "queries"), [(256, 16), (64, 64), (8, 64), (8, 4)])
def test_the_best_products_in_bfloat16(chunk, queries):
    q, k = drawn(8, 5, queries, 128), drawn(9000, 2, 128, seed=1)
    starts = torch.arange(256, 9000, chunk, device=CUDA).expand(8, 5, -1)
    stops = torch.tensor([300, 2048, 4096, 8192, 8960], device=CUDA)
    got, expected = (run(sparse.best_products, q, k, starts, stops, chunk) for run in (call, plain))
    assert torch.equal(torch.isinf(got), torch.isinf(expected))
    seen = ~torch.isinf(expected)
    # of two halves that are as good to the last bit either may go on
    assert ((got - expected)[seen].abs() < 0.01 * expected[seen].abs() + 1e-3).float().mean() > 0.999


def call(function, *arguments):
    return function(*arguments)


@pytest.mark.parametrize("queries", [1, 1024])
def test_attention_received_in_bfloat16(queries):
    q, k = drawn(queries, 8, 128), drawn(9000, 2, 128, seed=1)
    got = scoring.attention_received(q, k, 0.9999)
    expected = plain(scoring.attention_received, q.float(), k.float(), 0.9999, module=scoring)
    assert (got - expected).norm() / expected.norm() < 0.01
