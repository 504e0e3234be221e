"""Windows, experts and LongRoPE on a GPU: the backends, torch's grouped product, and steps in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from family_cases import SLIDING, documents, model_of
from steps_from_python import FromPython

from pipeline.errors import ConfigError
from pipeline.families.experts import grouped_product
from pipeline.kernels import reference
from pipeline.kernels.attention import BACKENDS, DecodeSlots, choose_attention
from pipeline.kernels.segments import Segments
from pipeline.model.decode import StopRules, decode
from pipeline.model.graphs import DecodeStats
from pipeline.model.loading import attention_for
from pipeline.model.prefill import Pack, prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
SEGMENTS = (700, 1, 64, 3000)
NEW_TOKENS = 40


@pytest.mark.parametrize("window", [1, 48, 1024])
@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_has_windows(name, window):
    sizes = {"heads": 8, "kv_heads": 2, "head_dim": 64}
    try:
        backend, _ = choose_attention(name, device=CUDA, dtype=torch.bfloat16, slides=True, **sizes)
    except ConfigError as error:
        pytest.skip(str(error))
    segments, generator = Segments.of(SEGMENTS, CUDA), torch.Generator(device=CUDA).manual_seed(0)
    q, k, v = (
        torch.randn(segments.total, heads, 64, generator=generator, device=CUDA).bfloat16()
        for heads in (8, 2, 2)
    )
    expected = reference.causal_attention(q, k, v, segments, window)
    found = backend.prefill_within(q, k, v, segments, window)
    assert (found - expected).norm() / expected.norm() < 0.01
    for queries in ((1, 1, 1, 1), (3, 1, 2, 5), (200, 1, 64, 300)):
        ends = zip(segments.offsets[1:], queries, strict=True)
        last = torch.cat([torch.arange(end - count, end, device=CUDA) for end, count in ends])
        slots = DecodeSlots.of(segments.offsets[:-1], segments.lengths, segments.total, CUDA, queries)
        found = backend.decode(q[last], k, v, slots.within(window))
        assert (found - expected[last]).norm() / expected[last].norm() < 0.01


def test_the_grouped_product_is_that_of_each_group():
    generator = torch.Generator(device=CUDA).manual_seed(0)
    x = torch.randn(300, 128, generator=generator, device=CUDA).bfloat16()
    weights = torch.randn(6, 256, 128, generator=generator, device=CUDA).bfloat16()
    ends = torch.tensor([0, 7, 7, 200, 299, 300], dtype=torch.int32, device=CUDA)
    found = grouped_product(x, weights, ends).float()
    expected = grouped_product(x.float(), weights.float(), ends)  # one by one
    assert (found - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("method", [Dense(), Mars(last_full=1, window=30)], ids=lambda method: method.name)
@pytest.mark.parametrize("name", [*SLIDING, "qwen3_moe", "mixtral", "phi3-long", "granite", "olmo2"])
def test_a_graph_gives_the_tokens_of_its_steps_run_from_python(name, method, monkeypatch):
    decoder = model_of(name, torch.bfloat16, CUDA)
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
    monkeypatch.setattr("pipeline.model.decode.recorder_for", lambda device, *_: FromPython(device))
    assert answers()[0] == replayed


@pytest.mark.parametrize("name", [*SLIDING, "qwen3_moe", "mixtral", "phi3-long"])
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
