"""Values in float8_e4m3fn, for products with weights of attention that are rounded likewise.

Each channel less the mean of all tokens, so that what values have in common is not rounded, and over what is
then largest, which becomes e4m3's end (SageAttention2, arXiv 2411.10958).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.fused import FP8, FP8_MAX
from pipeline.kernels.modules import kernels_for

TOKENS = 128  # of one program; up to a multiple of them there is room


@dataclass(frozen=True)
class RoundedValues:
    """A document's values: value = `values` * `spans` + `middles`, where weights of attention sum to 1.

    Token 8b + 2c + e of each 16 stands in place 4c + 2b + e, with b and e of 0 and 1 and c of 0 to 3: there
    the kernel has its weight. Behind the last token there are zeros.
    """

    values_KdT: Tensor  # float8_e4m3fn, contiguous; as many tokens as a multiple of `TOKENS`
    spans_Kd: Tensor  # float32
    middles_Kd: Tensor  # float32

    @classmethod
    def of(cls, v_TKd: Tensor) -> RoundedValues:
        """Round values. A channel with a value that is no number, or infinite, has such a span."""
        (tokens, heads, head_dim), kernels = v_TKd.shape, _kernels(v_TKd)
        low_Kd, high_Kd = torch.aminmax(v_TKd, dim=0)
        middles_Kd = v_TKd.mean(0, dtype=torch.float32)
        reach_Kd = torch.maximum(high_Kd.float() - middles_Kd, middles_Kd - low_Kd.float())
        spans_Kd = reach_Kd.clamp(min=1e-15) / FP8_MAX
        if kernels is None:
            return cls(_plainly(v_TKd, spans_Kd, middles_Kd), spans_Kd, middles_Kd)
        programs = -(-tokens // TOKENS)
        values_KdT = torch.empty(heads, head_dim, programs * TOKENS, dtype=FP8, device=v_TKd.device)
        kernels.round_values_kernel[(programs, heads)](
            *(v_TKd, *v_TKd.stride()[:2], spans_Kd, middles_Kd, values_KdT, tokens, programs * TOKENS),
            TOKENS=TOKENS,
            HEAD_DIM=head_dim,
            num_warps=8,
        )
        return cls(values_KdT, spans_Kd, middles_Kd)


def in_order(x_Gt: Tensor) -> Tensor:
    """Of each 16 along the last dimension the one that stands in a place: see `RoundedValues`."""
    return x_Gt.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def _plainly(v_TKd: Tensor, spans_Kd: Tensor, middles_Kd: Tensor) -> Tensor:
    rounded_TKd = ((v_TKd.float() - middles_Kd) / spans_Kd).clamp(-FP8_MAX, FP8_MAX)
    padded_TKd = torch.nn.functional.pad(rounded_TKd, (0, 0, 0, 0, 0, -len(v_TKd) % TOKENS))
    return in_order(padded_TKd.permute(1, 2, 0)).to(FP8).contiguous()


def _kernels(x: Tensor) -> Any | None:
    """The module of the kernel where it can run on this tensor, else None."""
    return kernels_for(x, "blocks.triton_rounding")
