"""Phi-3: Llama's layers with fused projections, and in some models RoPE of a part of each head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from pipeline.families.layer import Layer, pre_norms
from pipeline.families.llama import same_windows
from pipeline.families.projection import Projection
from pipeline.families.slots import Family, LayerSlots


def _slots(config: PreTrainedConfig) -> LayerSlots:
    return replace(same_windows(config), rotates_part=True, long_rope=True)


def _layer(block: Any, slots: LayerSlots) -> Layer:
    return Layer(
        qkv=Projection(block.self_attn.qkv_proj),
        output=Projection(block.self_attn.o_proj),
        gate_up=Projection(block.mlp.gate_up_proj),
        down=Projection(block.mlp.down_proj),
        **pre_norms(block),
    )


PHI3 = Family(
    settings=frozenset({"sliding_window", "original_max_position_embeddings", "resid_pdrop", "embd_pdrop"}),
    slots=_slots,
    layer=_layer,
)
