"""Documents computed once for several questions, on a GPU: prompts' own prefill, and answers from graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document

from pipeline.checkpoints.building import random_model
from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.kernels.attention import choose_attention
from pipeline.kernels.fused import FP8
from pipeline.model.graphs import DecodeStats
from pipeline.model.prefill import Pack, prefill
from pipeline.model.shared import prefill_behind, prefill_prefixes
from pipeline.pruning.registry import make_method
from pipeline.records import EncodedDocument, Row, Spans

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 64}
METHODS = {
    "dense": {},
    "marsinfer": {"start_layer": 2, "window": 16, "prefix": 8, "eta": 0.8},
    "sliminfer": {"layers": (1, 3), "budget": (0.6, 0.4), "block": 16, "unit": 4},
    "gemfilter": {"layer": 2, "keep": 64.0},
    "mars": {"last_full": 2},
}
DOCUMENTS = (5000, 300, 77)
OF_PREFIX = (0, 1, 0, 2, 0, 1, 0, 0)


def cuda_decoder(family, dtype):
    sizes = {**SIZES, **FAMILY_SETTINGS[family], **{"num_attention_heads": 4, "head_dim": 64}}
    sizes["max_position_embeddings"] = 8192
    model = random_model(family, sizes, device=CUDA, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return Decoder(model)


def backend_named(name, dtype):
    try:
        return choose_attention(name, device=CUDA, dtype=dtype, **HEADS)[0]
    except ConfigError as error:
        pytest.skip(str(error))


def prefixes():
    return [document(length, seed=length).input_ids for length in DOCUMENTS]


def prompts():
    made = []
    for row, g in enumerate(OF_PREFIX):
        known = prefixes()[g]
        behind = np.random.default_rng(row).integers(0, SIZES["vocab_size"], 5 + 11 * row)
        spans = Spans(document=(1, len(known)), question=(len(known), len(known) + len(behind)))
        source = Row(row=row, id=str(row), place="")
        ids = np.concatenate([known, behind])
        made.append(EncodedDocument(source=source, input_ids=ids, spans=spans))
    return made


def grouped(decoder, backend, method, new_tokens):
    layers = method.shared_layers(decoder.shape)
    shared = prefill_prefixes(decoder, backend, method, prefixes(), layers)
    return prefill_behind(decoder, backend, method, shared, prompts(), OF_PREFIX, new_tokens)


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
@pytest.mark.parametrize("name", METHODS)
def test_in_fp32_it_equals_the_prefill_of_each_prompt(name, family):
    decoder, backend = cuda_decoder(family, torch.float32), backend_named("sdpa", torch.float32)
    # without block-sparse attention, which computes more of a document that is shared
    method = make_method(name, {**METHODS[name], "sparse_attention": None})
    together = grouped(decoder, backend, method, 8)
    whole = prefill(decoder, backend, method, Pack.of(prompts(), CUDA), new_tokens=8)
    assert (together.logits_BV - whole.logits_BV).abs().max() < 1e-3
    assert together.by_document() == whole.by_document()
    rules = StopRules(max_new_tokens=9)
    expected = [answer.tokens for answer in decode(decoder, backend, whole, rules)]
    assert [answer.tokens for answer in decode(decoder, backend, together, rules)] == expected


@pytest.mark.parametrize("backend_name", ["fa3", "flash", "cudnn", "varlen", "sdpa"])
@pytest.mark.parametrize("name", METHODS)
def test_in_bf16_it_is_near_on_each_backend(name, backend_name):
    backend = backend_named(backend_name, torch.bfloat16)
    decoder, method = cuda_decoder("qwen2", torch.bfloat16), make_method(name, METHODS[name])
    together = grouped(decoder, backend, method, 8)
    whole = prefill(decoder, backend, method, Pack.of(prompts(), CUDA), new_tokens=8)
    assert torch.isfinite(together.logits_BV).all()
    if name in ("dense", "mars"):  # others may choose other tokens where scores are near
        error = (together.logits_BV - whole.logits_BV).norm() / whole.logits_BV.norm()
        assert error < 0.1


@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # whose steps run by other kernels
@pytest.mark.parametrize("name", METHODS)
def test_answers_from_graphs_are_those_from_python(name, family, kv_dtype):
    backend = backend_named("varlen", torch.bfloat16)
    decoder, method = cuda_decoder(family, torch.bfloat16), make_method(name, METHODS[name])
    rules, stats = StopRules(max_new_tokens=40), DecodeStats()
    options = {"rules": rules, "kv_dtype": kv_dtype}
    together = grouped(decoder, backend, method, 40)
    replayed = [answer.tokens for answer in decode(decoder, backend, together, **options, stats=stats)]
    together = grouped(decoder, backend, method, 40)
    eager = [answer.tokens for answer in decode(decoder, backend, together, **options, graphs=False)]
    assert stats.captures == 1
    assert replayed == eager


def test_steps_over_e4m3_are_near_those_over_all_bits():
    """Of a model whose answers repeat themselves little: most first tokens are the same."""
    backend, decoder = backend_named("varlen", torch.bfloat16), cuda_decoder("qwen2", torch.bfloat16)
    method, rules = make_method("dense"), StopRules(max_new_tokens=3)
    answers = {}
    for kv_dtype in (None, FP8):
        together = grouped(decoder, backend, method, 3)
        answers[kv_dtype] = [
            answer.tokens for answer in decode(decoder, backend, together, rules, kv_dtype=kv_dtype)
        ]
    pairs = list(zip(answers[None], answers[FP8], strict=True))
    assert sum(a[:2] == b[:2] for a, b in pairs) >= len(pairs) // 2
