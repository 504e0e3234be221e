"""GGUF files of families whose tensors or settings have another form there than in transformers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from conftest import document
from family_cases import CASES
from gguf_files import (
    architecture_of,
    loaded,
    logits,
    model_of,
    refusal,
    settings_of,
    stored,
    tensors_of,
    write,
)

from pipeline.checkpoints.gguf_families import GGUF_FAMILIES
from pipeline.families.supported import FAMILIES
from pipeline.model.loading import open_model
from pipeline.settings.model_settings import ModelSettings

PERIODIC = {"layer_types": None, "num_hidden_layers": 6}
KINDS = ("qwen3_moe", "gemma3_text", "phi3", "phi3-long", "gpt_oss-windows")
# what a file cannot say, or in whole blocks of 32 numbers
INSTEAD = {
    "gemma3_text": {"query_pre_attn_scalar": 32, **PERIODIC},
    "gpt_oss-windows": {"intermediate_size": 64, "attention_bias": True},
    "phi3-long": {"rope_parameters": {
        **CASES["phi3-long"][1]["rope_parameters"],
        "short_factor": [1.0 + n / 8 for n in range(12)],
        "long_factor": [1.5 + n for n in range(12)],
    }},
    "qwen3_moe": {"moe_intermediate_size": 64},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return made(request.param)


def made(name, **changes):
    """A case's model, as far as a file can say it."""
    family, settings = CASES[name]
    made = model_of(family, **{**settings, **INSTEAD.get(name, {}), **changes})
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:  # norms and biases are all alike in random models
            torch.nn.init.uniform_(parameter, 0.25, 0.75, generator=torch.manual_seed(len(name)))
    return made


def written(path, model, kind=None, changes=None, without=()):
    """Its file, with some settings of its architecture changed, and without these settings and tensors."""
    architecture = architecture_of(model)
    settings = {**settings_of(model), **{f"{architecture}.{k}": v for k, v in (changes or {}).items()}}
    settings = {key: v for key, v in settings.items() if key.removeprefix(f"{architecture}.") not in without}
    tensors = {name: values for name, values in tensors_of(model).items() if name not in without}
    return write(path, architecture, settings, tensors, kind=kind)


def config_of(path):
    return open_model(ModelSettings(model=str(path), device="cpu")).source.config()


def test_families_are_supported_ones():
    assert {family.model_type for family in GGUF_FAMILIES.values()} <= set(FAMILIES)
    tried = {CASES[name][0] for name in KINDS}
    assert {"llama", "qwen2", "qwen3"} | tried == {each.model_type for each in GGUF_FAMILIES.values()}


def test_the_logits_are_those_of_the_model_that_was_written(model, sdpa, tmp_path):
    ours = loaded(written(tmp_path / "m.gguf", model))
    for length in (30, 400):  # of Phi-3 on both sides of the original context
        expected = stock_logits(model, length)
        assert (logits(ours.decoder, sdpa, length) - expected).abs().max() < 1e-4
    assert ours.tokenizer.decode(ours.tokenizer.encode("a tin")) == "a tin"


def stock_logits(model, length):
    ids = torch.from_numpy(document(length).input_ids)[None]
    with torch.inference_mode():
        return model(ids).logits[0, -1]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "MXFP4"])
def test_quantised_matrices_are_those_of_the_file(model, tmp_path, kind):
    """The loaded model, written once more, has the numbers that the file's blocks stand for."""
    kind = gguf.GGMLQuantizationType[kind]
    ours = loaded(written(tmp_path / "q.gguf", model, kind)).decoder.model
    again = tensors_of(ours)
    for name, values in tensors_of(model).items():
        if values.ndim > 1 and name.endswith(".weight"):
            values = gguf.dequantize(stored(values, kind), kind).reshape(values.shape)
        np.testing.assert_allclose(again[name], values, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(None, "sssssf"), (3, "ssfssf"), (0, "ssssss"), ([True, False, True, True, False, True], "sfssfs")],
    ids=["none", "period", "zero", "list"],
)
def test_which_layers_of_gemma_have_windows(pattern, expected, tmp_path):
    changes = {} if pattern is None else {"attention.sliding_window_pattern": pattern}
    config = config_of(written(tmp_path / "m.gguf", made("gemma3_text"), changes=changes))
    assert "".join(kind[0] for kind in config.layer_types) == expected


def test_the_deepest_gemma_scales_attention_by_its_width(tmp_path):
    model = made("gemma3_text", num_hidden_layers=62, intermediate_size=32, query_pre_attn_scalar=32)
    config = config_of(written(tmp_path / "m.gguf", model))
    assert (config.query_pre_attn_scalar, config.head_dim) == (128 // 4, 32)


@pytest.mark.parametrize(
    ("name", "changes", "without", "message"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0}, (),
         "m.gguf has gemma3.final_logit_softcapping 30.0, which is not supported"),
        ("gemma3_text", {}, ("attention.sliding_window",),
         "m.gguf lacks the setting gemma3.attention.sliding_window; it is damaged, or no model of this"
         " family"),
        ("qwen3_moe", {}, ("expert_used_count",),
         "m.gguf lacks the setting qwen3moe.expert_used_count; it is damaged, or no model of this family"),
        ("qwen3_moe", {"expert_shared_count": 1}, (),
         "m.gguf has qwen3moe.expert_shared_count 1, which is not supported"),
        ("qwen3_moe", {"expert_count": 4}, (),
         "m.gguf is damaged: blk.0.ffn_gate_exps.weight is 8 x 64 x 128, not 4 x 64 x 128"),
        ("gpt_oss-windows", {}, ("blk.1.attn_sinks.weight",),
         "m.gguf lacks blk.1.attn_sinks.weight, which a gpt_oss of 4 blocks has; download or convert it"
         " again"),
        ("phi3-long", {}, ("rope_factors_long.weight",),
         "m.gguf has one of rope_factors_short.weight and rope_factors_long.weight, and LongRoPE takes both"),
        ("phi3-long", {}, ("rope.scaling.original_context_length",),
         "m.gguf has LongRoPE, and lacks its setting rope.scaling.original_context_length"),
        ("phi3-long", {"rope.dimension_count": 32}, (),
         "m.gguf is damaged: a tensor of LongRoPE has no 16 positive divisors"),
    ],
)  # fmt: skip
def test_files_that_do_not_say_a_supported_model_are_refused(name, changes, without, message, tmp_path):
    assert refusal(written(tmp_path / "m.gguf", made(name), changes=changes, without=without)) == message
