"""GGUF files: the same logits as from safetensors, with RoPE scaling; and what is refused, by the header."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf_files import (
    loaded,
    logits,
    model_of,
    refusal,
    settings_of,
    stored,
    tensors_of,
    write,
    write_parts,
)

from pipeline.checkpoints.gguf_header import read_header
from pipeline.checkpoints.gguf_rope import LLAMA_3, GgufError, llama3_divisors, rope_parameters
from pipeline.families.decoder import Decoder
from pipeline.model.loading import open_model
from pipeline.settings.model_settings import ModelSettings

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, **LLAMA_3}
# the tests' documents are short: of a context that is, all three bands of frequencies are to be seen
SHORT_LLAMA3 = {**LLAMA3, "factor": 4.0, "original_max_position_embeddings": 100}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
DETAILED_YARN = {**YARN, "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}


@pytest.fixture(scope="module")
def llama():
    """What a file of a tiny llama says and holds; tests change copies of it."""
    model = model_of()
    return SimpleNamespace(settings=settings_of(model), tensors=tensors_of(model), model=model)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {"num_key_value_heads": 4}),
        ("qwen3", {"head_dim": 64}),
    ],
)
def test_the_logits_are_those_of_the_model_that_was_written(family, settings, sdpa, tmp_path):
    model = model_of(family, **settings)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases are all alike in random models
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.manual_seed(len(name)))
    path = write(tmp_path / "m.gguf", family, settings_of(model), tensors_of(model))
    ours = loaded(path)
    assert torch.equal(logits(ours.decoder, sdpa), logits(Decoder(model), sdpa))
    assert ours.tokenizer.decode(ours.tokenizer.encode("a tin<|im_end|>")) == "a tin<|im_end|>"
    assert ours.generation_config.eos_token_id == [259]


@pytest.mark.parametrize(
    "rope", [SHORT_LLAMA3, LINEAR, YARN, DETAILED_YARN], ids=lambda rope: rope["rope_type"]
)
def test_rope_scaling_acts(rope, sdpa, tmp_path):
    model = model_of(rope_parameters=rope)
    path = write(tmp_path / "m.gguf", "llama", settings_of(model), tensors_of(model))
    ours = logits(loaded(path).decoder, sdpa)
    stock = logits(Decoder(model), sdpa)
    unscaled = logits(Decoder(model_of()), sdpa)
    assert (ours - stock).abs().max() <= 1e-4
    assert (ours - unscaled).abs().max() > 1e-2


def test_the_divisors_of_llama_3_are_found_again():
    for head_dim, theta, factor in [(128, 500_000.0, 8.0), (64, 500_000.0, 32.0)]:
        frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        divisors = llama3_divisors(frequencies, factor=factor, **LLAMA_3).astype(np.float32)
        settings = {"rope.freq_base": theta, "context_length": 131072}
        found = rope_parameters(settings, head_dim, divisors)
        assert found == {**LLAMA3, "factor": factor, "rope_theta": theta}
        config = model_of(rope_parameters=found, head_dim=head_dim, num_attention_heads=1).model.rotary_emb
        assert config.inv_freq.numpy() == pytest.approx(frequencies / divisors, rel=1e-6)


def test_divisors_by_other_parameters():
    frequencies = 1e6 ** -(np.arange(0, 128, 2) / 128)
    own = {"low_freq_factor": 1.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 4096}
    divisors = llama3_divisors(frequencies, factor=16.0, **own).astype(np.float32)
    settings = {"rope.freq_base": 1e6, "context_length": 65536}
    assert rope_parameters(settings, 128, divisors) == {
        "rope_type": "llama3", "factor": 16.0, "rope_theta": 1e6, **own
    }  # fmt: skip
    equal = np.full(64, 8.0, np.float32)
    assert rope_parameters(settings, 128, equal) == {**LINEAR, "factor": 8.0, "rope_theta": 1e6}
    assert rope_parameters(settings, 128, equal / 8) == {"rope_type": "default", "rope_theta": 1e6}
    for wrong in (np.linspace(1, 8, 64, dtype=np.float32), divisors[::-1]):
        with pytest.raises(GgufError, match=r"^scales RoPE by rope_freqs.weight in a way that is neither"):
            rope_parameters(settings, 128, wrong)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 0.0}, {"rope_type": "default"}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # llama.cpp takes it for linear
        (
            {"type": "yarn", "factor": 4.0, "attn_factor": 1.0, "yarn_log_multiplier": 0.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        ),
        (
            {"type": "longrope"},
            "has RoPE type 'longrope', which is not supported; types: default, linear, llama3, yarn",
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1},
            "has rope.scaling.yarn_log_multiplier 0.1, which is not supported",
        ),
        ({"type": "yarn"}, "scales RoPE (yarn) by the factor 0, and it must be at least 1"),
    ],
)
def test_settings_of_rope(scaling, expected):
    settings = {"context_length": 512, **{f"rope.scaling.{k}": v for k, v in scaling.items()}}
    if isinstance(expected, dict):
        assert rope_parameters(settings, 32, None) == {"rope_theta": 1e4, **expected}
    else:
        with pytest.raises(GgufError) as caught:
            rope_parameters(settings, 32, None)
        assert str(caught.value) == expected


def test_scaling_of_files_before_2024_and_scaling_twice():
    old = {"context_length": 512, "rope.scale_linear": 2.0}
    assert rope_parameters(old, 32, None) == {**LINEAR, "factor": 2.0}
    with pytest.raises(
        GgufError, match=r"^scales RoPE twice, by rope_freqs.weight and by the setting 'linear'$"
    ):
        rope_parameters(old, 32, np.full(16, 2, np.float32))


def test_yarn_extends_the_context(tmp_path):
    model = model_of(rope_parameters=YARN, max_position_embeddings=128)
    path = write(tmp_path / "m.gguf", "llama", settings_of(model), tensors_of(model))
    assert open_model(ModelSettings(model=str(path), device="cpu")).shape.context == 512


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_quantised_tensors_are_read(llama, sdpa, tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    rounded = {
        name: gguf.dequantize(stored(values, kind), kind).reshape(values.shape)
        if values.ndim == 2
        else values
        for name, values in llama.tensors.items()
    }
    quantised = loaded(write(tmp_path / "q.gguf", "llama", llama.settings, llama.tensors, kind=kind))
    reference = loaded(write(tmp_path / "m.gguf", "llama", llama.settings, rounded))
    assert torch.equal(logits(quantised.decoder, sdpa), logits(reference.decoder, sdpa))
    assert not torch.equal(logits(quantised.decoder, sdpa), logits(Decoder(llama.model), sdpa))


def test_types_that_nobody_can_read_are_refused(llama, tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_1
    assert refusal(write(tmp_path / "q.gguf", "llama", llama.settings, llama.tensors, kind=kind)) == (
        "q.gguf stores tensors in type Q8_1, which the gguf package cannot read; get the model in another"
        " quantisation, such as Q8_0 or Q4_K_M"
    )


def test_a_file_without_a_tokenizer_is_refused(llama, tmp_path):
    path = write(tmp_path / "m.gguf", "llama", llama.settings, llama.tensors, tokenizer=False)
    assert refusal(path) == "m.gguf holds no tokenizer; convert the model again, with its tokenizer"


def test_any_part_stands_for_the_whole(llama, sdpa, tmp_path):
    whole = loaded(write(tmp_path / "whole.gguf", "llama", llama.settings, llama.tensors))
    paths = write_parts(tmp_path, "llama", llama.settings, llama.tensors)
    for path in (paths[0], paths[2]):
        model = loaded(path)
        assert torch.equal(logits(model.decoder, sdpa), logits(whole.decoder, sdpa))
        assert model.tokenizer.encode("a tin") == whole.tokenizer.encode("a tin")
    assert loaded(paths[0]).fingerprint == loaded(paths[1]).fingerprint != whole.fingerprint


def test_parts_that_are_not_a_whole_are_refused(llama, tmp_path):
    first, second, third = write_parts(tmp_path, "llama", llama.settings, llama.tensors)
    alone = first.rename(tmp_path / "alone.gguf")
    assert refusal(alone) == (
        "alone.gguf is part 1 of 3 under another name; name all parts NAME-00001-of-00003.gguf and so on, or"
        " join them with llama-gguf-split --merge"
    )
    third.rename(tmp_path / "third")
    assert refusal(second) == (
        "m-00002-of-00003.gguf is one of 3 parts, and these are not beside it: m-00001-of-00003.gguf,"
        " m-00003-of-00003.gguf; download them too"
    )
    alone.rename(third)
    (tmp_path / "third").rename(first)
    assert refusal(second) == (
        "m-00001-of-00003.gguf is part 3 of 3 by its header; give the parts their own names again, or"
        " download them again"
    )


def changed(llama, tmp_path, settings=None, tensors=None, without=()):
    """A file of the llama with these settings and tensors, and without those."""
    all_tensors = {**llama.tensors, **(tensors or {})}
    kept = {name: values for name, values in all_tensors.items() if name not in without}
    return write(tmp_path / "m.gguf", "llama", {**llama.settings, **(settings or {})}, kept)


def test_tensors_that_are_missing_are_named(llama, tmp_path):
    path = changed(llama, tmp_path, without=("output_norm.weight", "blk.3.ffn_up.weight"))
    assert refusal(path) == (
        "m.gguf lacks blk.3.ffn_up.weight, output_norm.weight, which a llama of 4 blocks has; download or"
        " convert it again"
    )
    path = changed(llama, tmp_path, {"llama.block_count": 5})
    assert refusal(path) == (
        "m.gguf lacks blk.4.attn_q.weight, blk.4.attn_k.weight, blk.4.attn_v.weight, blk.4.attn_output.weight"
        " and 5 more tensors, which a llama of 5 blocks has; download or convert it again"
    )
    assert refusal(changed(llama, tmp_path, without=("token_embd.weight",))) == (
        "m.gguf lacks token_embd.weight, the embedding of its tokens"
    )


def test_tensors_that_the_model_does_not_use_are_named(llama, tmp_path):
    path = changed(llama, tmp_path, {"llama.block_count": 3}, {"blk.0.attn_sinks": np.zeros(4, np.float32)})
    assert refusal(path) == (
        "m.gguf holds blk.3.attn_q.weight, blk.3.attn_k.weight, blk.3.attn_v.weight, blk.3.attn_output.weight"
        " and 6 more tensors, which a llama of 3 blocks does not use; without them its answers would be"
        " another model's; --ignore-unused-tensors REGEX goes on without those that it matches"
    )
    settings = ModelSettings(model=str(path), device="cpu", ignore_unused_tensors=r"^blk\.3\.|attn_sinks")
    (note,) = open_model(settings).notes
    assert note.endswith(" and 6 more tensors, which a llama of 3 blocks does not use: they are left out")
    factors = {"rope_factors_long.weight": np.ones(16, np.float32)}
    assert "holds rope_factors_long.weight, which a llama" in refusal(
        changed(llama, tmp_path, tensors=factors)
    )
    harmless = {"blk.0.attn_rot_embd.weight": np.ones(16, np.float32)}
    open_model(ModelSettings(model=str(changed(llama, tmp_path, tensors=harmless)), device="cpu"))


def test_frequencies_of_a_family_that_has_none_are_refused(tmp_path):
    model = model_of("qwen2")
    tensors = {**tensors_of(model), "rope_freqs.weight": np.full(16, 8, np.float32)}
    path = write(tmp_path / "m.gguf", "qwen2", settings_of(model), tensors)
    assert refusal(path).startswith("m.gguf holds rope_freqs.weight, which a qwen2 of 4 blocks does not use;")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"general.type": "decoder"}, "m.gguf holds no model, but what its header calls 'decoder'"),
        ({"llama.expert_count": 8}, "m.gguf has llama.expert_count 8, which is not supported"),
        ({"llama.pooling_type": 3}, "m.gguf has llama.pooling_type 3, which is not supported"),
        ({"llama.attention.scale": 0.5}, "m.gguf has llama.attention.scale 0.5, which is not supported"),
        ({"llama.rope.scaling.attn_factor": 1.5},
         "m.gguf has rope.scaling.attn_factor 1.5, which is not supported"),
        ({"llama.rope.dimension_count": 16, "llama.attention.key_length": 32},
         "m.gguf rotates 16 of 32 dimensions of a head, which is not supported"),
        ({"llama.attention.value_length": 16},
         "m.gguf has keys and values of different sizes, which is not supported"),
        ({"llama.attention.head_count_kv": [2, 2, 4, 2]},
         "m.gguf has another llama.attention.head_count_kv in each layer, which is not supported"),
        ({"llama.attention.head_count_kv": 4},
         "m.gguf is damaged: blk.0.attn_k.weight is 64 x 128, not 128 x 128"),
        ({"llama.rope.scaling.type": "longrope"},
         "m.gguf has RoPE type 'longrope', which is not supported; types: default, linear, llama3, yarn"),
    ],
)  # fmt: skip
def test_settings_that_the_model_could_not_follow_are_refused(llama, tmp_path, settings, message):
    assert refusal(changed(llama, tmp_path, settings)) == message


def test_settings_that_are_missing_and_families_that_are_not_supported(llama, tmp_path):
    settings = {key: value for key, value in llama.settings.items() if key != "llama.block_count"}
    path = write(tmp_path / "m.gguf", "llama", settings, llama.tensors)
    assert refusal(path) == (
        "m.gguf lacks the setting llama.block_count; it is damaged, or no model of this family"
    )
    path = write(tmp_path / "m.gguf", "gemma2", {}, llama.tensors)
    assert refusal(path) == (
        "model family 'gemma2' is not supported in GGUF files; families: llama, qwen2, qwen3, qwen3moe,"
        " gemma3, phi3, gpt-oss"
    )
    path = write(tmp_path / "m.gguf", "granite", {}, llama.tensors)  # which safetensors may hold
    assert refusal(path).startswith("model family 'granite' is not supported in GGUF files")


def test_a_sliding_window_caps_the_context(llama, tmp_path):
    path = changed(llama, tmp_path, {"llama.attention.sliding_window": 200})
    assert open_model(ModelSettings(model=str(path), device="cpu")).shape.context == 200


def test_files_that_are_cut_short_or_damaged(llama, tmp_path):
    path = changed(llama, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    assert refusal(path) == (
        f"m.gguf is cut short: it has {len(whole) - 1000:,} bytes, and output.weight would end at"
        f" {len(whole):,}; copy or download it again"
    )
    path.write_bytes(whole[:500])
    assert refusal(path) == "m.gguf is cut short or damaged: its header ends too early"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(path) == "m.gguf is a Git LFS pointer, not the file: run `git lfs pull` in the folder"
    path.write_bytes(b"PK and more")
    assert refusal(path) == "m.gguf is no GGUF file: it does not begin with GGUF"
    path.write_bytes(whole[:4] + b"\1\0\0\0" + whole[8:])
    assert refusal(path) == (
        "m.gguf has version 1, which cannot be read (little-endian versions 2 and 3 can)"
    )
    path.write_bytes(b"")
    assert refusal(path) == "m.gguf is no GGUF file: it does not begin with GGUF"


def test_a_header_is_read_once(llama, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        "pipeline.checkpoints.gguf.read_header", lambda path: read.append(path) or read_header(path)
    )
    path = changed(llama, tmp_path)
    loaded(path)
    assert read == [path]
