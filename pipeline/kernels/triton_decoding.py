"""Attention of a decode step in Triton. Importing this module fails without Triton.

The keys of a row are cut into splits, each a program's, so that few rows fill the device; what the splits
make is merged by their log-sum-exps, in float32 and to base 2. One program serves all query heads that share
keys, and of a document that several rows share all these rows: keys and values are read once for them.

Triton compiles a kernel anew for a number that divides by 16, or is 1, or is a constant of the kernel: what
changes from step to step is none of these, and is read from the device, so that a step can be captured.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.triton_parts import larger, plus

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


# the address of a layer's part of a table may divide by 16 or not
@triton.jit(
    do_not_specialize=[
        "first_part",
        "all_parts",
        "splits",
        "least",
        "starts",
        "used",
        "queries",
        "order",
        "lines",
    ]
)
def partial_attention_kernel(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_slot_stride,
    k_head_stride,
    v,
    v_slot_stride,
    v_head_stride,
    k_scales,
    v_scales,
    k_means,
    lines,
    starts,
    used,
    queries,
    order,
    parts,
    logs,
    first_part,
    all_parts,
    splits,
    least,
    kv_heads,
    head_dim,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """See `decoding.partial_attention`: a program takes one split of one range, for one key head.

    Range n is the slots from starts[n] on, used[n] many; the queries queries[n] .. queries[n + 1] attend to
    it. Without `order` these are places in `q`, and the last of them stands at the range's last slot; with it
    they are places in `order`, which names the queries, and each sees the whole range. A split has `least`
    slots, so that of a short range the later ones are empty. Range n finds its scales in line lines[n].
    """
    kv_head, split, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query = tl.load(queries + n)
    asked = tl.load(queries + n + 1) - first_query
    count = tl.load(used + n)
    chunk = (tl.maximum((count + splits - 1) // splits, least) + KEYS - 1) // KEYS * KEYS
    begin, end = split * chunk, tl.minimum(count, split * chunk + chunk)

    row = tl.arange(0, ROWS)
    nth = row // GROUP
    within = nth < asked
    if order is None:
        query = first_query + nth
        seen = count - asked + nth + 1  # of the range's slots
    else:
        query = tl.load(order + first_query + nth, mask=within, other=0)
        seen = tl.full([ROWS], 0, tl.int32) + count
    head = kv_head * GROUP + row % GROUP
    at = tl.arange(0, WIDTH)
    inside = at < head_dim
    place = query.to(tl.int64) * q_token_stride + head * q_head_stride
    asks = tl.load(q + place[:, None] + at[None, :], mask=within[:, None] & inside[None, :], other=0)

    lifted = tl.full([ROWS], 0.0, tl.float32)
    key_scale = scale
    if k_scales is not None:
        line = tl.load(lines + n).to(tl.int64) * kv_heads + kv_head
        key_scale = scale * tl.load(k_scales + line)
        mean = tl.load(k_means + line * head_dim + at, mask=inside, other=0)
        lifted = tl.reduce(asks.to(tl.float32) * mean[None, :], 1, plus) * scale
        asks = asks.to(tl.float16)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    mixed = tl.full([ROWS, WIDTH], 0.0, tl.float32)
    start = tl.load(starts + n).to(tl.int64)
    from_keys = k + start * k_slot_stride + kv_head * k_head_stride
    from_values = v + start * v_slot_stride + kv_head * v_head_stride
    for first in tl.range(begin, end, KEYS):
        slot = first + tl.arange(0, KEYS)
        there = (slot < end)[:, None] & inside[None, :]
        far = slot[:, None].to(tl.int64)  # of a million slots the strides reach beyond 32 bits
        keys = tl.load(from_keys + far * k_slot_stride + at[None, :], mask=there, other=0.0)
        values = tl.load(from_values + far * v_slot_stride + at[None, :], mask=there, other=0.0)
        if k_scales is not None:
            keys, values = keys.to(tl.float16), values.to(tl.float16)
        scores = tl.dot(asks, tl.trans(keys), input_precision="ieee") * key_scale
        visible = (slot[None, :] < seen[:, None]) & (slot < end)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(largest, tl.reduce(scores, 1, larger))
        lift = tl.where(highest == float("-inf"), 0.0, highest)  # of a query that sees nothing yet
        weights = tl.exp2(scores - lift[:, None])
        shrunk = tl.exp2(largest - lift)
        total = total * shrunk + tl.reduce(weights, 1, plus)
        mixed = mixed * shrunk[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
        largest = highest

    some = tl.where(total > 0, total, 1.0)
    log = tl.where(total > 0, largest + tl.log2(some) + lifted, float("-inf"))
    mixed = mixed / some[:, None]
    if v_scales is not None:
        mixed = mixed * tl.load(v_scales + tl.load(lines + n).to(tl.int64) * kv_heads + kv_head)
    heads = kv_heads * GROUP
    to = (query.to(tl.int64) * heads + head) * all_parts + first_part + split
    tl.store(logs + to, log, mask=within)
    made = (row < tl.where(begin < end, asked * GROUP, 0))[:, None] & inside[
        None, :
    ]  # of an empty split the logarithm says enough
    tl.store(parts + to[:, None] * head_dim + at[None, :], mixed, mask=made)


@triton.jit(do_not_specialize=["count"])
def merge_kernel(  # type: ignore[no-untyped-def]
    parts,
    logs,
    sinks,
    count,
    out,
    out_token_stride,
    out_head_stride,
    heads,
    head_dim,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """See `decoding.merged`: each program merges one head of one query."""
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, at = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    first = (query * heads + head) * count
    log = tl.load(logs + first + part, mask=part < count, other=float("-inf"))
    largest = tl.reduce(log, 0, larger)
    sink = tl.full([], float("-inf"), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2_E
        largest = tl.maximum(largest, sink)
    weights = tl.exp2(log - tl.where(largest == float("-inf"), 0.0, largest))
    inside = ((part < count) & (weights > 0))[:, None] & (at < head_dim)[None, :]
    mixed = tl.load(parts + (first + part)[:, None] * head_dim + at[None, :], mask=inside, other=0)
    total = tl.reduce(weights, 0, plus)  # 0 of a query without ranges
    if sinks is not None:
        total += tl.exp2(sink - largest)
    merged = tl.reduce(mixed * weights[:, None], 0, plus) / tl.where(total > 0, total, 1.0)
    place = out + query * out_token_stride + head * out_head_stride + at
    tl.store(place, merged.to(out.dtype.element_ty), mask=at < head_dim)
