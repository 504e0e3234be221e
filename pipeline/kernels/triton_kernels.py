"""Kernels in Triton, each the fast version of a function beside it that needs only torch.

Imported only where Triton is: importing this module fails without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.triton_parts import larger, plus


@triton.jit(do_not_specialize=["copies", "count"])
def fetch_blocks_kernel(pairs, slots, blocks, copies, count, words, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """See `swap.BlockCopies.fetch`: each program takes every n-th piece of all blocks of all copies.

    `pairs` holds the addresses of each copy's target and source.
    """
    pieces = (words + WORDS - 1) // WORDS
    for i in range(tl.program_id(0), copies * count * pieces, tl.num_programs(0)):
        pair = pairs + i // (count * pieces) * 2
        target = tl.load(pair).to(tl.pointer_type(tl.int64))
        source = tl.load(pair + 1).to(tl.pointer_type(tl.int64))
        place = i // pieces % count
        at = (i % pieces) * WORDS + tl.arange(0, WORDS)
        inside = at < words
        moved = tl.load(source + tl.load(blocks + place) * words + at, mask=inside)
        tl.store(target + tl.load(slots + place) * words + at, moved, mask=inside)


FP8_MAX: tl.constexpr = tl.constexpr(448.0)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def rope_kernel(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    heads,
    k,
    k_token_stride,
    k_head_stride,
    kv_heads,
    cos,
    cos_stride,
    sin,
    sin_stride,
    half,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """See `fused.rope_`: each program turns all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, HALF)
    cosines = tl.load(cos + token * cos_stride + at, mask=at < half).to(tl.float32)
    sines = tl.load(sin + token * sin_stride + at, mask=at < half).to(tl.float32)
    _rotate(q + token * q_token_stride, q_head_stride, heads, cosines, sines, half, HEADS, HALF)
    _rotate(k + token * k_token_stride, k_head_stride, kv_heads, cosines, sines, half, KV_HEADS, HALF)


