"""Models of every family in folders, under the names that transformers gives their tensors there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock import CASES, model_of, stock_logits

from pipeline.checkpoints.random_weights import byte_tokenizer
from pipeline.errors import ModelError
from pipeline.families.supported import FAMILIES
from pipeline.model.loading import load_model


@pytest.fixture
def saved(tmp_path):
    def save(name):
        decoder = model_of(name)
        decoder.model.save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        return decoder

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_same(family, saved, tmp_path):
    name = next(name for name, (of, _) in CASES.items() if of == family)
    decoder = saved(name)
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.notes == ()
    assert (stock_logits(loaded.decoder) - stock_logits(decoder)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("qwen3_moe", "model.layers.2.mlp.experts.5.up_proj.weight"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.5.w3.weight"),
    ],
)
def test_experts_that_are_missing_or_too_many(name, expert, saved, tmp_path):
    saved(name)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({key: each for key, each in tensors.items() if key != expert}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 tensor that .* has: {expert}"):
        load_model(str(tmp_path), device="cpu")
    another = expert.replace("experts.5", "experts.8")
    save_file({**tensors, another: torch.ones_like(tensors[expert])}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"does not use: {another}"):
        load_model(str(tmp_path), device="cpu")
