"""Gemma 3's text models: norms on both sides of attention and FFN, windows in most layers, two RoPEs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pipeline.families.layer import Layer, dense_ffn
from pipeline.families.projection import Norm, Projection
from pipeline.families.slots import Family, LayerSlots, gate_of, need_positive, refuse, windows_by_type


def _slots(config: PreTrainedConfig) -> LayerSlots:
    refuse(
        config,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        use_bidirectional_attention=False,
    )
    need_positive(config, "query_pre_attn_scalar")
    return LayerSlots(
        ffn=config.intermediate_size,
        gate=gate_of(config.hidden_activation),
        windows=windows_by_type(config),
        ropes=tuple(config.layer_types),
        norm_offset=1.0,
        attention_scale=config.query_pre_attn_scalar**-0.5,
    )


def _layer(block: Any, slots: LayerSlots) -> Layer:
    module = block.self_attn

    def norm(module: Any) -> Norm:
        return Norm(module, slots.norm_offset)

    return Layer(
        qkv=Projection(module.q_proj, module.k_proj, module.v_proj),
        output=Projection(module.o_proj),
        q_norm=norm(module.q_norm),
        k_norm=norm(module.k_norm),
        input_norm=norm(block.input_layernorm),
        attention_post_norm=norm(block.post_attention_layernorm),
        ffn_norm=norm(block.pre_feedforward_layernorm),
        ffn_post_norm=norm(block.post_feedforward_layernorm),
        **dense_ffn(block.mlp),
    )


# the embedding is scaled by its own module
GEMMA3_TEXT = Family(
    settings=frozenset(
        {
            *("attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
            *("hidden_activation", "attn_logit_softcapping", "final_logit_softcapping"),
            *("use_bidirectional_attention",),
        }
    ),
    slots=_slots,
    layer=_layer,
)
