"""What GGUF files of each architecture hold in a form of their own, and what they leave unsaid.

Names and forms are those that llama.cpp's converter writes; what no setting says is llama.cpp's constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.checkpoints.gguf_header import GgufError
from pipeline.checkpoints.gguf_rope import Divisors, long_rope, rope_parameters

Settings = Mapping[str, Any]  # of a file, without the architecture in front
Forms = Mapping[str, Callable[[Tensor], Tensor]]  # tensors of a block, by name: as views of a parameter

FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
SLIDING_THETA = 10_000.0  # of Gemma 3's layers with windows
DEEPEST_GEMMA = 62  # blocks of the one Gemma 3 whose attention is scaled by another size than the head's

Ropes = Callable[[Settings, int, Mapping[str, Divisors]], dict[str, Any]]


def _whole(parameter: Tensor) -> Tensor:
    return parameter


def _transposed(parameter: Tensor) -> Tensor:
    return parameter.transpose(1, 2)


def one_rope(settings: Settings, head_dim: int, tensors: Mapping[str, Divisors]) -> dict[str, Any]:
    """The RoPE of all layers, by settings or by one tensor of divisors."""
    return rope_parameters(settings, head_dim, tensors.get(FREQUENCIES))


def _gemma3_ropes(settings: Settings, head_dim: int, tensors: Mapping[str, Divisors]) -> dict[str, Any]:
    """A scaling is that of the layers without windows."""
    theta = float(settings.get("rope.freq_base_swa", SLIDING_THETA))
    return {
        "full_attention": rope_parameters(settings, head_dim, None),
        "sliding_attention": {"rope_type": "default", "rope_theta": theta},
    }


def _gpt_oss_rope(settings: Settings, head_dim: int, tensors: Mapping[str, Divisors]) -> dict[str, Any]:
    """The published models do not round YaRN's range of frequencies, which no setting can say."""
    parameters = rope_parameters(settings, head_dim, None)
    return {**parameters, "truncate": False} if parameters["rope_type"] == "yarn" else parameters


def _phi3_rope(settings: Settings, head_dim: int, tensors: Mapping[str, Divisors]) -> dict[str, Any]:
    rotated = settings.get("rope.dimension_count", head_dim)
    if (SHORT in tensors) != (LONG in tensors):
        raise GgufError(f"has one of {SHORT} and {LONG}, and LongRoPE takes both")
    if SHORT in tensors:
        parameters = long_rope(settings, rotated, tensors[SHORT], tensors[LONG])
    else:
        parameters = rope_parameters(settings, rotated, None)
    return {**parameters, "partial_rotary_factor": rotated / head_dim}


def _gemma3_scale(settings: Settings, head_dim: int) -> dict[str, Any]:
    by_width = settings["block_count"] == DEEPEST_GEMMA
    heads = settings["attention.head_count"]
    scalar = settings["embedding_length"] // heads if by_width else head_dim
    return {"query_pre_attn_scalar": scalar}


def _phi3_context(settings: Settings, head_dim: int) -> dict[str, Any]:
    original = "rope.scaling.original_context_length"
    return {"original_max_position_embeddings": settings.get(original, settings["context_length"])}


def _nothing(settings: Settings, head_dim: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """How the files of one architecture are read."""

    model_type: str  # as transformers calls the family
    sizes: Mapping[str, str] = field(default_factory=dict)  # settings of its own, by transformers' names
    reads: tuple[str, ...] = ()  # further settings that `more` and `ropes` look at
    unsaid: Mapping[str, Any] = field(default_factory=dict)  # settings that all its models have
    more: Callable[[Settings, int], dict[str, Any]] = _nothing  # settings that follow from several
    period: int | None = None  # every so many layers one has no window, where the file does not say which
    ropes: Ropes = one_rope
    rope_tensors: tuple[str, ...] = ()
    rotates_part: bool = False  # whether RoPE may turn only the first dimensions of each head
    forms: Mapping[str, Forms] = field(default_factory=dict)  # by what parameters are called in a block


GGUF_FAMILIES = {
    "llama": GgufFamily(model_type="llama", rope_tensors=(FREQUENCIES,)),
    "qwen2": GgufFamily(model_type="qwen2"),
    "qwen3": GgufFamily(model_type="qwen3"),
    "qwen3moe": GgufFamily(
        model_type="qwen3_moe",
        sizes={
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
        unsaid={"norm_topk_prob": True},
        forms={
            "mlp.experts.gate_up_proj": {
                "ffn_gate_exps.weight": lambda both: both.chunk(2, dim=1)[0],
                "ffn_up_exps.weight": lambda both: both.chunk(2, dim=1)[1],
            },
            "mlp.experts.down_proj": {"ffn_down_exps.weight": _whole},
        },
    ),
    "gemma3": GgufFamily(
        model_type="gemma3_text",
        sizes={"sliding_window": "attention.sliding_window"},
        reads=("rope.freq_base_swa",),
        more=_gemma3_scale,
        period=6,
        ropes=_gemma3_ropes,
    ),
    "phi3": GgufFamily(
        model_type="phi3",
        more=_phi3_context,
        ropes=_phi3_rope,
        rope_tensors=(SHORT, LONG),
        rotates_part=True,
    ),
    "gpt-oss": GgufFamily(
        model_type="gpt_oss",
        sizes={
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "intermediate_size": "expert_feed_forward_length",
            "sliding_window": "attention.sliding_window",
        },
        period=2,
        ropes=_gpt_oss_rope,
        forms={
            # transformers keeps the rows of gate and up by turns, the outputs last
            "mlp.experts.gate_up_proj": {
                "ffn_gate_exps.weight": lambda both: both[..., ::2].transpose(1, 2),
                "ffn_up_exps.weight": lambda both: both[..., 1::2].transpose(1, 2),
            },
            "mlp.experts.gate_up_proj_bias": {
                "ffn_gate_exps.bias": lambda both: both[..., ::2],
                "ffn_up_exps.bias": lambda both: both[..., 1::2],
            },
            "mlp.experts.down_proj": {"ffn_down_exps.weight": _transposed},
            "mlp.experts.down_proj_bias": {"ffn_down_exps.bias": _whole},
            "self_attn.sinks": {"attn_sinks.weight": _whole},
        },
    ),
}  # by `general.architecture`; Mistral's files call themselves llama
ARCHITECTURES = {family.model_type: name for name, family in GGUF_FAMILIES.items()}
