"""The weights of one decoder layer, wherever its family has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.errors import ModelError
from pipeline.families.experts import ExpertProjection, Experts
from pipeline.families.projection import Norm, Projection


@dataclass(kw_only=True)
class Layer:
    """Norms are None where the family has none there; the FFN is either gated projections, or experts."""

    qkv: Projection
    output: Projection
    input_norm: Norm | None
    ffn_norm: Norm | None
    q_norm: Norm | None = None  # of each head, or of the whole width, as its weight is
    k_norm: Norm | None = None
    attention_post_norm: Norm | None = None  # of what attention adds to the residual stream
    ffn_post_norm: Norm | None = None
    gate_up: Projection | None = None
    down: Projection | None = None
    experts: Experts | None = None
    sinks_H: Tensor | None = None  # float32; see kernels/attention.py

    def leave_biases_to_others(self) -> None:
        """Do without the biases of what is summed over ranks, which one of them adds."""
        for summed in (self.output, self.down):
            if summed is not None:
                summed.bias = None

    def normed_heads(self, q_THd: Tensor, k_TKd: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after their norms, where there are any; either may be of no heads."""
        q_THd = q_THd if self.q_norm is None or not q_THd.shape[1] else self.q_norm.of_heads(q_THd)
        k_TKd = k_TKd if self.k_norm is None or not k_TKd.shape[1] else self.k_norm.of_heads(k_TKd)
        return q_THd, k_TKd

    @property
    def projections(self) -> dict[str, Projection | ExpertProjection]:
        """Those there are, by names that `LinearPrecision.form` knows."""
        named: dict[str, Projection | ExpertProjection | None] = {
            "self_attn.qkv_proj": self.qkv,
            "self_attn.o_proj": self.output,
            "mlp.gate_up_proj": self.gate_up,
            "mlp.down_proj": self.down,
        }
        if self.experts is not None:
            named["mlp.experts.gate_up_proj"] = self.experts.gate_up
            named["mlp.experts.down_proj"] = self.experts.down
        return {name: each for name, each in named.items() if each is not None}


def dense_ffn(mlp: Any) -> dict[str, Any]:
    """The usual feed-forward network, as arguments of a Layer."""
    return {"gate_up": Projection(mlp.gate_proj, mlp.up_proj), "down": Projection(mlp.down_proj)}


def attention(module: Any) -> dict[str, Any]:
    """The usual projections, as arguments of a Layer, and norms of queries and keys where there are any."""
    return {
        "qkv": Projection(module.q_proj, module.k_proj, module.v_proj),
        "output": Projection(module.o_proj),
        "q_norm": Norm(module.q_norm) if hasattr(module, "q_norm") else None,
        "k_norm": Norm(module.k_norm) if hasattr(module, "k_norm") else None,
    }


def pre_norms(block: Any) -> dict[str, Any]:
    """The usual norms before attention and before the FFN, as arguments of a Layer."""
    return {"input_norm": Norm(block.input_layernorm), "ffn_norm": Norm(block.post_attention_layernorm)}


def attention_scale(blocks: Any, slots: Any, head_dim: int) -> float:
    """By which products of queries and keys are scaled.

    Raises ModelError where the modules have another than the configuration.
    """
    scale: float = slots.attention_scale or head_dim**-0.5
    for block in blocks:
        if abs(block.self_attn.scaling - scale) > 1e-6:
            raise ModelError(f"attention scaling {block.self_attn.scaling} is not supported ({scale} is)")
    return scale


def are_plain(layers: Sequence[Layer], slots: Any, query_scale: float) -> bool:
    """Whether all layers are what the kernels for decode steps compute."""
    first = layers[0]
    return (
        (slots.gate, slots.experts, slots.residual_scale) == ("silu", 0, 1)
        and len(set(slots.ropes)) == 1
        and slots.ropes[0] is not None
        and math.isclose(query_scale, 1)
        and first.q_norm is None
        and first.attention_post_norm is None
        and first.ffn_post_norm is None
        and first.input_norm is not None
        and (slots.norm_offset, slots.query_growth, slots.rotates_part) == (0, None, False)
    )
