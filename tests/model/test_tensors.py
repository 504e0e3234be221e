"""Tensors that lack, that are too many, and that are named otherwise: refused by name, or loaded rightly."""

from __future__ import annotations

import pytest
import torch
from checkpoints import (
    WEIGHTS,
    change_config,
    copied,
    opened,
    refusal,
    rename,
    shard,
    tensors,
    write,
    write_index,
)
from safetensors.torch import load_file

LACKS = "that a qwen2 model of this configuration has: "
UNUSED = "that a qwen2 model of this configuration does not use: "
WAY_OUT = "--ignore-unused-tensors REGEX goes on without those that it matches"
AGAIN = "download or copy its files again, or mend config.json"


@pytest.fixture
def folder(model_folder, tmp_path):
    return copied(model_folder, tmp_path / "model")


@pytest.fixture
def tied(folder):
    """The model whose head is its embedding."""
    rename(folder, lambda name: None if name == "lm_head.weight" else name)
    change_config(folder, tie_word_embeddings=True)
    return folder


def same_weights(folder, original):
    """Whether a folder's model has the weights of another's."""
    ours = opened(folder).load().decoder.model.state_dict()
    theirs = opened(original).load().decoder.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model.", "student."])
def test_names_behind_a_prefix(folder, wrapper):
    rename(folder, lambda name: wrapper + name)
    assert refusal(folder) == (
        f"model {folder} lacks 51 tensors {LACKS}lm_head.weight, model.embed_tokens.weight, "
        f"model.layers.0.input_layernorm.weight, ...; its files have them under names with {wrapper!r}: "
        "save the model without that wrapper, or take it out of the names"
    )


