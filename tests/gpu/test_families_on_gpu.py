"""Windows, sinks, experts and LongRoPE on a GPU: backends, torch's grouped products, steps in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from family_cases import SLIDING, documents, model_of
from steps_from_python import FromPython

from pipeline.errors import ConfigError
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.generation.graphs import DecodeStats
from pipeline.kernels import reference, sparse
from pipeline.kernels.attention import BACKENDS, DecodeSlots, choose_attention
from pipeline.kernels.blocks.block_attention import block_sparse_attention
from pipeline.kernels.expert_products import Groups, grouped_fp8_product, grouped_product
from pipeline.kernels.fp8 import Fp8Weight
from pipeline.kernels.fused import quantize_rows
from pipeline.kernels.segments import Segments
from pipeline.model.loading import attention_for
from pipeline.model.prefill import Pack, prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
SEGMENTS = (700, 1, 64, 3000)
NEW_TOKENS = 40


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 48, 1024])
@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_has_windows_and_sinks(name, window, sinks):
    sizes = {"heads": 8, "kv_heads": 2, "head_dim": 64}
    try:
        backend, _ = choose_attention(
            name, device=CUDA, dtype=torch.bfloat16, slides=True, sinks=sinks, **sizes
        )
    except ConfigError as error:
        pytest.skip(str(error))
    sinks_H = torch.arange(-4.0, 4.0, device=CUDA) if sinks else None
    segments, generator = Segments.of(SEGMENTS, CUDA), torch.Generator(device=CUDA).manual_seed(0)
    q, k, v = (
        torch.randn(segments.total, heads, 64, generator=generator, device=CUDA).bfloat16()
        for heads in (8, 2, 2)
    )
    expected = reference.causal_attention(q, k, v, segments, window, sinks_H)
    found = backend.prefill(q, k, v, segments, window, sinks_H)
    assert (found - expected).norm() / expected.norm() < 0.01
    for queries in ((1, 1, 1, 1), (3, 1, 2, 5), (200, 1, 64, 300)):
        ends = zip(segments.offsets[1:], queries, strict=True)
        last = torch.cat([torch.arange(end - count, end, device=CUDA) for end, count in ends])
        slots = DecodeSlots.of(segments.offsets[:-1], segments.lengths, segments.total, CUDA, queries)
        found = backend.decode(q[last], k, v, slots.within(window), sinks_H)
        assert (found - expected[last]).norm() / expected[last].norm() < 0.01


def test_the_grouped_product_is_that_of_each_group():
    generator = torch.Generator(device=CUDA).manual_seed(0)
    x = torch.randn(300, 128, generator=generator, device=CUDA).bfloat16()
    weights = torch.randn(6, 256, 128, generator=generator, device=CUDA).bfloat16()
    ends = torch.tensor([0, 7, 7, 200, 299, 300], dtype=torch.int32, device=CUDA)
    found = grouped_product(x, weights, ends).float()
    expected = grouped_product(x.float(), weights.float(), ends)  # one by one
    assert (found - expected).norm() / expected.norm() < 0.01


needs_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="torch multiplies groups of rows in fp8 on Hopper alone",
)


@needs_hopper
@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        (300, [0, 7, 7, 200, 299, 300]),  # sizes that divide by nothing, and groups of no rows
        (6, [1, 2, 3, 4, 5, 6]),
        (3, [0, 0, 3, 3, 3, 3]),
        (40_000, [9_000, 9_001, 20_000, 20_000, 33_333, 40_000]),
    ],
)
@pytest.mark.parametrize("sizes", [(1536, 2048), (2048, 768), (2880, 2880), (48, 64)])
def test_the_grouped_fp8_product_is_that_of_each_group(rows, ends, sizes):
    generator = torch.Generator(device=CUDA).manual_seed(0)
    outputs, inputs = sizes
    x = torch.randn(rows, inputs, generator=generator, device=CUDA).bfloat16()
    weights = torch.randn(6, outputs, inputs, generator=generator, device=CUDA).bfloat16()
    quantised, scale = quantize_rows(x)
    weight = Fp8Weight.of(weights)
    ends_E = torch.tensor(ends, dtype=torch.int32, device=CUDA)
    found = grouped_fp8_product(quantised, scale, weight, ends_E).float()
    stored = weight.quantised.float() * weight.scale.transpose(1, 2)
    expected = grouped_product(quantised.float() * scale, stored, ends_E)  # one by one
    assert (found - expected).norm() / expected.norm() < 0.005
    exact = grouped_product(x, weights, ends_E).float()
    assert 0.005 < (found - exact).norm() / exact.norm() < 0.06


def test_rows_are_grouped_as_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    expert_TA = torch.rand(5000, 12, generator=generator).topk(3).indices
    made = torch.randn(15_000, 64, generator=generator).bfloat16()
    weights = torch.rand(5000, 3, generator=generator).bfloat16()
    on_cpu, on_gpu = Groups.of(expert_TA, 12), Groups.of(expert_TA.to(CUDA), 12)
    for part in ("order_S", "expert_S", "ends_E", "place_TA"):
        assert torch.equal(getattr(on_gpu, part).cpu(), getattr(on_cpu, part))
    quantised, _ = quantize_rows(made[:5000].to(CUDA))
    assert torch.equal(on_gpu.gathered(quantised).cpu().float(), on_cpu.gathered(quantised.cpu()).float())
    summed = on_gpu.weighted_sum(made.to(CUDA), weights.to(CUDA)).cpu().double()
    expected = (made.double()[on_cpu.place_TA] * weights.double()[..., None]).sum(1)
    assert (summed - expected).norm() / expected.norm() < 0.005


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mass", [0.0, 0.5, 1.0])
def test_block_sparse_attention_has_sinks(mass, head_dim):
    generator = torch.Generator(device=CUDA).manual_seed(0)
    joined = torch.randn(3001, 12, head_dim, generator=generator, device=CUDA).bfloat16()
    q, k, v = joined.split((8, 2, 2), dim=1)
    sinks_H = torch.arange(-4.0, 4.0, device=CUDA)
    blocks = sparse.choose_blocks(q, k, mass)
    found = block_sparse_attention(q, k, v, blocks, sinks_H=sinks_H)
    chosen = (
        sparse.choose_blocks(q.cpu().float(), k.cpu().float(), mass) if blocks.indices is None else blocks
    )
    on_cpu = sparse.BlockLists(chosen.indices.cpu(), chosen.counts.cpu())
    host = [x.cpu().float() for x in (q, k, v)]
    expected = block_sparse_attention(*host, on_cpu, sinks_H=sinks_H.cpu())
    assert (found.cpu() - expected).norm() / expected.norm() < 0.01


@needs_hopper
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral-windows", "gpt_oss", "gpt_oss-windows"])
def test_experts_in_fp8_are_near_those_in_bfloat16(name):
    decoder = model_of(name, torch.bfloat16, CUDA)
    decoder.use_linears("fp8", keep=True)
    hidden = torch.randn(700, decoder.shape.hidden, device=CUDA).bfloat16()
    for layer in range(decoder.shape.layers):
        full, low = hidden.clone(), hidden.clone()
        decoder.add_feed_forward_(layer, full, fp8=False)
        decoder.add_feed_forward_(layer, low, fp8=True)
        assert 0 < (low - full).norm() / (full - hidden).norm() < 0.1


@pytest.mark.parametrize("method", [Dense(), Mars(last_full=1, window=30)], ids=lambda method: method.name)
@pytest.mark.parametrize(
    ("name", "linears"),
    [
        *((name, "auto") for name in (*SLIDING, "qwen3_moe", "mixtral", "phi3-long", "granite", "olmo2")),
        ("gpt_oss", "auto"),
        *(
            pytest.param(name, linears, marks=needs_hopper)
            for name in ("qwen3_moe", "mixtral", "gpt_oss", "gpt_oss-windows")
            for linears in ("fp8", "mixed")
        ),
    ],
)
def test_a_graph_gives_the_tokens_of_its_steps_run_from_python(name, linears, method, monkeypatch):
    decoder = model_of(name, torch.bfloat16, CUDA)
    decoder.use_linears(linears)
    attention, _ = attention_for("auto", CUDA, decoder.dtype, decoder.shape)

    def answers():
        pack, stats = Pack.of(documents(), CUDA), DecodeStats()
        prefilled = prefill(decoder, attention, method, pack, new_tokens=NEW_TOKENS)
        rules = StopRules(max_new_tokens=NEW_TOKENS)
        made = decode(decoder, attention, prefilled, rules, stats=stats)
        assert stats.failure is None
        return [answer.tokens for answer in made], stats.replayed_steps

    replayed, steps = answers()
    assert steps > 0
    monkeypatch.setattr("pipeline.generation.graphs.recorder_for", lambda device, *_: FromPython(device))
    assert answers()[0] == replayed


@pytest.mark.parametrize("name", [*SLIDING, "qwen3_moe", "mixtral", "phi3-long", "gpt_oss"])
def test_logits_are_those_of_a_cpu(name):
    on_cpu, on_gpu = model_of(name), model_of(name, torch.bfloat16, CUDA)
    weights = zip(on_gpu.model.parameters(), on_cpu.model.parameters(), strict=True)
    with torch.no_grad():
        for target, source in weights:
            target.copy_(source)
    on_gpu = type(on_gpu)(on_gpu.model)
    made = []
    for decoder in (on_cpu, on_gpu):
        attention, _ = attention_for("auto", decoder.device, decoder.dtype, decoder.shape)
        pack = Pack.of(documents(), decoder.device)
        made.append(prefill(decoder, attention, Dense(), pack).logits_BV.cpu())
    assert (made[0] - made[1]).norm() / made[0].norm() < 0.1
