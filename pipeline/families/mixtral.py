"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from pipeline.families.llama import same_windows
from pipeline.families.qwen3_moe import expert_layer
from pipeline.families.slots import Family, LayerSlots


def _slots(config: PreTrainedConfig) -> LayerSlots:
    return replace(
        same_windows(config),
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
    )


MIXTRAL = Family(
    settings=frozenset({"sliding_window", "num_experts_per_tok", "num_local_experts"}),
    slots=_slots,
    layer=expert_layer,
)
