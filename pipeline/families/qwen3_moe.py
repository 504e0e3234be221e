"""Qwen3 with experts in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from pipeline.families.experts import ExpertProjection, Experts
from pipeline.families.layer import Layer, attention, pre_norms
from pipeline.families.llama import same_windows
from pipeline.families.slots import Family, LayerSlots, Shapes, experts_of, refuse


def _slots(config: PreTrainedConfig) -> LayerSlots:
    # layers without experts would have an FFN of another width
    refuse(config, mlp_only_layers=[], decoder_sparse_step=1)
    return replace(
        same_windows(config),
        ffn=config.moe_intermediate_size,
        **experts_of(config.num_experts, config.num_experts_per_tok),
        experts_sum_to_one=config.norm_topk_prob,
    )


def expert_layer(block: Any, slots: LayerSlots) -> Layer:
    """Of a block whose FFN is a router and experts."""
    experts = Experts(
        block.mlp.gate,
        ExpertProjection(block.mlp.experts, "gate_up_proj"),
        ExpertProjection(block.mlp.experts, "down_proj"),
        per_token=slots.experts_per_token,
        sum_to_one=slots.experts_sum_to_one,
        gate=slots.gate,
    )
    return Layer(**attention(block.self_attn), **pre_norms(block), experts=experts)


def _stored(shapes: Shapes) -> Shapes:
    return each_expert(shapes, "gate_proj", "up_proj", "down_proj")


def each_expert(shapes: Shapes, gate: str, up: str, down: str) -> Shapes:
    """With the matrices of each expert, of these names, in place of those that hold all experts'."""
    found: Shapes = {}
    for name, shape in shapes.items():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith(".experts"):
            found[name] = shape
            continue
        experts, outputs, inputs = shape
        parts = {"gate_up_proj": (gate, up), "down_proj": (down,)}[kind]
        for expert in range(experts):
            found |= {f"{stem}.{expert}.{part}.weight": (outputs // len(parts), inputs) for part in parts}
    return found


QWEN3_MOE = Family(
    settings=frozenset(
        {
            *("attention_bias", "sliding_window", "use_sliding_window"),
            *("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob"),
            *("num_experts", "num_experts_per_tok"),
        }
    ),
    slots=_slots,
    layer=expert_layer,
    stored=_stored,
)
