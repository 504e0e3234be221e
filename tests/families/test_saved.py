"""Models of every family in folders, under the names that transformers gives their tensors there."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SIZES, pack_of
from family_cases import CASES, documents, model_of, stock_logits, tokens_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from pipeline.checkpoints.random_weights import byte_tokenizer
from pipeline.errors import ModelError
from pipeline.families.supported import FAMILIES
from pipeline.model.loading import load_model
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense


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


SEES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "name", "eyes"),
    [("gemma3", "gemma3_text", "siglip_vision_model"), ("mistral3", "ministral3", "pixtral")],
)
def test_the_language_model_of_one_that_sees_images(kind, name, eyes, tied, tmp_path):
    family, settings = CASES[name]
    text = {**SIZES, **settings, "model_type": family, "vocab_size": 300, "tie_word_embeddings": tied}
    config = AutoConfig.for_model(
        kind,
        text_config=text,
        vision_config={**SEES, "model_type": eyes},
        image_token_index=299,
        tie_word_embeddings=tied,
    )
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    (note,) = loaded.notes
    assert "are not used: multi_modal_projector." in note
    assert (loaded.shape.vocab, loaded.shape.slides) == (300, kind == "gemma3")
    with torch.inference_mode():
        expected = [whole(input_ids=tokens_of(doc)).logits[0, -1] for doc in documents()]
    found = prefill(loaded.decoder, loaded.attention, Dense(), pack_of(*documents())).logits_BV
    assert (found - torch.stack(expected)).abs().max() < 1e-4


def test_a_head_of_its_own_of_which_the_configuration_says_nothing(tmp_path):
    text = {**SIZES, "model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False}
    vision = {**SEES, "model_type": "pixtral"}
    config = AutoConfig.for_model(
        "mistral3", text_config=text, vision_config=vision, image_token_index=255, tie_word_embeddings=False
    )
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = load_model(str(tmp_path), device="cpu")
    with torch.inference_mode():
        expected = [whole(input_ids=tokens_of(doc)).logits[0, -1] for doc in documents()]
    found = prefill(loaded.decoder, loaded.attention, Dense(), pack_of(*documents())).logits_BV
    assert (found - torch.stack(expected)).abs().max() < 1e-4


def test_a_language_model_without_some_of_its_tensors(saved, tmp_path):
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**SIZES, "model_type": "gemma3_text"},
        vision_config=SEES,
        image_token_index=255,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    gone = "model.layers.3.mlp.up_proj.weight"
    kept = {key: each for key, each in load_file(path).items() if key != f"language_model.{gone}"}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 tensor that .* has: {gone}"):
        load_model(str(tmp_path), device="cpu")


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
