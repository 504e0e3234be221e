"""Block-sparse attention in Triton, where that for Hopper does not serve, or leaves some of it.

Importing this module fails without Triton. Tokens lie at `..._token_stride` from each other, heads at
`..._head_stride`; a head's values are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.devices import copied_by_tiles
from pipeline.kernels.modules import power_of_two
from pipeline.kernels.triton_parts import larger, plus

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["capacity", "tokens", "asked", "before", "rows", "all_rows"])
def attention_kernel(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    v,
    v_token_stride,
    v_head_stride,
    out,
    out_token_stride,
    out_head_stride,
    indices,
    counts,
    sinks,
    breached,
    capacity,
    tokens,
    asked,
    before,
    rows,
    all_rows,
    heads,
    kv_heads,
    scale,
    LISTED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See `block_attention`: a program attends with one block of queries of one head.

    `q` are `asked` queries of a document of `tokens`, from block `before` on; the first `rows` of their
    `all_rows` blocks are computed. `indices` are read if `LISTED`, see `BlockLists`.
    `scale` is that of the scores times log2(e), since the softmax is in base 2. Of a row's blocks only the
    last can be that of the queries themselves: the others need no mask. Keys come in tiles of `TILE`, a part
    of a block. If `DESCRIBED`, `q`, `k` and `v` are tensor descriptors of (tokens, heads * HEAD_DIM). With
    `breached`, see `hopper_attention.attend`, a program attends with such of every n-th block as it tells of.
    """
    of_queries, of_keys = (q, q_token_stride, q_head_stride), (k, k_token_stride, k_head_stride)
    of_values, of_out = (v, v_token_stride, v_head_stride), (out, out_token_stride, out_head_stride)
    lists, sizes = (indices, counts, capacity, before, all_rows), (tokens, asked, rows, heads, kv_heads)
    # fmt: off
    if breached is None:
        _attend_block(tl.program_id(0), of_queries, of_keys, of_values, of_out, lists, sizes, sinks, scale,
                      LISTED, HEAD_DIM, WIDTH, BLOCK, TILE, DESCRIBED, PRECISION)
    else:
        for program in tl.range(tl.program_id(0), rows * heads, tl.num_programs(0), num_stages=1):
            row, head, _ = _place(program, rows, heads, kv_heads)
            halves = breached + 2 * (head.to(tl.int64) * all_rows + row)
            if tl.load(halves) + tl.load(halves + 1) > 0:
                _attend_block(program, of_queries, of_keys, of_values, of_out, lists, sizes, sinks, scale,
                              LISTED, HEAD_DIM, WIDTH, BLOCK, TILE, DESCRIBED, PRECISION)
    # fmt: on


