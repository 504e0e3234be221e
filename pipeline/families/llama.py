"""The families whose layers are Llama's, with biases and norms of single heads where there are any."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pipeline.families.layer import Layer, attention, dense_ffn, pre_norms
from pipeline.families.slots import ONE_ROPE, Family, LayerSlots, gate_of, same_window, windows_by_type


def _slots(config: PreTrainedConfig, windows: tuple[int | None, ...]) -> LayerSlots:
    return LayerSlots(
        ffn=config.intermediate_size,
        gate=gate_of(config.hidden_act),
        windows=windows,
        ropes=(ONE_ROPE,) * config.num_hidden_layers,
    )


def whole_attention(config: PreTrainedConfig) -> LayerSlots:
    """Of a family without windows."""
    return _slots(config, (None,) * config.num_hidden_layers)


def same_windows(config: PreTrainedConfig) -> LayerSlots:
    """Of a family whose layers have one window, or none."""
    return _slots(config, same_window(config))


def typed_windows(config: PreTrainedConfig) -> LayerSlots:
    """Of a family some of whose layers have a window."""
    return _slots(config, windows_by_type(config))


def llama_layer(block: Any, slots: LayerSlots) -> Layer:
    """Of a block with Llama's modules."""
    return Layer(**attention(block.self_attn), **pre_norms(block), **dense_ffn(block.mlp))


BIASES = frozenset({"attention_bias", "mlp_bias"})  # read off the modules
# `layer_types` says what the other two would
WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})

LLAMA = Family(settings=BIASES, slots=whole_attention, layer=llama_layer)
MISTRAL = Family(settings=frozenset({"sliding_window"}), slots=same_windows, layer=llama_layer)
QWEN2 = Family(settings=WINDOWS, slots=typed_windows, layer=llama_layer)
QWEN3 = Family(settings=WINDOWS | {"attention_bias"}, slots=typed_windows, layer=llama_layer)
