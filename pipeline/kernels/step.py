"""What a decode step does between its matrix products: few rows, so that each launch counts.

As in fused.py every function has two paths, plain torch and a kernel of `triton_kernels`, and tensors need a
contiguous last dimension alone. What is said there of widths and quantised rows holds here.

Shape letters beside those of segments.py: B rows, a token each, N outputs of a product, S slots of a buffer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.fused import (
    Quantised,
    empty_fp8,
    launch_rows,
    launch_silu_mul,
    quantize_rows,
    rms_norm_quantized,
    rope_,
    silu_mul,
    warps_for,
)
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.kernels.modules import kernels_for, power_of_two


class Product(NamedTuple):
    """A matrix product (B, N), and what it still lacks: a scale for each row and output, and a bias.

    Torch multiplies few rows of float8 faster if it need not apply such scales, and the kernel that reads
    the product next does so, in float32, at next to no cost. A product that lacks nothing is `raw_BN` alone.
    """

    raw_BN: Tensor
    row_scale_B1: Tensor | None = None
    scale_1N: Tensor | None = None  # there if the other one is
    bias_N: Tensor | None = None

    def completed(self) -> Tensor:
        """(B, N) float32, a tensor of its own."""
        values_BN = self.raw_BN.to(torch.float32, copy=True)
        if self.row_scale_B1 is not None and self.scale_1N is not None:
            values_BN *= self.row_scale_B1 * self.scale_1N
        return values_BN if self.bias_N is None else values_BN.add_(self.bias_N)

    def arguments(self) -> tuple[Any, ...]:
        """Of a kernel."""
        return self.raw_BN, self.raw_BN.stride(0), self.row_scale_B1, self.scale_1N, self.bias_N


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels run on this tensor; elsewhere the functions here are slower than separate steps."""
    return _kernels(x) is not None


def rope_and_store_(
    qkv: Product,
    cos_Bd: Tensor,
    sin_Bd: Tensor,
    target: KvTarget,
) -> Tensor:
    """Turn queries and keys as `rope_`, store keys and values at the `target`; (B, H, d) queries.

    `qkv` holds queries first, then keys, then values. What is returned overwrites the first of its columns.
    """
    keys_SKd, values_SKd, places_B, scales, lines_B = target
    kv_heads, head_dim = keys_SKd.shape[1:]
    heads_BNd = qkv.raw_BN.unflatten(1, (-1, head_dim))
    heads = heads_BNd.shape[1] - 2 * kv_heads
    q_BHd = heads_BNd[:, :heads]
    kernels = _kernels(qkv.raw_BN)
    if kernels is None:
        values_BNd = qkv.completed().unflatten(1, (-1, head_dim))
        turned_BHd, k_BKd, v_BKd = values_BNd.split((heads, kv_heads, kv_heads), dim=1)
        rope_(turned_BHd, k_BKd, cos_Bd, sin_Bd)
        q_BHd.copy_(turned_BHd)
        target.put(k_BKd, v_BKd)
        return q_BHd
    group, half = heads // kv_heads, head_dim // 2
    blocks = {"GROUP": power_of_two(group), "HALF": power_of_two(half)}
    kernels.rope_and_store_kernel[(len(q_BHd), kv_heads)](
        *qkv.arguments(),
        *(cos_Bd, cos_Bd.stride(0), sin_Bd, sin_Bd.stride(0)),
        *(keys_SKd, *keys_SKd.stride()[:2], values_SKd, *values_SKd.stride()[:2], places_B),
        *((None,) * 3 if scales is None else (scales.keys_LK, scales.values_LK, scales.means_LKd)),
        *(lines_B, group, half),
        **blocks,
        num_warps=warps_for(2 * blocks["GROUP"] * blocks["HALF"]),
    )
    return q_BHd


def add_product_(total_BD: Tensor, added: Product) -> None:
    """Add in float32, rounded once."""
    kernels = _kernels(total_BD)
    if kernels is None:
        total_BD.copy_(total_BD.float() + added.completed())
        return
    _launch_add(kernels, total_BD, added, None, None, None, None)


def add_product_normed_(
    total_BD: Tensor, added: Product, weight_D: Tensor, eps: float, out: Quantised | None = None
) -> Quantised:
    """`add_product_`, then `rms_norm_quantized` of the sum; written to `out`, contiguous, if there is one."""
    out_BD, scale_B1 = empty_fp8(total_BD, total_BD.shape[1]) if out is None else out
    kernels = _kernels(total_BD)
    if kernels is None:
        add_product_(total_BD, added)
        for to, made in zip((out_BD, scale_B1), rms_norm_quantized(total_BD, weight_D, eps), strict=True):
            to.copy_(made)
    else:
        _launch_add(kernels, total_BD, added, weight_D, eps, out_BD, scale_B1)
    return out_BD, scale_B1


def product_silu_mul_quantized(gate_up: Product) -> Quantised:
    """`silu_mul_quantized` of the completed product, of which only what it gates is rounded."""
    kernels = _kernels(gate_up.raw_BN)
    if kernels is None:
        return quantize_rows(silu_mul(gate_up.completed()).to(gate_up.raw_BN.dtype))
    return launch_silu_mul(kernels, *gate_up)


def _kernels(x: Tensor) -> Any | None:
    """The module of Triton kernels where they can run on this tensor, else None."""
    return kernels_for(x, "triton_kernels")


def _launch_add(kernels: Any, total_BD: Tensor, added: Product, *normed: Any) -> None:
    """`normed` are the kernel's arguments of the norm, all None for none."""
    total = total_BD, total_BD.stride(0)
    launch_rows(kernels.add_kernel, total_BD, *total, *added.arguments(), *normed)
