"""What the families differ in, as values: what a configuration says, and where a block has its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from pipeline.errors import ModelError
from pipeline.families.layer import Layer

ONE_ROPE = "every layer"  # the kind of a rotary embedding that is the same in all layers
GATES = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # activations by the names of transformers


@dataclass(frozen=True, kw_only=True)
class LayerSlots:
    """What there is in a model's layers, read off its configuration before any weight is loaded."""

    ffn: int  # width inside the gated feed-forward network, or inside each expert
    windows: tuple[int | None, ...]  # of each layer: last positions that a token attends to
    ropes: tuple[str | None, ...]  # of each layer: the kind of its rotary embedding; None: it has none
    gate: str = "silu"  # the activation: of `GATES`, or clamped_swiglu, which has more of experts
    norm_offset: float = 0.0  # added to the weights of all norms
    attention_scale: float | None = None  # of products of queries and keys; None: 1/sqrt(head size)
    embedding_scale: float = 1.0
    query_growth: tuple[float, int] | None = None  # see `Decoder.rope`
    long_rope: bool = False  # whether RoPE may be a LongRope
    rotates_part: bool = False  # whether RoPE may turn only the first dimensions of each head
    rope_by_halves: bool = False  # whether RoPE's module gives cosines and sines of half of each head
    sinks: bool = False  # whether heads have sinks, see kernels/attention.py
    residual_scale: float = 1.0  # of what attention and FFN add to the residual stream
    logits_scale: float = 1.0
    experts: int = 0
    experts_per_token: int = 1
    experts_sum_to_one: bool = True  # the weights of a token's experts


Shapes = dict[str, tuple[int, ...]]  # of tensors, by name


def as_they_are(shapes: Shapes) -> Shapes:
    """Of a family whose checkpoints hold the parameters of its modules."""
    return shapes


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's configurations and blocks are read.

    `settings` are the fields of its configuration class that `slots` reads, or refuses with a ModelError for
    values that are not supported. What else its class has must be in `HARMLESS`, or have its default.
    """

    settings: frozenset[str]
    slots: Callable[[PreTrainedConfig], LayerSlots]
    layer: Callable[[Any, LayerSlots], Layer]  # of a block of transformers
    stored: Callable[[Shapes], Shapes] = as_they_are  # what checkpoints hold in place of a model's parameters
    inputs_first: bool = False  # whether matrices of experts are (E, D, N), which usually are (E, N, D)


def gate_of(activation: str) -> str:
    """The slot's value of an activation of transformers. Raises ModelError for one that is not supported."""
    if activation not in GATES:
        raise ModelError(f"activation {activation!r} is not supported ({', '.join(GATES)} are)")
    return GATES[activation]


def same_window(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Of a family whose layers all have the configuration's window."""
    return (getattr(config, "sliding_window", None),) * config.num_hidden_layers


def windows_by_type(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Of a family whose configuration names the type of each layer. Raises ModelError for other types."""
    types, window = config.layer_types or (), config.sliding_window
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != config.num_hidden_layers:
        raise ModelError(f"layer_types={list(types)} is not supported")
    if "sliding_attention" in types and window is None:
        raise ModelError("layer_types names sliding attention, and sliding_window has no value")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def experts_of(count: int, per_token: int) -> dict[str, Any]:
    """So many experts, of which a token passes some, as arguments of LayerSlots. Raises ModelError."""
    if not isinstance(count, int) or not isinstance(per_token, int) or not 1 <= per_token <= count:
        raise ModelError(f"the configuration gives each token {per_token} of {count} experts")
    return {"experts": count, "experts_per_token": per_token}


def refuse(config: PreTrainedConfig, **wanted: Any) -> None:
    """Raise ModelError where a setting has another value than the one that is supported."""
    for name, value in wanted.items():
        found = getattr(config, name, value)
        if found != value:
            raise ModelError(
                f"{name}={found!r} of model family {config.model_type!r} is not supported ({value!r} is)"
            )


def need_positive(config: PreTrainedConfig, *names: str) -> None:
    """Raise ModelError where one of these settings is not above 0."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ModelError(f"{name} is {getattr(config, name)}, and must be above 0")
