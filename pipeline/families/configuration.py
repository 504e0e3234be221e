"""What is read of a model's configuration before any weight is loaded, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, ModelError
from pipeline.families.slots import Family, LayerSlots
from pipeline.families.supported import FAMILIES
from pipeline.kernels.expert_products import grouped_fp8_available
from pipeline.kernels.fp8 import MULTIPLE, fp8_available
from pipeline.pruning.shape import ModelShape
from pipeline.settings.parse import parse_rope_scaling

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# settings that say nothing without others
IDLE = {"max_window_layers", "original_max_position_embeddings", "no_rope_layer_interval"}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings"),
)
# fields of configuration classes beside those of every family in `slots.Family`: dimensions that `shape_of`
# and the modules have, what is of use in training alone, and what only the tokenizer's side looks at
HARMLESS = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
        *("hidden_act", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
        *("pad_token_id", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    }
)


def check_config(config: PreTrainedConfig) -> None:
    """Raise ModelError, before any weight is loaded, for a model this file cannot open."""
    check_family(config.model_type)
    if config.is_heterogeneous:
        raise ModelError("per_layer_config, by which layers differ from each other, is not supported")
    _check_fields(config, FAMILIES[config.model_type])
    _check_sizes(config)
    slots = slots_of(config)
    if slots.ffn < 1:
        raise ModelError(f"feed-forward networks are {slots.ffn} wide, and at least 1 is needed")
    narrow = [window for window in slots.windows if window is not None and window < 1]
    if narrow:
        raise ModelError(f"sliding_window is {narrow[0]}: it must be 1 or more, or null for none")
    for parameters in _all_rope_parameters(config):
        _check_rope(parameters, slots, _head_dim(config))


def slots_of(config: PreTrainedConfig) -> LayerSlots:
    """What a supported family's layers have. Raises ModelError for a value that is not supported."""
    return FAMILIES[config.model_type].slots(config)


def _check_fields(config: PreTrainedConfig, family: Family) -> None:
    """Refuse a setting that nobody here knows: it may change what the model computes."""
    general = {field.name for field in fields(PreTrainedConfig)}
    for field in fields(config):
        if field.name in general | HARMLESS | family.settings or field.default is MISSING:
            continue
        found = getattr(config, field.name)
        if found != field.default:
            raise ModelError(
                f"{field.name}={found!r} of model family {config.model_type!r} is not supported"
                f" ({field.default!r} is)"
            )


def notes_on(config: PreTrainedConfig) -> list[str]:
    """A note on settings of other families, of which neither we nor transformers make anything."""
    own = {field.name for field in fields(config)} | {*config.attribute_map, *config.attribute_map.values()}
    others = {name for family in FAMILIES.values() for name in family.settings} - own - IDLE
    said = [f"{name} {getattr(config, name)}" for name in sorted(others) if getattr(config, name, None)]
    if not said:
        return []
    told, family = ", ".join(said), config.model_type
    return [f"config.json says {told}, which a {family} model has not: nothing is made of it"]


def _check_sizes(config: PreTrainedConfig) -> None:
    """Refuse sizes of which no model can be made."""
    for name in SIZES:
        if getattr(config, name) < 1:
            raise ModelError(f"{name} is {getattr(config, name)}, and at least 1 is needed")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ModelError(
            f"num_attention_heads is {heads}, which num_key_value_heads, {kv_heads}, does not divide"
        )
    if _head_dim(config) < 2 or _head_dim(config) % 2:
        raise ModelError(f"heads have {_head_dim(config)} dimensions, and RoPE turns an even number of them")
    if not 0 <= config.rms_norm_eps < math.inf:
        raise ModelError(f"rms_norm_eps is {config.rms_norm_eps}, and must be a number from 0 on")


def _head_dim(config: PreTrainedConfig) -> int:
    head_dim: int | None = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if head_dim is None else head_dim


def _check_rope(parameters: dict[str, Any], slots: LayerSlots, head_dim: int) -> None:
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "longrope" and slots.long_rope:
        if "original_max_position_embeddings" not in parameters:
            raise ModelError("RoPE type 'longrope' lacks original_max_position_embeddings")
    elif rope_type not in ROPE_TYPES:
        # dynamic RoPE chooses frequencies by the longest sequence of a call, so a pack's documents would
        # change each other; LongRoPE is known of families that are tried with it
        raise ModelError(f"RoPE type {rope_type!r} is not supported; types: {', '.join(ROPE_TYPES)}")
    factor = parameters.get("factor", 1.0) if rope_type in ROPE_TYPES[1:] else 1.0
    if not isinstance(factor, (int, float)) or factor < 1:
        raise ModelError(
            f"RoPE type {rope_type!r} has the factor {factor!r}, and it must be a number from 1 on"
        )
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial != 1 and not slots.rotates_part:
        raise ModelError(f"partial_rotary_factor={partial!r} of RoPE is not supported (1.0 is)")
    rotated = int(head_dim * partial)
    if not 1 <= rotated <= head_dim:
        raise ModelError(
            f"partial_rotary_factor={partial!r} of RoPE turns {rotated} of {head_dim} dimensions"
        )


