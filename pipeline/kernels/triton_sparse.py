"""Kernels of `sparse.py` in Triton. Importing this module fails without Triton.

Tokens lie at `..._token_stride` from each other, heads at `..._head_stride`; a head's values are contiguous.
Triton compiles a kernel anew for a number that divides by 16, or is 1, or is a constant of the kernel: what
differs from document to document is none of these, so that each kernel is compiled once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.modules import power_of_two
from pipeline.kernels.triton_parts import larger, plus

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["capacity", "tokens", "rows"])
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
    capacity,
    tokens,
    rows,
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
    """See `sparse.block_sparse_attention`: each program attends with one block of queries of one head.

    The first `rows` blocks of queries are computed. `indices` are read if `LISTED`, see `BlockLists`.
    `scale` is that of the scores times log2(e), since the softmax is in base 2. Of a row's blocks only the
    last can be that of the queries themselves: the others need no mask. Keys come in tiles of `TILE`, a part
    of a block. If `DESCRIBED`, `q`, `k` and `v` are tensor descriptors of (tokens, heads * HEAD_DIM).
    """
    PARTS: tl.constexpr = BLOCK // TILE
    row, head, kv_head = _place(tl.program_id(0), rows, heads, kv_heads)
    first_query = row * BLOCK
    queries = _tile(
        q, first_query, head, q_token_stride, q_head_stride, tokens, BLOCK, HEAD_DIM, WIDTH, DESCRIBED, True
    )
    place = head.to(tl.int64) * ((tokens + BLOCK - 1) // BLOCK) + row
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
            block = tl.where(nth == 0, 0, row + 1 - count + nth)
        keys = _tile(
            k, first, kv_head, k_token_stride, k_head_stride, tokens, TILE, HEAD_DIM, WIDTH, DESCRIBED, False
        )
        values = _tile(
            v, first, kv_head, v_token_stride, v_head_stride, tokens, TILE, HEAD_DIM, WIDTH, DESCRIBED, False
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        largest, total, mixed = _attend(scores, values, largest, total, mixed, scale, PRECISION)
    query = first_query + tl.arange(0, BLOCK)
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
    inside = (first_query + at < tokens) & (column < HEAD_DIM)
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


@triton.jit(do_not_specialize=["rows", "capacity", "tokens"])
def antidiagonal_kernel(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    out,
    rows,
    capacity,
    tokens,
    group,
    scale,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See `sparse._log_masses`: each program does `TILE` strided queries by `TILE` strided keys of one head.

    `out` is (heads, rows, capacity), all of it written up to `capacity` blocks; tiles in the future get -inf.
    """
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE
    BLOCKS: tl.constexpr = TILE // PER_BLOCK
    first_row, first_column = tl.program_id(1) * TILE, tl.program_id(0) * TILE
    head = tl.program_id(2)
    row, column = first_row + tl.arange(0, TILE), first_column + tl.arange(0, TILE)
    masses = tl.full([TILE, BLOCKS], float("-inf"), tl.float32)
    if first_column <= first_row:
        at = tl.arange(0, WIDTH)[None, :]
        q_start = q + head.to(tl.int64) * q_head_stride
        k_start = k + (head // group).to(tl.int64) * k_head_stride
        scores = tl.full([TILE, TILE], 0.0, tl.float32)
        for step in tl.range(0, STRIDE):
            query, key = row * STRIDE + step, column * STRIDE + (STRIDE - 1 - step)
            queries = tl.load(
                q_start + query[:, None].to(tl.int64) * q_token_stride + at,
                mask=(query[:, None] < tokens) & (at < HEAD_DIM),
                other=0,
            )
            keys = tl.load(
                k_start + key[:, None].to(tl.int64) * k_token_stride + at,
                mask=(key[:, None] < tokens) & (at < HEAD_DIM),
                other=0,
            )
            scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        scores = tl.where(column[None, :] <= row[:, None], scores * scale, float("-inf"))
        scores = tl.reshape(scores, [TILE, BLOCKS, PER_BLOCK])
        largest = tl.reduce(scores, 2, larger)
        lifted = tl.where(largest == float("-inf"), 0.0, largest)  # of future blocks, whose sum is 0
        masses = (lifted + tl.log2(tl.reduce(tl.exp2(scores - lifted[:, :, None]), 2, plus))) * LN_2
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    places = out + (head.to(tl.int64) * rows + row[:, None]) * capacity + block[None, :]
    tl.store(places, masses, mask=(row[:, None] < rows) & (block[None, :] < capacity))


@triton.jit(do_not_specialize=["rows", "blocks"])
def choice_kernel(  # type: ignore[no-untyped-def]
    masses,
    rows,
    blocks,
    indices,
    counts,
    mass,
    PER_BLOCK: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """See `sparse.choose_blocks`: each program chooses for one block of queries of one head.

    `masses` is (heads, rows, blocks), the estimate of each strided query; `indices` (heads, blocks, blocks).
    A block is wanted if those with larger shares do not reach `mass`; the smallest share of which that is
    true is found by bisection, of the bits of positive floats, which are ordered as the floats are.
    """
    own, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = tl.arange(0, CAPACITY)
    row = own * PER_BLOCK + tl.arange(0, PER_BLOCK)
    within = (row[:, None] < rows) & (block[None, :] < blocks)
    places = masses + (head * rows + row[:, None]) * blocks + block[None, :]
    weights = tl.load(places, mask=within, other=float("-inf"))
    largest = tl.reduce(weights, 1, larger)
    lifted = tl.where(largest == float("-inf"), 0.0, largest)  # of rows behind the last
    weights = tl.exp(weights - lifted[:, None])
    totals = tl.reduce(weights, 1, plus)
    shares = tl.reduce(weights / tl.where(totals == 0, 1.0, totals)[:, None], 0, plus)
    shares = shares / tl.reduce(shares, 0, plus)

    low, high = tl.full([], -1, tl.int32), tl.full([], 0x3F800000, tl.int32)  # of 1.0, above which is nothing
    while high - low > 1:
        middle = (low + high) // 2
        above = tl.reduce(tl.where(shares > middle.to(tl.float32, bitcast=True), shares, 0.0), 0, plus)
        low, high = tl.where(above < mass, low, middle), tl.where(above < mass, middle, high)
    least = high.to(tl.float32, bitcast=True)
    above = tl.reduce(tl.where(shares > least, shares, 0.0), 0, plus)
    ties = (shares == least).to(tl.int32)
    reached = above + (tl.associative_scan(ties, 0, plus) - ties) * least
    wanted = (shares > least) | ((ties > 0) & (reached < mass))
    wanted = wanted | (block >= own - 1) | (block == 0) | (own >= blocks - WHOLE_ROWS)
    kept = (wanted & (block <= own)).to(tl.int32)
    count = tl.reduce(kept, 0, plus)
    listed = indices + (head * blocks + own) * blocks
    tl.store(listed + tl.associative_scan(kept, 0, plus) - kept, block, mask=kept > 0)
    tl.store(listed + block, blocks, mask=(block >= count) & (block < blocks))
    tl.store(counts + head * blocks + own, count)


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
        if x.stride(1) != head_dim or x.stride(0) * x.itemsize % 16 or x.data_ptr() % 16:
            return None
        described.append(TensorDescriptor(x, [tokens, heads * head_dim], [x.stride(0), 1], [rows, head_dim]))
    return described[0], described[1], described[2]
