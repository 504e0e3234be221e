"""Ministral 3's text models: Mistral's layers, whose queries grow with their position."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from pipeline.errors import ModelError
from pipeline.families.llama import llama_layer, same_windows
from pipeline.families.slots import Family, LayerSlots


def _slots(config: PreTrainedConfig) -> LayerSlots:
    parameters = config.rope_parameters
    beta = parameters.get("llama_4_scaling_beta")
    length = parameters.get("original_max_position_embeddings")
    if beta is None or length is None:
        raise ModelError(
            "rope_parameters lacks llama_4_scaling_beta or original_max_position_embeddings, by which"
            " Ministral 3's queries grow"
        )
    return replace(same_windows(config), query_growth=(beta, length))


MINISTRAL3 = Family(settings=frozenset({"sliding_window"}), slots=_slots, layer=llama_layer)