@triton.jit
def _attend_block(  # type: ignore[no-untyped-def]
    program,
    of_queries,
    of_keys,
    of_values,
    of_out,
    lists,
    sizes,
    sinks,
    scale,
    LISTED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with the block of queries that stands at place `program` of all."""
    q, q_token_stride, q_head_stride = of_queries
    k, k_token_stride, k_head_stride = of_keys
    v, v_token_stride, v_head_stride = of_values
    out, out_token_stride, out_head_stride = of_out
    indices, counts, capacity, before, all_rows = lists
    tokens, asked, rows, heads, kv_heads = sizes
    PARTS: tl.constexpr = BLOCK // TILE
    row, head, kv_head = _place(program, rows, heads, kv_heads)
    place = head.to(tl.int64) * all_rows + row
    own, first_query = before + row, row * BLOCK
    queries = _tile(
        q, first_query, head, q_token_stride, q_head_stride, asked, BLOCK, HEAD_DIM, WIDTH, DESCRIBED, True
    )
    listed = indices + place * capacity
    count = tl.load(counts + place)
    unmasked = (count - 1) * PARTS

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.full([BLOCK], 0.0, tl.float32)
    mixed = tl.full([BLOCK, WIDTH], 0.0, tl.float32)
    block = tl.load(listed) if LISTED else tl.full([], 0, tl.int32)
    for i in tl.range(0, unmasked):
        first = block * BLOCK + i % PARTS * TILE
        nth = (i + 1) // PARTS
        if LISTED:
            block = tl.load(listed + nth)  # an iteration early, so that no tile waits for its place
        else:
            block = tl.where(nth == 0, 0, own + 1 - count + nth)
        keys = _tile(
            k, first, kv_head, k_token_stride, k_head_stride, tokens, TILE, HEAD_DIM, WIDTH, DESCRIBED, False
        )
        values = _tile(
            v, first, kv_head, v_token_stride, v_head_stride, tokens, TILE, HEAD_DIM, WIDTH, DESCRIBED, False
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        largest, total, mixed = _attend(scores, values, largest, total, mixed, scale, PRECISION)
    query = own * BLOCK + tl.arange(0, BLOCK)
    for part in tl.range(0, PARTS):
        first = block * BLOCK + part * TILE
        keys = _tile(
            k, first, kv_head, k_token_stride, k_head_stride, tokens, TILE, HEAD_DIM, WIDTH, DESCRIBED, True
        )
        values = _tile(
            v, first, kv_head, v_token_stride, v_head_stride, tokens, TILE, HEAD_DIM, WIDTH, DESCRIBED, True
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        key = first + tl.arange(0, TILE)
        scores = tl.where(key[None, :] <= query[:, None], scores, float("-inf"))
        largest, total, mixed = _attend(scores, values, largest, total, mixed, scale, PRECISION)

    at, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    start = out + first_query.to(tl.int64) * out_token_stride + head.to(tl.int64) * out_head_stride
    inside = (first_query + at < asked) & (column < HEAD_DIM)
    if sinks is not None:
        total += tl.exp2(tl.load(sinks + head) * LOG2_E - largest)
    mixed = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(start + at * out_token_stride + column, mixed, mask=inside)


@triton.jit
def _place(program, rows, heads, kv_heads):  # type: ignore[no-untyped-def]
    """Which row of blocks, head and key/value head a program takes.

    One key/value head comes after the other, so that its keys and values stay in the L2 cache; the later,
    longer rows of each first, and beside each other the heads that share keys.
    """
    group = heads // kv_heads
    within = program % (rows * group)
    row = rows - 1 - within // group
    head = program // (rows * group) * group + within % group
    return row, head, head // group


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    source,
    first,
    head,
    token_stride,
    head_stride,
    tokens,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """`ROWS` tokens of one head from token `first` on; zeros beyond the last token, if it is `RAGGED`."""
    if DESCRIBED:
        tile = source.load([first, head * HEAD_DIM])
    else:
        at, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
        start = source + first.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
        places = start + at * token_stride + column
        if RAGGED:
            tile = tl.load(places, mask=(first + at < tokens) & (column < HEAD_DIM), other=0)
        elif HEAD_DIM != WIDTH:
            tile = tl.load(places, mask=column < HEAD_DIM, other=0)
        else:
            tile = tl.load(places)
    return tile


@triton.jit
def _attend(scores, values, largest, total, mixed, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of the online softmax: the new maxima, sums and mixed values of each query."""
    raised = tl.maximum(largest, tl.reduce(scores, 1, larger) * scale)
    weights = tl.exp2(scores * scale - raised[:, None])
    shrunk = tl.exp2(largest - raised)
    total = total * shrunk + tl.reduce(weights, 1, plus)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrunk[:, None], input_precision=PRECISION)
    return raised, total, mixed


def described(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, block: int, tile: int
) -> tuple[Any, Any, Any] | None:
    """Tensor descriptors, which Hopper's copy engine loads tiles by; None where it cannot."""
    head_dim = q_THd.shape[2]
    if head_dim != power_of_two(head_dim, 16) or torch.cuda.get_device_capability(q_THd.device) < (9, 0):
        return None
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        return None
    described = []
    for x, rows in ((q_THd, block), (k_TKd, tile), (v_TKd, tile)):
        tokens, heads, _ = x.shape
        if not copied_by_tiles(x):
            return None
        described.append(TensorDescriptor(x, [tokens, heads * head_dim], [x.stride(0), 1], [rows, head_dim]))
    return described[0], described[1], described[2]
