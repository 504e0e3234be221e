"""Linear layers and experts in fp8, by torch's slow path, of every family: near the model's dtype."""

from __future__ import annotations

import pytest
import torch
from conftest import document, pack_of
from family_cases import CASES, documents, model_of

from pipeline.families.projection import LinearPrecision, Norm
from pipeline.families.residual import ResidualSums
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars

EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss")


@pytest.mark.parametrize("linears", ["fp8", "mixed"])
@pytest.mark.parametrize("name", CASES)
def test_fp8_is_near_bfloat16(name, linears, sdpa, monkeypatch):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    decoder = model_of(name, torch.bfloat16)
    expected = prefill(decoder, sdpa, Dense(), pack_of(*documents())).logits_BV
    decoder.use_linears(linears, keep=True)
    prefilled = prefill(decoder, sdpa, Dense(), pack_of(*documents()), new_tokens=2)
    distance = (prefilled.logits_BV - expected).norm() / expected.norm()
    # rounding may give a token other experts, of which `test_experts_in_fp8` rules the effect out
    assert 0 < distance < (0.7 if decoder.shape.experts else 0.25)
    decoder.piece_tokens = 7
    pieced = prefill(decoder, sdpa, Dense(), pack_of(*documents())).logits_BV
    # attention in pieces is rounded otherwise, which rounding to fp8 makes more of
    assert (pieced - prefilled.logits_BV).norm() <= 0.12 * pieced.norm()
    monkeypatch.setattr("pipeline.families.decoder.has_kernels", lambda x: True)
    answers = decode(decoder, sdpa, prefilled, StopRules(max_new_tokens=2))
    assert [len(answer.tokens) for answer in answers] == [2, 2, 2]


# How many sums of attention and of the FFN are normed for their readers. Of four layers the last has no such
# sums, experts read their norm otherwise, and `mixed` has queries, keys and values in fp8 in layer 2 alone.
NORMED = [
    ("qwen2", "fp8", 3 + 3),
    ("qwen2", "mixed", 3 + 1),
    ("qwen3", "mixed", 3 + 1),
    ("smollm3", "fp8", 3 + 3),
    ("qwen3_moe", "fp8", 0 + 3),
    ("qwen3_moe", "mixed", 0 + 1),
    *[(name, "fp8", 0) for name in ("gemma3_text", "olmo2", "granite")],
]


@pytest.mark.parametrize("lengths", [(600,), (150, 70)])
@pytest.mark.parametrize(("name", "linears", "sums"), NORMED)
def test_norms_with_the_sums_before_them_change_no_bit(name, linears, sums, lengths, sdpa, monkeypatch):
    """A pack of short documents has so many tokens in bfloat16 with `mixed` that the others are gathered."""
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    decoder, pack = model_of(name, torch.bfloat16), pack_of(*(document(n, seed=n) for n in lengths))
    decoder.use_linears(linears)
    normed, quantised_sum_ = [], Norm.quantised_sum_
    monkeypatch.setattr(
        Norm, "quantised_sum_", lambda *given: normed.append(len(given[1])) or quantised_sum_(*given)
    )

    def run(method, piece):
        normed.clear()
        decoder.piece_tokens = piece
        prefilled = prefill(decoder, sdpa, method, pack)
        return len(normed), [prefilled.logits_BV, *prefilled.cache.keys, *prefilled.cache.values]

    cases = [
        (Dense(), 1 << 14),
        (Dense(), 160),
        (Mars(last_full=2, window=70, most=70), 1 << 14),
        (Dense(), 60),
    ]
    fused = [run(*case) for case in cases]
    monkeypatch.setattr(ResidualSums, "room", lambda *_, **__: None)
    for (_, made), case in zip(fused, cases, strict=True):
        none, expected = run(*case)
        assert none == 0
        assert all(map(torch.equal, made, expected))
    if linears == "fp8" or lengths == (600,):
        assert fused[0][0] == sums
        assert fused[1][0] == sums * -(-sum(lengths) // 160)
    assert fused[3][0] == 0 or lengths != (600,)  # in several pieces of queries


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(EXPERTS)])
def test_experts_in_fp8(name, monkeypatch):
    """Of the same router, so that all tokens have the same experts."""
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    decoder = model_of(name, torch.bfloat16)
    decoder.use_linears("fp8", keep=True)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, decoder.shape.hidden, generator=generator).bfloat16()
    for layer in range(decoder.shape.layers):
        full, low = hidden.clone(), hidden.clone()
        decoder.add_feed_forward_(layer, full, fp8=False)
        decoder.add_feed_forward_(layer, low, fp8=True)
        assert 0 < (low - full).norm() / (full - hidden).norm() < 0.1


@pytest.mark.parametrize(
    ("precision", "forms"),
    [
        ({"linears": "auto"}, (True, False)),
        ({"linears": "mixed"}, (False, True)),
        ({"linears": "fp8"}, (False, True)),
        ({"linears": "auto", "ffn": True}, (True, True)),
        ({"linears": "mixed", "ffn": True}, (True, True)),
    ],
)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss-windows"])
def test_in_which_numbers_experts_are_held(name, precision, forms, monkeypatch):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    decoder = model_of(name, torch.bfloat16)
    wanted = LinearPrecision(**precision)
    decoder.use_linears(wanted.linears, ffn=wanted.ffn)
    for layer in decoder._layers:
        for projection in (layer.experts.gate_up, layer.experts.down):
            assert (projection.weight is not None, projection.fp8 is not None) == forms