def check_family(family: str) -> None:
    """Raise ModelError for a `model_type` this file cannot open."""
    if family not in FAMILIES:
        raise ModelError(f"model family {family!r} is not supported; families: {', '.join(FAMILIES)}")


def _all_rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Of each kind of layers that has its own. Raises ModelError for others beside these."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {kind: each for kind, each in parameters.items() if isinstance(each, dict)}
    if kinds and len(kinds) < len(parameters):
        others = ", ".join(sorted(parameters.keys() - kinds.keys()))
        raise ModelError(
            f"rope_parameters has {others} beside {' and '.join(kinds)}, for which it is to be said of each"
        )
    return list(kinds.values()) or [parameters]


def _rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """Of the layers that see the whole context, where they have their own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention") or parameters


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The model's dimensions; a window that holds the whole context is none."""
    slots, context = slots_of(config), _context(config)
    windows = tuple(None if window is None or window >= context else window for window in slots.windows)
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=slots.ffn,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocab=config.vocab_size,
        context=context,
        windows=windows if any(windows) else (),
        has_long_rope=_rope_parameters(config).get("rope_type") == "longrope",
        experts=slots.experts,
        experts_per_token=slots.experts_per_token,
        has_sinks=slots.sinks,
    )


def _context(config: PreTrainedConfig) -> int:
    """The longest sequence that the configuration's RoPE is made for.

    With YaRN this is what the factor makes of the original context. Model cards tell to add the scaling and
    to leave max_position_embeddings as it was; where it is the longer one already, it stands. The other types
    leave it to max_position_embeddings: Llama 3's is no product of its parameters, and of a linear factor
    nobody can say whether it is in it already.
    """
    own: int = config.max_position_embeddings
    scaling = _rope_parameters(config)
    if scaling.get("rope_type") != "yarn":
        return own
    return max(own, int(scaling["factor"] * scaling["original_max_position_embeddings"]))


def with_rope_scaling(config: PreTrainedConfig, spec: str) -> PreTrainedConfig:
    """The configuration with YaRN (arXiv 2309.00071) over a context that grows by the factor of `spec`.

    As model cards tell to write it by hand: `yarn:FACTOR` over the configuration's own context, or
    `yarn:FACTOR:ORIGINAL` over the one that the model was trained on, where the configuration says more.
    Raises ModelError for a model that scales already, or whose context would not grow.
    """
    factor, original = parse_rope_scaling(spec)
    if len(_all_rope_parameters(config)) > 1:
        raise ModelError(f"--rope-scaling {spec}: the model's layers have RoPEs of several kinds")
    parameters = _rope_parameters(config)
    if parameters.get("rope_type", "default") != "default" or "rope_theta" not in parameters:
        raise ModelError(
            f"--rope-scaling {spec}: the model's configuration scales its RoPE already"
            f" ({_scaling_in_words(config)}), and the two cannot be combined; leave the flag out, or take the"
            " scaling out of the configuration"
        )
    own = config.max_position_embeddings
    if original is not None and original > own:
        raise ModelError(f"--rope-scaling {spec}: the model's context is {own:,}, less than {original:,}")
    scaled = copy.deepcopy(config)
    scaled.rope_parameters = {
        **parameters,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original or own,
    }
    scaled.max_position_embeddings = int(factor * (original or own))
    before, after = shape_of(config).context, shape_of(scaled).context
    if after <= before:
        raise ModelError(
            f"--rope-scaling {spec}: the context would be {after:,} tokens, and is {before:,} without it;"
            " give a larger factor, or leave the flag out"
        )
    return scaled


def _scaling_in_words(config: PreTrainedConfig) -> str:
    """As `yarn, factor 4 over 32,768 tokens: a context of 131,072`."""
    parameters = _rope_parameters(config)
    factor, original = parameters.get("factor"), parameters.get("original_max_position_embeddings")
    words = str(parameters.get("rope_type", "a type without rope_theta"))
    words += f", factor {factor:g}" if factor else ""
    words += f" over {original:,} tokens" if original else ""
    return f"{words}: a context of {shape_of(config).context:,}"


def check_fp8(device: torch.device, dtype: torch.dtype, shape: ModelShape) -> None:
    """Raise ConfigError, with the reason, where linear layers cannot be computed in fp8."""
    reason = fp8_available(device)
    if reason is None and shape.experts:
        reason = grouped_fp8_available(device)
    widths = shape.hidden, shape.ffn, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if reason is None and any(width % MULTIPLE for width in widths):
        reason = f"the sides of its weights, {', '.join(map(str, widths))}, must divide by {MULTIPLE}"
    if reason is None and dtype != torch.bfloat16:
        reason = f"its products are bfloat16, and the model is {str(dtype).removeprefix('torch.')}"
    if reason is not None:
        raise ConfigError(f"fp8 cannot be used here: {reason}")
