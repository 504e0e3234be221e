"""The kernels of `rounded_keys.py` and `rounded_values.py` in Triton. Importing this fails without Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.triton_parts import larger, plus


@triton.jit(do_not_specialize=["tokens"])
def round_keys_kernel(  # type: ignore[no-untyped-def]
    k,
    k_token_stride,
    k_head_stride,
    low,
    high,
    query_reach,
    query_power,
    out,
    factors,
    tokens,
    heads,
    LEAST: tl.constexpr,
    MOST_POWER: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """See `RoundedKeys`: some tokens of one head.

    `low` and `high` are a channel's least and largest key, `query_reach` the largest magnitude of its queries
    and `query_power` the mean of their squares, all (heads, HEAD_DIM), as are `factors`; `out` is (tokens,
    heads, HEAD_DIM).
    """
    head, column = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    is_channel, place = column < HEAD_DIM, head * HEAD_DIM + column
    lowest = tl.load(low + place, mask=is_channel, other=0).to(tl.float32)
    highest = tl.load(high + place, mask=is_channel, other=0).to(tl.float32)
    middle = (lowest + highest) / 2
    reach = _bounded((highest - lowest) / 2, LEAST)
    ask = _bounded(tl.load(query_reach + place, mask=is_channel, other=0).to(tl.float32), LEAST)
    whole = tl.reduce(tl.where(is_channel, tl.sqrt(reach * ask), 0), 0, larger) / 127
    # what is no number stays none, which a maximum would lose
    factor = tl.sqrt(reach / ask) * whole + (middle - middle)
    if tl.program_id(0) == 0:
        power = tl.load(query_power + place, mask=is_channel, other=0)
        moved = tl.reduce(tl.where(is_channel, factor * factor * power, 0), 0, plus)
        tl.store(factors + place, tl.where(moved <= MOST_POWER, factor, float("nan")), mask=is_channel)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    is_key = (token < tokens) & is_channel[None, :]
    source = k + token.to(tl.int64) * k_token_stride + head * k_head_stride + column[None, :]
    keys = tl.load(source, mask=is_key, other=0).to(tl.float32)
    rounded = tl.floor((keys - middle[None, :]) / factor[None, :] + 0.5).to(tl.int8)
    tl.store(out + token.to(tl.int64) * heads * HEAD_DIM + place[None, :], rounded, mask=is_key)


@triton.jit(do_not_specialize=["tokens", "width"])
def round_values_kernel(  # type: ignore[no-untyped-def]
    v,
    v_token_stride,
    v_head_stride,
    spans,
    middles,
    out,
    tokens,
    width,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """See `RoundedValues`: some tokens of one head. `out` is (heads, HEAD_DIM, width)."""
    head, channel = tl.program_id(1).to(tl.int64), tl.arange(0, HEAD_DIM)
    place = tl.arange(0, TOKENS)
    within = place % 16
    of_place = place - within + within // 2 % 2 * 8 + within // 4 * 2 + within % 2
    token = (tl.program_id(0) * TOKENS + of_place)[:, None]
    source = v + token.to(tl.int64) * v_token_stride + head * v_head_stride + channel[None, :]
    values = tl.load(source, mask=token < tokens, other=0).to(tl.float32)
    span, middle = tl.load(spans + head * HEAD_DIM + channel), tl.load(middles + head * HEAD_DIM + channel)
    rounded = (values - middle[None, :]) / span[None, :]
    rounded = tl.where(token < tokens, tl.minimum(tl.maximum(rounded, -448.0), 448.0), 0.0)
    lines = out + (head * HEAD_DIM + channel).to(tl.int64) * width
    targets = lines[None, :] + (tl.program_id(0) * TOKENS + place)[:, None]
    tl.store(targets, rounded.to(out.dtype.element_ty))


@triton.jit
def _bounded(ranges, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """So that no channel is divided by nothing."""
    return tl.maximum(tl.maximum(ranges, LEAST * tl.reduce(ranges, 0, larger)), 1.0e-15)
