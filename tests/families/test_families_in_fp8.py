"""Linear layers in fp8, by torch's slow path, of every family that has no experts: near the model's dtype."""

from __future__ import annotations

import pytest
import torch
from conftest import pack_of
from family_cases import CASES, documents, model_of

from pipeline.model.decode import StopRules, decode
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense

NAMES = [name for name in CASES if not name.startswith(("qwen3_moe", "mixtral"))]


@pytest.mark.parametrize("linears", ["fp8", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_fp8_is_near_bfloat16(name, linears, sdpa, monkeypatch):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    decoder = model_of(name, torch.bfloat16)
    expected = prefill(decoder, sdpa, Dense(), pack_of(*documents())).logits_BV
    decoder.use_linears(linears, keep=True)
    prefilled = prefill(decoder, sdpa, Dense(), pack_of(*documents()), new_tokens=2)
    distance = (prefilled.logits_BV - expected).norm() / expected.norm()
    assert 0 < distance < 0.25
    decoder.piece_tokens = 7
    pieced = prefill(decoder, sdpa, Dense(), pack_of(*documents())).logits_BV
    assert (pieced - prefilled.logits_BV).norm() <= 0.05 * pieced.norm()
    monkeypatch.setattr("pipeline.families.decoder.has_kernels", lambda x: True)
    answers = decode(decoder, sdpa, prefilled, StopRules(max_new_tokens=2))
    assert [len(answer.tokens) for answer in answers] == [2, 2, 2]
