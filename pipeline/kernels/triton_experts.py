"""Kernels of `expert_products.py` in Triton. Importing this module fails without Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamped_swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up,
    stride,
    bias,
    bias_stride,
    experts,
    out,
    width,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `expert_products.clamped_swiglu`: each program does a piece of one row, pair by pair."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    pair = 2 * first + tl.arange(0, 2 * BLOCK)
    inside = pair < 2 * width
    expert = tl.load(experts + row).to(tl.int64)
    values = tl.load(gate_up + row * stride + pair, mask=inside, other=0).to(tl.float32)
    values += tl.load(bias + expert * bias_stride + pair, mask=inside, other=0).to(tl.float32)
    gate, up = tl.split(tl.reshape(values, [BLOCK, 2]))
    gate = tl.minimum(gate, LIMIT)
    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    made = gate / (1 + tl.exp(-ALPHA * gate)) * (up + 1)
    at = first + tl.arange(0, BLOCK)
    tl.store(out + row * width + at, made.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def weighted_sum_kernel(  # type: ignore[no-untyped-def]
    made,
    stride,
    places,
    weights,
    out,
    width,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `expert_products.Groups.weighted_sum`: each program does a piece of one token, in float32."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for n in tl.static_range(CHOSEN):
        place = tl.load(places + token * CHOSEN + n)
        weight = tl.load(weights + token * CHOSEN + n).to(tl.float32)
        total += weight * tl.load(made + place * stride + at, mask=at < width, other=0).to(tl.float32)
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), mask=at < width)
