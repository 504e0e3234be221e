"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from pipeline.families.llama import same_windows
from pipeline.families.qwen3_moe import each_expert, expert_layer
from pipeline.families.slots import Family, LayerSlots, Shapes, experts_of


def _slots(config: PreTrainedConfig) -> LayerSlots:
    experts = experts_of(config.num_local_experts, config.num_experts_per_tok)
    return replace(same_windows(config), **experts)


def _stored(shapes: Shapes) -> Shapes:
    named = {name.replace(".mlp.", ".block_sparse_moe."): shape for name, shape in shapes.items()}
    return each_expert(named, "w1", "w3", "w2")


MIXTRAL = Family(
    settings=frozenset({"sliding_window", "num_experts_per_tok", "num_local_experts"}),
    slots=_slots,
    layer=expert_layer,
    stored=_stored,
)
