"""What lies in a folder in place of a model's weights, beside them, or of them in part."""

from __future__ import annotations

import json

import pytest
from checkpoints import (
    INDEX,
    POINTER,
    WEIGHTS,
    change_config,
    copied,
    opened,
    refusal,
    shard,
    tensors,
    write_index,
)

from pipeline.checkpoints.files import locate
from pipeline.errors import ModelError
from pipeline.settings.model_settings import ModelSettings

AGAIN = "download or copy it again"


@pytest.fixture
def folder(model_folder, tmp_path):
    return copied(model_folder, tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", WEIGHTS]
)
def test_pointers_of_git_lfs(folder, name):
    (folder / name).write_text(POINTER)
    assert refusal(folder) == (
        f"model folder {folder}: {name} is a Git LFS pointer, not the file: run `git lfs pull` in the folder"
    )


def test_a_shard_that_is_a_pointer(folder):
    part = sorted(set(shard(folder).values()))[1]
    (folder / part).write_text(POINTER)
    assert refusal(folder) == (
        f"model '{folder}' cannot be loaded: {part} is a Git LFS pointer, not the file: run `git lfs pull` "
        "in the folder"
    )


def test_a_gguf_file_that_is_a_pointer(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text(POINTER)
    with pytest.raises(
        ModelError, match=r"model.gguf is a Git LFS pointer, not the file: run `git lfs pull`"
    ):
        locate(ModelSettings(model=str(path))).config()


def make_adapter(folder, **about):
    (folder / "adapter_model.safetensors").write_bytes(b"adapter")
    about = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", **about}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def test_an_adapter_is_no_model(folder):
    make_adapter(folder)
    (folder / WEIGHTS).unlink()
    (folder / "config.json").unlink()
    (folder / "optimizer.pt").write_bytes(b"")
    assert refusal(folder) == (
        f"model folder {folder} is a LoRA adapter of someone/base: give that model as --model, and "
        "this folder as --adapter"
    )
    make_adapter(folder, peft_type="IA3")
    assert "is a PEFT adapter of someone/base: give that" in refusal(folder)


def test_an_adapter_beside_full_weights_is_told(folder):
    make_adapter(folder)
    assert opened(folder).notes == (
        f"the LoRA adapter of someone/base beside the weights of {folder} is not applied: "
        f"--adapter {folder} does that",
    )


def test_a_shard_that_is_not_there(folder):
    first, second = sorted(set(shard(folder).values()))
    (folder / second).unlink()
    assert refusal(folder) == (
        f"model '{folder}' cannot be loaded: {second}, which {INDEX} names, is not there: download or copy "
        "the folder again"
    )
    (folder / first).unlink()
    (folder / "other.safetensors").write_bytes(b"")
    assert f"{first}, {second}, which {INDEX} names, are not there" in refusal(folder)


def test_shards_without_their_index(folder):
    first, second = sorted(set(shard(folder).values()))
    (folder / INDEX).unlink()
    assert refusal(folder) == (
        f"model '{folder}' cannot be loaded: {first}, {second} are there without {INDEX}: download or copy "
        "that file too"
    )


@pytest.mark.parametrize("text", ['{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{}"])
def test_an_index_that_is_none(folder, text):
    shard(folder)
    (folder / INDEX).write_text(text)
    assert refusal(folder) == f"model '{folder}' cannot be loaded: {INDEX} is no index of weights: {AGAIN}"


@pytest.mark.parametrize(
    ("text", "fault"), [("[1]", "no JSON object"), ('{"a"', "no JSON"), ("[" * 100_000, "no JSON")]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, "tokenizer_config.json"])
def test_every_file_that_is_to_be_an_object_is_told_alike(folder, name, text, fault):
    shard(folder)
    (folder / name).write_text(text)
    assert refusal(folder).startswith(f"model '{folder}' cannot be loaded: {name} is {fault}: {AGAIN}")


def test_an_index_without_metadata(folder):
    named = shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": named}))
    assert refusal(folder).endswith(
        f'{INDEX} lacks "metadata", without which it is not read: add "metadata": {{}}'
    )


def test_weights_under_another_name(folder):
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    assert refusal(folder).endswith(
        f"it holds consolidated.safetensors but no {WEIGHTS} or {INDEX}: rename or convert its weights"
    )


def test_a_link_to_nothing(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "blob")
    assert f"{WEIGHTS} is a link to a file that is not there: copy the folder with its files" in refusal(
        folder
    )


def test_two_forms_of_weights_are_told(folder):
    write_index(folder, dict.fromkeys(tensors(folder), WEIGHTS))
    assert opened(folder).notes == (f"{folder} holds {WEIGHTS}, which is used, and {INDEX}, which is not",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", f"is empty: {AGAIN}"),
        (lambda data: b"abc", f"is no safetensors file: {AGAIN}"),
        (lambda data: b"<!DOCTYPE html>" * 100, f"is no safetensors file: {AGAIN}"),
        (lambda data: data[:1000], "is cut short (1,000 bytes of at least "),
        (lambda data: data[:-1], f"is cut short (664,895 of at least 664,896 bytes): {AGAIN}"),
        (lambda data: data + b"xy", f"{WEIGHTS} is damaged (2 bytes are of no tensor): {AGAIN}"),
        (
            lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
            f"the header of {WEIGHTS} is damaged (lm_head.weight does not begin where the tensor before",
        ),
        (lambda data: data[:8] + b"\0" * len(data[8:]), f"the header of {WEIGHTS} is damaged: {AGAIN}"),
    ],
)
def test_damaged_weights(folder, damage, message):
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    said = refusal(folder)
    assert said.startswith(f"model '{folder}' cannot be loaded: ")
    assert message.replace(" bytes of at least ", " of at least ") in said


@pytest.mark.parametrize("name", ["kernels-community/flash-attn", "flash_attention_2", "sdpa"])
def test_attention_that_a_folder_names_is_not_loaded(folder, name):
    change_config(folder, attn_implementation=name, _attn_implementation=name)
    model = opened(folder).load().decoder.model
    assert model.config._attn_implementation == "eager"


def test_a_setting_of_a_wrong_type(folder):
    change_config(folder, rms_norm_eps="tiny")
    assert refusal(folder) == (
        f"model '{folder}' cannot be loaded: Validation error for field 'rms_norm_eps': TypeError: Field"
        " 'rms_norm_eps' expected float, got str (value: 'tiny')"
    )


def test_settings_of_other_families_are_told(folder):
    change_config(folder, residual_multiplier=0.3, no_rope_layers=[1, 0, 1, 0], max_window_layers=2)
    assert opened(folder).notes == (
        "config.json says no_rope_layers [1, 0, 1, 0], residual_multiplier 0.3, which a qwen2 model has not:"
        " nothing is made of it",
    )
