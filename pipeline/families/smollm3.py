"""SmolLM3: Llama's layers, some without RoPE, which may have windows."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from pipeline.errors import ModelError
from pipeline.families.llama import BIASES, llama_layer, typed_windows
from pipeline.families.slots import ONE_ROPE, Family, LayerSlots


def _slots(config: PreTrainedConfig) -> LayerSlots:
    slots = typed_windows(config)
    if any(slots.windows) and not config.use_sliding_window:
        raise ModelError("layer_types names sliding attention, and use_sliding_window is off")
    has_rope = config.no_rope_layers[: config.num_hidden_layers]  # 1 where a layer has one
    if len(has_rope) != config.num_hidden_layers:
        raise ModelError(f"no_rope_layers has {len(has_rope)} values, and the model has more layers")
    return replace(slots, ropes=tuple(ONE_ROPE if each else None for each in has_rope))


SMOLLM3 = Family(
    settings=BIASES
    | {"no_rope_layers", "no_rope_layer_interval"}
    | {"use_sliding_window", "sliding_window", "layer_types"},
    slots=_slots,
    layer=llama_layer,
)
