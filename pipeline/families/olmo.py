"""OLMo 2 and 3: norms behind attention and FFN alone, and of queries and keys over their whole width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from pipeline.families.layer import Layer, attention, dense_ffn
from pipeline.families.llama import typed_windows, whole_attention
from pipeline.families.projection import Norm
from pipeline.families.slots import Family, LayerSlots


def _slots_of_3(config: PreTrainedConfig) -> LayerSlots:
    return replace(typed_windows(config), ropes=tuple(config.layer_types))


def _layer(block: Any, slots: LayerSlots) -> Layer:
    return Layer(
        **attention(block.self_attn),
        input_norm=None,
        attention_post_norm=Norm(block.post_attention_layernorm),
        ffn_norm=None,
        ffn_post_norm=Norm(block.post_feedforward_layernorm),
        **dense_ffn(block.mlp),
    )


OLMO2 = Family(settings=frozenset({"attention_bias"}), slots=whole_attention, layer=_layer)
OLMO3 = Family(
    settings=frozenset({"attention_bias", "sliding_window", "layer_types"}), slots=_slots_of_3, layer=_layer
)