def test_names_with_a_wrapper_inside(folder):
    rename(folder, lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."))
    assert "under names with '_orig_mod.': save" in refusal(folder)


def test_a_head_that_is_not_there(folder):
    rename(folder, lambda name: None if name == "lm_head.weight" else name)
    assert refusal(folder) == (
        f"model {folder} lacks 1 tensor {LACKS}lm_head.weight; if its head is its embedding, config.json "
        f'must say "tie_word_embeddings": true; else {AGAIN}'
    )


def test_a_classifier_is_named_as_one(folder):
    rename(folder, lambda name: name.replace("lm_head", "score"))
    change_config(folder, architectures=["Qwen2ForSequenceClassification"])
    assert refusal(folder).endswith(
        "lm_head.weight; it is a classifier (Qwen2ForSequenceClassification), which writes no text: name a "
        "language model"
    )


def test_more_layers_than_the_files_hold(folder):
    change_config(folder, num_hidden_layers=6, layer_types=None)
    assert refusal(folder) == (
        f"model {folder} lacks 24 tensors {LACKS}model.layers.4.input_layernorm.weight, "
        "model.layers.4.mlp.down_proj.weight, model.layers.4.mlp.gate_proj.weight, ...; config.json says "
        f"num_hidden_layers 6, and its files hold 4: {AGAIN}"
    )


def test_unmerged_lora_layers(folder):
    write(
        folder,
        {
            name.replace("q_proj.weight", "q_proj.base_layer.weight"): each
            for name, each in tensors(folder).items()
        },
    )
    assert refusal(folder).endswith(
        "LoRA layers that are not merged: merge them, e.g. with peft's merge_and_unload"
    )


def test_one_tensor_that_lacks(folder):
    name = "model.layers.2.self_attn.k_proj.bias"
    rename(folder, lambda each: None if each == name else each)
    assert refusal(folder) == f"model {folder} lacks 1 tensor {LACKS}{name}; {AGAIN}"


def test_a_shard_that_lacks_what_the_index_names(folder):
    named = shard(folder)
    part = named["model.norm.weight"]
    first = {name: torch.zeros(3) for name in ("lm_head.weight",)}
    write(folder, first, part)
    assert refusal(folder).endswith(
        f"; the index has them in {part}, which does not hold them: download it again"
    )


def test_other_shapes(folder):
    change_config(folder, vocab_size=400)
    assert refusal(folder) == (
        f"model {folder} has 2 tensors of other shapes than a qwen2 model of this configuration: "
        "lm_head.weight is (320, 64), not (400, 64), model.embed_tokens.weight is (320, 64), not (400, 64); "
        f"{AGAIN}"
    )


def test_integers_are_no_weights(folder):
    found = tensors(folder)
    found["model.layers.0.mlp.up_proj.weight"] = found["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    write(folder, found)
    assert "without floating-point numbers: model.layers.0.mlp.up_proj.weight is I8; name the" in refusal(
        folder
    )


def test_unused_tensors_and_the_way_out(folder):
    write(folder, {**tensors(folder), "extra.weight": torch.ones(3), "other.weight": torch.ones(3)})
    assert refusal(folder) == (
        f"model {folder} holds 2 tensors {UNUSED}extra.weight, other.weight; {WAY_OUT}"
    )
    assert f"holds 1 tensor {UNUSED}other.weight; " in refusal(folder, ignore_unused_tensors="^extra")
    model = opened(folder, ignore_unused_tensors="^(extra|other)")
    assert model.notes == (f"2 tensors of {folder} are not used: extra.weight, other.weight",)
    assert model.load().notes == model.notes


def test_layers_below_the_configured_depth(folder):
    change_config(folder, num_hidden_layers=3, layer_types=None)
    assert refusal(folder).endswith(
        f"model.layers.3.mlp.gate_proj.weight, ...; config.json says num_hidden_layers 3, and its files hold "
        f"4: mend it; {WAY_OUT}"
    )


def test_layers_that_guess_further_tokens_are_harmless(folder, model_folder):
    last = {name: each for name, each in tensors(folder).items() if name.startswith("model.layers.3.")}
    more = {name.replace("layers.3", "layers.4"): each for name, each in last.items()}
    write(folder, {**tensors(folder), **more})
    assert "num_hidden_layers 4" in refusal(folder)
    change_config(folder, num_nextn_predict_layers=1)
    assert same_weights(folder, model_folder)


def test_biases_that_the_configuration_does_not_ask_for(folder):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False}
    change_config(folder, **config, mlp_bias=False)
    assert refusal(folder).endswith(
        f'if it was trained with them, config.json must say "attention_bias": true; else {WAY_OUT}'
    )
    found = tensors(folder)
    write(folder, {**found, "model.layers.0.mlp.up_proj.bias": torch.zeros(96)})
    assert '"attention_bias": true and "mlp_bias": true; else' in refusal(folder)


def test_scales_without_a_quantisation(folder):
    write(folder, {**tensors(folder), "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)})
    assert f"give it the quantization_config of the original; {WAY_OUT}" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "v_head.summary.weight",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.attn.v_scale",
        "model.layers.0.self_attn.k_proj.output_scale",
        "model.layers.1.mlp._extra_state",
        "transformer.h.0.attn.masked_bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "visual.blocks.0.weight",
        "model.vision_tower.weight",
        "audio_tower.layers.0.weight",
        "mtp.layers.0.weight",
        "medusa_head.0.weight",
    ],
)
def test_harmless_tensors_are_noted(folder, name):
    write(folder, {**tensors(folder), name: torch.ones(1)})
    assert opened(folder).notes == (f"1 tensor of {folder} is not used: {name}",)


def test_a_decoder_without_its_prefix_is_loaded(tied, tmp_path):
    original = copied(tied, tmp_path / "original")
    rename(tied, lambda name: name.removeprefix("model."))
    assert same_weights(tied, original)


def test_a_head_with_the_prefix_is_loaded(folder, model_folder):
    rename(folder, lambda name: f"model.{name}" if name == "lm_head.weight" else name)
    assert same_weights(folder, model_folder)


def test_shards_are_loaded(folder, model_folder):
    shard(folder)
    assert same_weights(folder, model_folder)


def test_of_a_tied_head_either_tensor_is_enough(tied, tmp_path):
    original = copied(tied, tmp_path / "original")
    rename(tied, lambda name: name.replace("model.embed_tokens", "lm_head"))
    assert same_weights(tied, original)
    rename(tied, lambda name: None if name == "lm_head.weight" else name)
    assert f"lacks 2 tensors {LACKS}lm_head.weight, model.embed_tokens.weight; " in refusal(tied)


def test_a_tied_head_given_twice(tied, tmp_path):
    original = copied(tied, tmp_path / "original")
    found = tensors(tied)
    write(tied, {**found, "lm_head.weight": found["model.embed_tokens.weight"].clone()})
    assert same_weights(tied, original)
    write(tied, {**found, "lm_head.weight": found["model.embed_tokens.weight"] + 1})
    assert refusal(tied) == (
        f"model {tied}: config.json says that its head is its embedding, and its files hold a lm_head.weight "
        'that differs from model.embed_tokens.weight; write "tie_word_embeddings": false there if that head '
        "was trained, else take lm_head.weight out of the files"
    )


def test_a_tensor_in_two_shards(folder, model_folder):
    named = shard(folder)
    first, second = sorted(set(named.values()))
    layers = {name: each for name, each in tensors(model_folder).items() if named[name] == second}
    norm = tensors(model_folder)["model.norm.weight"]
    write(folder, {**layers, "model.norm.weight": norm}, second)
    write_index(folder, named)
    assert same_weights(folder, model_folder)
    write(folder, {**layers, "model.norm.weight": norm + 1}, second)
    assert f"model.norm.weight stands in {first} and in {second}, with different values" in refusal(folder)


def test_a_tensor_that_differs_in_one_number_between_shards(folder):
    named = shard(folder)
    names = sorted(set(named.values()))
    one, other = (load_file(folder / name) for name in names)
    twice = one["model.embed_tokens.weight"].clone()
    twice[160, 7] += 1
    write(folder, {**other, "model.embed_tokens.weight": twice}, names[1])
    assert f"model.embed_tokens.weight stands in {names[0]} and in {names[1]}, with different" in refusal(
        folder
    )


def test_what_a_download_left_empty(folder):
    path = folder / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[:-100_000] + bytes(100_000))
    assert refusal(folder) == (
        f"model {folder} holds 5 tensors of zeros alone: model.layers.3.mlp.gate_proj.weight,"
        " model.layers.3.mlp.up_proj.weight, model.layers.3.self_attn.k_proj.weight, ...; files are like"
        " this where a download was cut off: download or copy them again"
    )


def test_added_layers_may_begin_with_zeros(folder):
    write(folder, {name: each * ("o_proj" not in name) for name, each in tensors(folder).items()})
    assert opened(folder).notes == ()


def test_weights_are_refused_before_a_run_and_by_a_rehearsal(folder, fish, tmp_path, call, capfd):
    rename(folder, lambda name: None if name == "lm_head.weight" else name)
    for more in ([], ["--dry-run"]):
        arguments = [fish, tmp_path / "out.parquet", "--text-column", "body", "--question-column", "ask"]
        assert call(*arguments, "--model", folder, *more) == 2
        assert f"model {folder} lacks 1 tensor {LACKS}lm_head.weight; " in capfd.readouterr().err
    assert not (tmp_path / "out.parquet").exists()
