"""Granite: Llama's layers, whose streams are scaled."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from pipeline.families.llama import BIASES, llama_layer, whole_attention
from pipeline.families.slots import Family, LayerSlots, need_positive


def _slots(config: PreTrainedConfig) -> LayerSlots:
    need_positive(config, "attention_multiplier", "logits_scaling")
    return replace(
        whole_attention(config),
        attention_scale=config.attention_multiplier,
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logits_scale=1 / config.logits_scaling,
    )


GRANITE = Family(
    settings=BIASES
    | {"attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"},
    slots=_slots,
    layer=llama_layer,
)