@triton.jit
def _rotate(start, head_stride, heads, cosines, sines, half, HEADS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    firsts = start + head * head_stride + at
    seconds = firsts + half
    first = tl.load(firsts, mask=inside).to(tl.float32)
    second = tl.load(seconds, mask=inside).to(tl.float32)
    cosines, sines = cosines[None, :], sines[None, :]
    tl.debug_barrier()  # where several threads hold the same value, all are to read before one writes
    _store_turned(firsts, first, second, cosines, sines, half, inside)


@triton.jit
def rope_and_store_kernel(  # type: ignore[no-untyped-def]
    qkv,
    stride,
    row_scales,
    column_scales,
    bias,
    cos,
    cos_stride,
    sin,
    sin_stride,
    keys,
    keys_slot_stride,
    keys_head_stride,
    values,
    values_slot_stride,
    values_head_stride,
    places,
    group,
    half,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
):
    """See `step.rope_and_store_`: each program does one key head of a token, its values and its queries."""
    token, kv_head, kv_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    head, at = tl.arange(0, GROUP)[:, None], tl.arange(0, HALF)[None, :]
    inside, within = at < half, (head < group) & (at < half)
    of_queries = (kv_head * group + head) * (2 * half) + at
    of_keys = (kv_heads * group + kv_head) * (2 * half) + at
    of_values = of_keys + kv_heads * (2 * half)

    # all is read before anything is written: so reads wait together, and where several threads hold the same
    # query, none of them reads what another has turned
    place = tl.load(places + token)
    cosines = tl.load(cos + token * cos_stride + at, mask=inside).to(tl.float32)
    sines = tl.load(sin + token * sin_stride + at, mask=inside).to(tl.float32)
    q_first = _completed(qkv, stride, row_scales, column_scales, bias, token, of_queries, within)
    q_second = _completed(qkv, stride, row_scales, column_scales, bias, token, of_queries + half, within)
    k_first = _completed(qkv, stride, row_scales, column_scales, bias, token, of_keys, inside)
    k_second = _completed(qkv, stride, row_scales, column_scales, bias, token, of_keys + half, inside)
    v_first = _completed(qkv, stride, row_scales, column_scales, bias, token, of_values, inside)
    v_second = _completed(qkv, stride, row_scales, column_scales, bias, token, of_values + half, inside)
    tl.debug_barrier()

    q_to = qkv + token * stride + of_queries
    k_to = keys + place * keys_slot_stride + kv_head * keys_head_stride + at
    v_to = values + place * values_slot_stride + kv_head * values_head_stride + at
    _store_turned(q_to, q_first, q_second, cosines, sines, half, within)
    _store_turned(k_to, k_first, k_second, cosines, sines, half, inside)
    tl.store(v_to, v_first.to(values.dtype.element_ty), mask=inside)
    tl.store(v_to + half, v_second.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _store_turned(firsts, first, second, cosines, sines, half, inside):  # type: ignore[no-untyped-def]
    dtype: tl.constexpr = firsts.dtype.element_ty
    tl.store(firsts, (first * cosines - second * sines).to(dtype), mask=inside)
    tl.store(firsts + half, (second * cosines + first * sines).to(dtype), mask=inside)


@triton.jit
def _completed(product, stride, row_scales, column_scales, bias, row, columns, inside):  # type: ignore[no-untyped-def]
    """Values of a row of `step.Product` in float32, zeros where not `inside`; what it lacks is None."""
    values = tl.load(product + row * stride + columns, mask=inside, other=0).to(tl.float32)
    if row_scales is not None:
        scales = tl.load(row_scales + row) * tl.load(column_scales + columns, mask=inside, other=0)
        values = values * scales
    if bias is not None:
        values = values + tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    return values


@triton.jit
def silu_mul_kernel(gate_up, stride, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """See `fused.silu_mul`: each program does a piece of one row."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gated = _gated(gate_up, stride, None, None, None, row, at, width)
    tl.store(out + row * width + at, gated, mask=at < width)


@triton.jit
def silu_mul_quantized_kernel(  # type: ignore[no-untyped-def]
    gate_up,
    stride,
    row_scales,
    column_scales,
    bias,
    out,
    scales,
    width,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
):
    """See `fused.silu_mul_quantized`: a program keeps a row in registers, in two parts to pad little.

    Of `step.product_silu_mul_quantized`, `gate_up` lacks its scales, and may lack a bias.
    """
    row = tl.program_id(0).to(tl.int64)
    first_at, rest_at = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    first = _gated(gate_up, stride, row_scales, column_scales, bias, row, first_at, width).to(tl.float32)
    rest = _gated(gate_up, stride, row_scales, column_scales, bias, row, rest_at, width).to(tl.float32)
    largest = tl.maximum(tl.reduce(_magnitude(first), 0, larger), tl.reduce(_magnitude(rest), 0, larger))
    scale = _scale_of(largest)
    tl.store(scales + row, scale)
    inverse = tl.div_rn(1.0, scale)
    tl.store(out + row * width + first_at, (first * inverse).to(out.dtype.element_ty), mask=first_at < width)
    tl.store(out + row * width + rest_at, (rest * inverse).to(out.dtype.element_ty), mask=rest_at < width)


@triton.jit
def _gated(gate_up, stride, row_scales, column_scales, bias, row, at, width):  # type: ignore[no-untyped-def]
    inside = at < width
    gate = _completed(gate_up, stride, row_scales, column_scales, bias, row, at, inside)
    up = _completed(gate_up, stride, row_scales, column_scales, bias, row, width + at, inside)
    return (gate / (1 + tl.exp(-gate)) * up).to(gate_up.dtype.element_ty)


@triton.jit
def quantize_rows_kernel(x, stride, out, scales, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """See `fused.quantize_rows`."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    _store_row(out, scales, row, at, tl.load(x + row * stride + at, mask=at < width, other=0), width)


@triton.jit
def rms_norm_kernel(x, stride, weight, eps, out, scales, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """See `fused.rms_norm_quantized`."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * stride + at, mask=inside, other=0)
    weights = tl.load(weight + at, mask=inside, other=0)
    _store_normed(out, scales, row, at, values, weights, eps, width)


@triton.jit
def add_kernel(  # type: ignore[no-untyped-def]
    total,
    total_stride,
    product,
    stride,
    row_scales,
    column_scales,
    bias,
    weight,
    eps,
    out,
    scales,
    width,
    BLOCK: tl.constexpr,
):
    """See `step.add_product_`, and `step.add_product_normed_`, which alone has a `weight`."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    added = _completed(product, stride, row_scales, column_scales, bias, row, at, inside)
    before = tl.load(total + row * total_stride + at, mask=inside, other=0).to(tl.float32)
    if weight is not None:
        weights = tl.load(weight + at, mask=inside, other=0)
    after = (before + added).to(total.dtype.element_ty)
    tl.debug_barrier()  # where several threads hold the same value, all are to read before one writes
    tl.store(total + row * total_stride + at, after, mask=inside)
    if weight is not None:
        _store_normed(out, scales, row, at, after, weights, eps, width)


@triton.jit
def _store_normed(out, scales, row, at, x, weights, eps, width):  # type: ignore[no-untyped-def]
    """RMSNorm of a row `x`, rounded to its type, then quantised; beyond `width` it must be zero."""
    values = x.to(tl.float32)
    mean = tl.reduce(values * values, 0, plus) / width
    scaled = values * tl.rsqrt(mean + eps) * weights.to(tl.float32)
    _store_row(out, scales, row, at, scaled.to(x.dtype), width)


@triton.jit
def _store_row(out, scales, row, at, values, width):  # type: ignore[no-untyped-def]
    """One row of contiguous `out`, divided by its own scale, which is stored too.

    Every step is rounded as IEEE says, so that the bytes equal those of plain torch.
    """
    values = values.to(tl.float32)
    scale = _scale_of(tl.reduce(_magnitude(values), 0, larger))
    tl.store(scales + row, scale)
    values = values * tl.div_rn(1.0, scale)
    tl.store(out + row * width + at, values.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _magnitude(values):  # type: ignore[no-untyped-def]
    """As integers magnitudes keep their order and NaN is above infinity; a float maximum would drop it."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(magnitude):  # type: ignore[no-untyped-def]
    scale = tl.div_rn(magnitude.to(tl.float32, bitcast=True), FP8_MAX)
    return tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)
