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


@triton.jit(do_not_specialize=["lines"])
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
    k_scales,
    v_scales,
    k_means,
    lines,
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
    if k_scales is None:
        _store_turned(k_to, k_first, k_second, cosines, sines, half, inside)
    else:
        line = tl.load(lines + token).to(tl.int64) * kv_heads + kv_head
        mean = k_means + line * (2 * half) + at
        turned_first = k_first * cosines - k_second * sines - tl.load(mean, mask=inside, other=0)
        turned_second = k_second * cosines + k_first * sines - tl.load(mean + half, mask=inside, other=0)
        k_scale, v_scale = tl.load(k_scales + line), tl.load(v_scales + line)
        tl.store(k_to, _in_fp8(turned_first, k_scale, keys), mask=inside)
        tl.store(k_to + half, _in_fp8(turned_second, k_scale, keys), mask=inside)
        v_first, v_second = _in_fp8(v_first, v_scale, values), _in_fp8(v_second, v_scale, values)
    tl.store(v_to, v_first.to(values.dtype.element_ty), mask=inside)
    tl.store(v_to + half, v_second.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _in_fp8(values, scale, buffer):  # type: ignore[no-untyped-def]
    scaled = values / scale
    # a NaN is to stay one: maxima and minima would lose it
    scaled = tl.where(scaled > FP8_MAX, FP8_MAX, tl.where(scaled < -FP8_MAX, -FP8_MAX, scaled))
    return scaled.to(buffer.dtype.element_ty)


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


@triton.jit(do_not_specialize=["bounds", "starts", "lines"])
def put_prompts_kernel(  # type: ignore[no-untyped-def]
    k,
    k_token_stride,
    k_head_stride,
    v,
    v_token_stride,
    v_head_stride,
    bounds,
    keys,
    keys_slot_stride,
    keys_head_stride,
    values,
    values_slot_stride,
    values_head_stride,
    starts,
    k_scales,
    v_scales,
    k_means,
    lines,
    kv_heads,
    head_dim,
    headroom,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """See `kv_fp8.put_prompts`: a program takes the keys, or the values, of one head of one document."""
    document, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(bounds + document).to(tl.int64)
    count = tl.load(bounds + document + 1).to(tl.int64) - first
    start = tl.load(starts + document).to(tl.int64)
    line = tl.load(lines + document).to(tl.int64) * kv_heads + kv_head
    at = tl.arange(0, WIDTH)
    if tl.program_id(2) == 0:
        source = k + first * k_token_stride + kv_head * k_head_stride
        mean = tl.full([WIDTH], 0.0, tl.float32)
        for token in range(0, count, TOKENS):
            mean += tl.reduce(_tokens(source, k_token_stride, token, count, head_dim, TOKENS, WIDTH), 0, plus)
        mean = mean / count
        tl.store(k_means + line * head_dim + at, mean, mask=at < head_dim)
        target = keys + start * keys_slot_stride + kv_head * keys_head_stride
        scale = _put_centred(
            source, k_token_stride, target, keys_slot_stride, count, mean, head_dim, headroom, TOKENS, WIDTH
        )
        tl.store(k_scales + line, scale)
    else:
        source = v + first * v_token_stride + kv_head * v_head_stride
        target = values + start * values_slot_stride + kv_head * values_head_stride
        none = tl.full([WIDTH], 0.0, tl.float32)
        scale = _put_centred(
            source, v_token_stride, target, values_slot_stride, count, none, head_dim, headroom, TOKENS, WIDTH
        )
        tl.store(v_scales + line, scale)


@triton.jit
def _put_centred(  # type: ignore[no-untyped-def]
    source,
    stride,
    target,
    slot_stride,
    count,
    mean,
    head_dim,
    headroom,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Quantise tokens less their mean by one scale, which is returned; that of one token is its own size."""
    at, largest = tl.arange(0, WIDTH)[None, :], tl.full([WIDTH], 0, tl.int32)
    middle = tl.where(count > 1, mean, 0.0)
    for token in range(0, count, TOKENS):
        there = ((token + tl.arange(0, TOKENS)) < count)[:, None] & (at < head_dim)
        centred = _tokens(source, stride, token, count, head_dim, TOKENS, WIDTH) - middle[None, :]
        largest = tl.maximum(largest, tl.reduce(_magnitude(tl.where(there, centred, 0.0)), 0, larger))
    scale = _scale_of(tl.reduce(largest, 0, larger)) * headroom
    for token in range(0, count, TOKENS):
        slot = token + tl.arange(0, TOKENS)
        centred = _tokens(source, stride, token, count, head_dim, TOKENS, WIDTH) - mean[None, :]
        places = target + slot[:, None].to(tl.int64) * slot_stride + at
        tl.store(places, _in_fp8(centred, scale, target), mask=(slot < count)[:, None] & (at < head_dim))
    return scale


@triton.jit
def _tokens(  # type: ignore[no-untyped-def]
    source, stride, first, count, head_dim, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):
    """(TOKENS, WIDTH) float32, zeros beyond."""
    token, at = first + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    inside = (token < count)[:, None] & (at < head_dim)[None, :]
    places = source + token[:, None].to(tl.int64) * stride + at[None, :]
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)


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
