"""gpt-oss: experts in every layer, sinks, and windows in every other layer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pipeline.families.experts import ExpertProjection, Experts
from pipeline.families.layer import Layer, attention, pre_norms
from pipeline.families.slots import ONE_ROPE, Family, LayerSlots, experts_of, refuse, windows_by_type
from pipeline.kernels.expert_products import ALPHA, LIMIT


def _slots(config: PreTrainedConfig) -> LayerSlots:
    refuse(config, swiglu_alpha=ALPHA, swiglu_limit=LIMIT)
    return LayerSlots(
        ffn=config.intermediate_size,
        gate="clamped_swiglu",
        windows=windows_by_type(config),
        ropes=(ONE_ROPE,) * config.num_hidden_layers,
        rope_by_halves=True,
        sinks=True,
        **experts_of(config.num_local_experts, config.num_experts_per_tok),
    )


def _layer(block: Any, slots: LayerSlots) -> Layer:
    experts = Experts(
        block.mlp.router,
        ExpertProjection(block.mlp.experts, "gate_up_proj", inputs_first=True),
        ExpertProjection(block.mlp.experts, "down_proj", inputs_first=True),
        per_token=slots.experts_per_token,
        sum_to_one=slots.experts_sum_to_one,
        gate=slots.gate,
    )
    return Layer(
        **attention(block.self_attn),
        **pre_norms(block),
        experts=experts,
        sinks_H=block.self_attn.sinks.detach().float(),
    )


# a softmax over the chosen experts' logits is that over all, made to sum to one
GPT_OSS = Family(
    settings=frozenset(
        {
            *("attention_bias", "sliding_window", "layer_types", "num_local_experts", "num_experts_per_tok"),
            *("swiglu_alpha", "swiglu_limit"),
        }
    ),
    slots=_slots,
    layer=_layer,
    inputs_first=True,
)
