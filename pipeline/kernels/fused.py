"""The small steps of a decoder layer over packed tokens, each in one pass over memory.

Every function has two paths that compute the same: plain torch, and on a GPU a kernel of
`triton_kernels`. Tensors need a contiguous last dimension; their other strides are free. A kernel keeps a
whole row in registers, so rows may be up to 8192 wide, and those of `silu_mul_quantized` 32768.
Quantised rows are float8_e4m3fn with a float32 scale each: value = float8 * scale.

Shape letters beside those of segments.py: F inner width of the FFN, N heads of either kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu

from pipeline.kernels.modules import kernels_for, power_of_two

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # its reciprocal is finite, so rows of zeros stay zeros


Quantised = tuple[Tensor, Tensor]  # float8 (T, width) and scale (T, 1)
PIECE = 1024  # values of a row that a program gates at a time


def rope_(q_THd: Tensor, k_TKd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> None:
    """Rotary embedding in place, as transformers' `apply_rotary_pos_emb`, in float32 inside, or float64.

    The halves of `cos_Td` and `sin_Td` must repeat, as transformers makes them.
    """
    kernels = _kernels(q_THd)
    if kernels is None:
        _rotate_(q_THd, cos_Td, sin_Td)
        _rotate_(k_TKd, cos_Td, sin_Td)
        return
    tokens, heads, head_dim = q_THd.shape
    kv_heads = k_TKd.shape[1]
    blocks = {
        "HEADS": power_of_two(heads),
        "KV_HEADS": power_of_two(kv_heads),
        "HALF": power_of_two(head_dim // 2),
    }
    kernels.rope_kernel[(tokens,)](
        *(q_THd, *q_THd.stride()[:2], heads),
        *(k_TKd, *k_TKd.stride()[:2], kv_heads),
        *(cos_Td, cos_Td.stride(0), sin_Td, sin_Td.stride(0), head_dim // 2),
        **blocks,
        num_warps=warps_for(2 * blocks["HEADS"] * blocks["HALF"]),
    )


def gated(gate_up_T2F: Tensor, gate: str) -> Tensor:
    """gate(first half) * second half, (T, F) in the input's type; `gate` is silu or gelu_tanh."""
    if gate == "silu":
        return silu_mul(gate_up_T2F)
    gate_TF, up_TF = gate_up_T2F.float().chunk(2, dim=-1)
    return gelu(gate_TF, approximate="tanh").mul_(up_TF).to(gate_up_T2F.dtype)


def gated_quantized(gate_up_T2F: Tensor, gate: str) -> Quantised:
    """`quantize_rows(gated(gate_up_T2F, gate))`."""
    if gate == "silu":
        return silu_mul_quantized(gate_up_T2F)
    return quantize_rows(gated(gate_up_T2F, gate))


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(first half) * second half, (T, F) in the input's type, float32 inside."""
    kernels = _kernels(gate_up_T2F)
    if kernels is None:
        gate_TF, up_TF = gate_up_T2F.float().chunk(2, dim=-1)
        return silu(gate_TF).mul_(up_TF).to(gate_up_T2F.dtype)
    out_TF = gate_up_T2F.new_empty(len(gate_up_T2F), gate_up_T2F.shape[1] // 2)
    rows, width = out_TF.shape
    grid = (rows, -(-width // PIECE))
    kernels.silu_mul_kernel[grid](gate_up_T2F, gate_up_T2F.stride(0), out_TF, width, BLOCK=PIECE, num_warps=4)
    return out_TF


def silu_mul_quantized(gate_up_T2F: Tensor) -> Quantised:
    """`quantize_rows(silu_mul(gate_up_T2F))`."""
    kernels = _kernels(gate_up_T2F)
    if kernels is None:
        return quantize_rows(silu_mul(gate_up_T2F))
    return launch_silu_mul(kernels, gate_up_T2F)


def quantize_rows(x_TD: Tensor) -> Quantised:
    """Float8 rows whose largest magnitude becomes 448. A row with a NaN or an infinity has such a scale."""
    kernels = _kernels(x_TD)
    if kernels is None:
        values_TD = x_TD.float()
        scale_T1 = (values_TD.abs().amax(1, keepdim=True) / FP8_MAX).clamp(min=SMALLEST_SCALE)
        return (values_TD * (1 / scale_T1)).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale_T1
    out_TD, scale_T1 = empty_fp8(x_TD, x_TD.shape[1])
    launch_rows(kernels.quantize_rows_kernel, out_TD, x_TD, x_TD.stride(0), out_TD, scale_T1)
    return out_TD, scale_T1


def rms_norm_quantized(x_TD: Tensor, weight_D: Tensor, eps: float) -> Quantised:
    """`quantize_rows` of torch's `rms_norm`, which is rounded to the input's type in between."""
    kernels = _kernels(x_TD)
    if kernels is None:
        return quantize_rows(rms_norm(x_TD, weight_D.shape, weight_D, eps))
    out_TD, scale_T1 = empty_fp8(x_TD, x_TD.shape[1])
    launch_rows(kernels.rms_norm_kernel, out_TD, x_TD, x_TD.stride(0), weight_D, eps, out_TD, scale_T1)
    return out_TD, scale_T1


def _kernels(x: Tensor) -> Any | None:
    """The module of Triton kernels where they can run on this tensor, else None."""
    return kernels_for(x, "triton_kernels")


def _rotate_(x_TNd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> None:
    wide = torch.promote_types(x_TNd.dtype, torch.float32)
    values_TNd = x_TNd.to(wide)
    first, second = values_TNd.chunk(2, dim=-1)
    turned_TNd = torch.cat((-second, first), dim=-1)
    x_TNd.copy_(values_TNd * cos_Td.to(wide)[:, None] + turned_TNd * sin_Td.to(wide)[:, None])


def launch_silu_mul(
    kernels: Any,
    gate_up_T2F: Tensor,
    row_scale_T1: Tensor | None = None,
    scale_1N: Tensor | None = None,
    bias_N: Tensor | None = None,
) -> Quantised:
    """See `step.Product` for what a product may lack."""
    out_TF, scale_T1 = empty_fp8(gate_up_T2F, gate_up_T2F.shape[1] // 2)
    rows, width = out_TF.shape
    first = max(1, power_of_two(width) // 2)
    kernels.silu_mul_quantized_kernel[(rows,)](
        *(gate_up_T2F, gate_up_T2F.stride(0), row_scale_T1, scale_1N, bias_N, out_TF, scale_T1, width),
        FIRST=first,
        REST=power_of_two(max(1, width - first)),
        num_warps=min(16, max(4, first // 512)),
    )
    return out_TF, scale_T1


def launch_rows(kernel: Any, out_TD: Tensor, *arguments: Any) -> None:
    """One program for each row of `out_TD`, whose width is the last argument."""
    rows, width = out_TD.shape
    block = power_of_two(width)
    kernel[(rows,)](*arguments, width, BLOCK=block, num_warps=warps_for(block))


def empty_fp8(like: Tensor, width: int) -> Quantised:
    """Room for as many quantised rows as `like` has."""
    rows, device = len(like), like.device
    values = torch.empty(rows, width, dtype=FP8, device=device)
    return values, torch.empty(rows, 1, dtype=torch.float32, device=device)


def warps_for(values: int) -> int:
    """16 values a thread, within what leaves room for several programs on a multiprocessor."""
    return max(4, min(16, values // 512))
