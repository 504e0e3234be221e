"""What lies between a token's choice of experts and the sum of what they make: products of groups of rows.

Rows, one of each token and each of its experts, are sorted by expert on the device, so that nothing waits for
it and all sizes are known to the host: a decode step can be captured. Letters beside those of segments.py:
E experts, A of them for each token, S = T * A rows, N outputs of a product, F inner width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pipeline.kernels.fp8 import Fp8Weight, fp8_linear
from pipeline.kernels.modules import kernels_for

CAPABILITY = (8, 0)  # of the first GPUs for which torch has grouped products
FP8_CAPABILITY = 9  # of those for which it has them in float8 with scales for rows: Hopper's alone
ALPHA, LIMIT = 1.702, 7.0  # of `clamped_swiglu`
PIECE = 1024  # values of a row that a program works on
ROWS = 512  # that `clamped_swiglu` takes at once where there is no kernel


@dataclass(frozen=True)
class Groups:
    """The rows of some tokens in the order of their experts."""

    order_S: Tensor  # of each row its place among the tokens' experts, (T, A) flattened
    expert_S: Tensor  # ascending
    ends_E: Tensor  # int32: where each expert's rows end
    place_TA: Tensor  # where the rows of each token are

    @classmethod
    def of(cls, expert_TA: Tensor, experts: int) -> Self:
        """Of the experts that each token has, among so many."""
        order_S = expert_TA.flatten().argsort(stable=True)
        expert_S = expert_TA.flatten().index_select(0, order_S)
        every_E = torch.arange(experts, device=expert_TA.device)
        ends_E = torch.searchsorted(expert_S, every_E, right=True).int()
        index_S = torch.arange(len(order_S), device=expert_TA.device)
        place_TA = torch.empty_like(order_S).scatter_(0, order_S, index_S).view_as(expert_TA)
        return cls(order_S, expert_S, ends_E, place_TA)

    def gathered(self, x_TD: Tensor) -> Tensor:
        """(S, D) the input of each row."""
        token_S = self.order_S // self.place_TA.shape[1]
        if x_TD.itemsize > 1:
            return x_TD.index_select(0, token_S)
        return x_TD.view(torch.uint8).index_select(0, token_S).view(x_TD.dtype)  # float8 is not indexed

    def weighted_sum(self, made_SD: Tensor, weights_TA: Tensor) -> Tensor:
        """(T, D) of each token, its experts in the order of `weights_TA` whatever the other tokens are."""
        kernels = kernels_for(made_SD, "triton_experts")
        if kernels is None:
            return embedding_bag(self.place_TA, made_SD, per_sample_weights=weights_TA, mode="sum")
        (tokens, per_token), width = self.place_TA.shape, made_SD.shape[1]
        out_TD = made_SD.new_empty(tokens, width)
        kernels.weighted_sum_kernel[(tokens, -(-width // PIECE))](
            *(made_SD, made_SD.stride(0), self.place_TA, weights_TA, out_TD, width),
            CHOSEN=per_token,
            BLOCK=PIECE,
            num_warps=4,
        )
        return out_TD


def grouped_product(x_SD: Tensor, weight_END: Tensor, ends_E: Tensor) -> Tensor:
    """(S, N): the rows up to ends_E[0] times the first matrix, those up to ends_E[1] the next, and so on.

    By torch's grouped product in bfloat16 on a GPU, which does not wait for it; elsewhere one by one.
    """
    if x_SD.dtype == torch.bfloat16 and _has_grouped_product(x_SD.device):
        product: Any = torch.nn.functional.grouped_mm
        return product(x_SD, weight_END.transpose(1, 2), offs=ends_E)
    out_SN = x_SD.new_empty(len(x_SD), weight_END.shape[1])
    for expert, rows in _ranges(ends_E):
        torch.mm(x_SD[rows], weight_END[expert].t(), out=out_SN[rows])
    return out_SN


def grouped_fp8_product(x_fp8_SD: Tensor, scale_S1: Tensor, weight: Fp8Weight, ends_E: Tensor) -> Tensor:
    """`grouped_product` of a quantised input with a weight of (E, N, D), in bfloat16.

    On a GPU torch's kernel applies the scales of rows and outputs; elsewhere one by one, slowly.
    """
    if x_fp8_SD.is_cuda:
        functional: Any = torch.nn.functional
        by_row = functional.ScalingType.RowWise
        scaled: Tensor = functional.scaled_grouped_mm(
            x_fp8_SD,
            weight.quantised.transpose(1, 2),
            scale_S1.flatten(),
            by_row,
            weight.scale.squeeze(1),
            by_row,
            offs=ends_E,
            output_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return scaled
    out_SN = torch.empty(
        len(x_fp8_SD), weight.quantised.shape[1], dtype=torch.bfloat16, device=x_fp8_SD.device
    )
    for expert, rows in _ranges(ends_E):
        of_expert = Fp8Weight(weight.quantised[expert], weight.scale[expert])
        fp8_linear(x_fp8_SD[rows], scale_S1[rows], of_expert, out_TN=out_SN[rows])
    return out_SN


def clamped_swiglu(gate_up_S2F: Tensor, bias_E2F: Tensor, expert_S: Tensor) -> Tensor:
    """(S, F): gate * sigmoid(ALPHA * gate) * (up + 1), float32 inside, of products that lack their bias.

    Gates are the even columns and their values the odd ones (gpt-oss); both are limited to `LIMIT`, gates
    above alone.
    """
    kernels = kernels_for(gate_up_S2F, "triton_experts")
    rows, width = len(gate_up_S2F), gate_up_S2F.shape[1] // 2
    out_SF = gate_up_S2F.new_empty(rows, width)
    if kernels is None:
        # some rows at a time: their values in float32 would else be most of a prefill's memory
        for start in range(0, rows, ROWS):
            some = slice(start, start + ROWS)
            out_SF[some] = _clamped_swiglu(gate_up_S2F[some], bias_E2F[expert_S[some]])
        return out_SF
    kernels.clamped_swiglu_kernel[(rows, -(-width // PIECE))](
        *(gate_up_S2F, gate_up_S2F.stride(0), bias_E2F, bias_E2F.stride(0), expert_S, out_SF, width),
        ALPHA=ALPHA,
        LIMIT=LIMIT,
        BLOCK=PIECE,
        num_warps=4,
    )
    return out_SF


def _clamped_swiglu(gate_up_S2F: Tensor, bias_S2F: Tensor) -> Tensor:
    values_S2F = gate_up_S2F.float() + bias_S2F.float()
    gate_SF = values_S2F[:, ::2].clamp(max=LIMIT)
    up_SF = values_S2F[:, 1::2].clamp(-LIMIT, LIMIT)
    return gate_SF * torch.sigmoid(ALPHA * gate_SF) * (up_SF + 1)


def grouped_fp8_available(device: torch.device) -> str | None:
    """None if `grouped_fp8_product` runs on a device that `fp8_linear` runs on, else why not."""
    if device.type != "cuda":
        return None
    if not hasattr(torch.nn.functional, "scaled_grouped_mm"):
        return f"experts in FP8 need a torch with scaled_grouped_mm, and this is torch {torch.__version__}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != FP8_CAPABILITY:
        name, has = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return (
            f"experts in FP8 need a GPU of compute capability {FP8_CAPABILITY}.0 (Hopper); {name} has {has}"
        )
    return None


def _ranges(ends_E: Tensor) -> list[tuple[int, slice]]:
    """The rows of each expert that has any; waits for the device."""
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    return [
        (n, slice(start, end)) for n, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end
    ]


@cache
def _has_grouped_product(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
