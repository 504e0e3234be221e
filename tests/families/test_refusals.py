"""Configurations that would be computed wrongly are refused by the name of what is not known."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from conftest import SIZES
from family_cases import CASES, model_of
from transformers import AutoConfig, LlamaConfig

from pipeline.errors import ConfigError, ModelError
from pipeline.families.configuration import check_config
from pipeline.families.decoder import Decoder


def config_of(name, **settings):
    family, own = CASES[name]
    return AutoConfig.for_model(family, **{**SIZES, **deepcopy(own), **settings})


@pytest.mark.parametrize("name", CASES)
def test_what_is_supported_is_not(name):
    check_config(config_of(name))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "final_logit_softcapping", 30.0),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("qwen3_moe", "mlp_only_layers", [1]),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("gpt_oss", "swiglu_alpha", 1.5),
        ("gpt_oss", "swiglu_limit", 9.0),
    ],
)
def test_settings_with_other_values(name, setting, value):
    with pytest.raises(ModelError, match=rf"^{setting}={value!r} of model family ".replace("[", r"\[")):
        check_config(config_of(name, **{setting: value}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, and at least 1 is needed"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 4, which num_key_value_heads, 3, does not divide",
        ),
        (
            {"head_dim": None, "hidden_size": 12},
            "heads have 3 dimensions, and RoPE turns an even number of them",
        ),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, and must be a number from 0 on"),
        ({"sliding_window": 0}, "sliding_window is 0: it must be 1 or more, or null for none"),
        (
            {"per_layer_config": {"1": {"intermediate_size": 48}}},
            "per_layer_config, by which layers differ from each other, is not supported",
        ),
    ],
)
def test_settings_of_which_no_model_can_be_made(settings, message):
    config = AutoConfig.for_model("mistral", **{**SIZES, "head_dim": 16, **settings})
    with pytest.raises(ModelError) as caught:
        check_config(config)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_more_experts_for_a_token_than_there_are(name):
    with pytest.raises(ModelError, match=r"^the configuration gives each token 9 of [68] experts$"):
        check_config(config_of(name, num_experts_per_tok=9))


@pytest.mark.parametrize(("name", "setting"), [("llama", "hidden_act"), ("gemma3_text", "hidden_activation")])
def test_other_activations(name, setting):
    with pytest.raises(ModelError) as caught:
        check_config(config_of(name, **{setting: "relu"}))
    assert str(caught.value) == "activation 'relu' is not supported (silu, gelu_pytorch_tanh are)"


def test_types_of_layers():
    config = config_of("qwen2")
    config.layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(ModelError, match=r"^layer_types=\['full_attention', 'chunked_attention'"):
        check_config(config)
    config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(ModelError, match="names sliding attention, and sliding_window has no value"):
        check_config(config)


def test_rope_of_a_part_of_each_head():
    config = config_of("llama")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ModelError, match=r"^partial_rotary_factor=0.5 of RoPE is not supported"):
        check_config(config)


def test_rope_of_more_than_a_head():
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}
    with pytest.raises(ModelError, match=r"^partial_rotary_factor=1.5 of RoPE turns 24 of 16 dimensions$"):
        check_config(config_of("phi3", rope_parameters=rope))


@pytest.mark.parametrize(
    ("name", "setting"), [("granite", "logits_scaling"), ("gemma3_text", "query_pre_attn_scalar")]
)
def test_scales_that_are_none(name, setting):
    with pytest.raises(ModelError, match=rf"^{setting} is 0, and must be above 0$"):
        check_config(config_of(name, **{setting: 0}))


def test_rope_of_one_kind_of_layers():
    config = config_of("gemma3_text")
    config.rope_parameters["sliding_attention"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match=r"^RoPE type 'dynamic' is not supported"):
        check_config(config)


def test_rope_of_all_layers_beside_that_of_each_kind():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    with pytest.raises(ModelError) as caught:
        check_config(config_of("gemma3_text", rope_parameters=scaling))
    assert str(caught.value) == (
        "rope_parameters has factor, original_max_position_embeddings, rope_type beside full_attention and"
        " sliding_attention, for which it is to be said of each"
    )


@dataclass
class LaterLlamaConfig(LlamaConfig):
    """As a later release of transformers may have it."""

    query_gain: float = 1.0


def test_settings_that_nobody_here_knows():
    check_config(LaterLlamaConfig(**SIZES))
    with pytest.raises(ModelError) as caught:
        check_config(LaterLlamaConfig(**SIZES, query_gain=2.0))
    assert str(caught.value) == "query_gain=2.0 of model family 'llama' is not supported (1.0 is)"


def test_modules_that_scale_attention_as_the_configuration_does_not():
    model = model_of("gemma3_text").model
    model.model.layers[2].self_attn.scaling = 0.25
    with pytest.raises(ModelError, match=r"^attention scaling 0.25 is not supported"):
        Decoder(model)


def test_experts_in_fp8_where_torch_has_no_product_for_them(monkeypatch):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    monkeypatch.setattr("pipeline.families.configuration.grouped_fp8_available", lambda device: "no product")
    decoder = model_of("qwen3_moe", torch.bfloat16)
    for linears in ("fp8", "mixed"):
        with pytest.raises(ConfigError, match=r"^fp8 cannot be used here: no product$"):
            decoder.use_linears(linears)
    model_of("qwen3", torch.bfloat16).use_linears("fp8")
