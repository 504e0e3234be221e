"""Kernels of `sparse.py` in Triton. Importing this module fails without Triton.

Tokens lie at `..._token_stride` from each other, heads at `..._head_stride`; a head's values are contiguous.
Triton compiles a kernel anew for a number that divides by 16, or is 1, or is a constant of the kernel: what
differs from document to document is none of these, so that each kernel is compiled once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.triton_parts import larger, plus

ONE: tl.constexpr = tl.constexpr(0x3F800000)  # the bits of 1.0 as a float32, above which no share is


@triton.jit(do_not_specialize=["blocks", "tokens"])
def mean_keys_kernel(  # type: ignore[no-untyped-def]
    k,
    k_token_stride,
    k_head_stride,
    means,
    blocks,
    tokens,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one head the mean of a block's keys, however many; `means` is (kv_heads, blocks, HEAD_DIM)."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key, column = block * BLOCK + tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)
    places = k + key.to(tl.int64) * k_token_stride + head * k_head_stride + column[None, :]
    keys = tl.load(places, mask=(key < tokens) & (column[None, :] < HEAD_DIM), other=0).to(tl.float32)
    mean = tl.reduce(keys, 0, plus) / tl.minimum(tokens - block * BLOCK, BLOCK)
    tl.store(means + (head * blocks + block) * HEAD_DIM + column, mean, mask=column < HEAD_DIM)


@triton.jit(do_not_specialize=["rows", "blocks", "before", "first", "tokens"])
def estimate_kernel(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    means,
    out,
    rows,
    blocks,
    before,
    first,
    tokens,
    group,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See `sparse._plain_shares`: each program does one block of queries of one head, the first of each STEP.

    Those from block `first` of `q` on, which begins with the document's block `before`.
    `means` is (kv_heads, blocks, HEAD_DIM), `out` (heads, rows, blocks), in which nothing is written for
    blocks in the future. `scale` is that of the scores times log2(e). The first pass finds each query's sum.
    The second adds up its strides' shares of it by a product, with queries as columns: so the first product's
    result is the other's left factor as it lies in registers.
    """
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE
    asked, head = first + tl.program_id(0), tl.program_id(1).to(tl.int64)
    QUERIES: tl.constexpr = BLOCK // STEP
    own, within = before + asked, STEP * tl.arange(0, QUERIES)[:, None]
    query, at = own * BLOCK + within, tl.arange(0, WIDTH)[None, :]
    places = q + (asked * BLOCK + within).to(tl.int64) * q_token_stride + head * q_head_stride + at
    queries = tl.load(places, mask=(query < tokens) & (at < HEAD_DIM), other=0)
    start = means + head // group * blocks * HEAD_DIM
    largest, total = tl.full([QUERIES], float("-inf"), tl.float32), tl.full([QUERIES], 0.0, tl.float32)
    for column in tl.range(0, own + 1, COLUMNS):
        keys = _means(start, column, own, HEAD_DIM, WIDTH, COLUMNS)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(column + tl.arange(0, COLUMNS)[None, :] <= own, scores, float("-inf"))
        raised = tl.maximum(largest, tl.reduce(scores, 1, larger))
        total = total * tl.exp2(largest - raised) + tl.reduce(tl.exp2(scores - raised[:, None]), 1, plus)
        largest = raised
    place = STEP * tl.arange(0, QUERIES)
    level = tl.where(own * BLOCK + place < tokens, largest + tl.log2(total), float("inf"))
    row = tl.arange(0, 2 * PER_BLOCK)  # a product has 16 columns or more: the second half is of no stride
    EXACT: tl.constexpr = tl.float32 if queries.dtype == tl.float32 else tl.float16
    belongs = (place[:, None] // STRIDE == row[None, :]).to(EXACT)
    of_row = tl.minimum(
        STRIDE // STEP, tl.maximum(1, (tokens - own * BLOCK - row * STRIDE + STEP - 1) // STEP)
    )
    turned = tl.trans(queries)
    for column in tl.range(0, own + 1, COLUMNS):
        keys = _means(start, column, own, HEAD_DIM, WIDTH, COLUMNS)
        scores = tl.dot(keys, turned, input_precision=PRECISION) * scale
        shares = tl.exp2(scores - level[None, :]).to(EXACT)
        shares = tl.dot(shares, belongs, input_precision=PRECISION) / of_row[None, :]
        block = column + tl.arange(0, COLUMNS)[:, None]
        targets = out + (head * rows + tl.program_id(0) * PER_BLOCK + row[None, :]) * blocks + block
        shares = shares.to(out.dtype.element_ty)
        tl.store(targets, shares, mask=(block <= own) & (row[None, :] < PER_BLOCK))


@triton.jit
def _means(  # type: ignore[no-untyped-def]
    means, column, own, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """(COLUMNS, WIDTH) of blocks from `column` on; zeros for those behind block `own`."""
    block, at = column + tl.arange(0, COLUMNS)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(means + block * HEAD_DIM + at, mask=(block <= own) & (at < HEAD_DIM), other=0)


@triton.jit(do_not_specialize=["rows", "blocks", "before", "first", "all_rows", "tokens"])
def choice_kernel(  # type: ignore[no-untyped-def]
    masses,
    rows,
    blocks,
    before,
    first,
    all_rows,
    tokens,
    indices,
    counts,
    mass,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    CAPACITY: tl.constexpr,
    STRIDES: tl.constexpr,
):
    """See `sparse.choose_blocks`: each program chooses for one block of queries of one head.

    `masses` is (heads, rows, blocks), as `estimate_kernel` makes it; `indices` (heads, all_rows, blocks). A
    stride of queries wants a block if those with larger shares do not reach `mass`; the smallest share of
    which that is true is found by bisection, of the bits of positive floats, which are ordered as they are.
    Of shares in bfloat16 half of the bits are looked for. So many `STRIDES` as registers hold are looked at
    together.
    """
    BITS: tl.constexpr = masses.dtype.element_ty.primitive_bitwidth
    REST: tl.constexpr = 32 - BITS  # of a float32, which are 0
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE
    asked, head = first + tl.program_id(0), tl.program_id(1).to(tl.int64)
    own, block = before + asked, tl.arange(0, CAPACITY)
    found = tl.full([CAPACITY], 0, tl.int32)
    for part in tl.range(0, PER_BLOCK, STRIDES):
        row = part + tl.arange(0, STRIDES)
        there = own * BLOCK + row[:, None] * STRIDE < tokens
        line = head * rows + tl.program_id(0) * PER_BLOCK + row[:, None]
        places = masses + line * blocks + block[None, :]
        shares = tl.load(places, mask=there & (block[None, :] <= own), other=0.0).to(tl.float32)
        low, high = tl.full([STRIDES], -1, tl.int32), tl.full([STRIDES], ONE >> REST, tl.int32)
        for _ in tl.range(0, BITS - 2):
            middle = (low + high + 1) // 2
            larger_ones = shares > (middle << REST).to(tl.float32, bitcast=True)[:, None]
            reached = tl.reduce(tl.where(larger_ones, shares, 0.0), 1, plus) >= mass
            low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
        wanted = (shares >= (high << REST).to(tl.float32, bitcast=True)[:, None]) & there
        found = tl.maximum(found, tl.reduce(wanted.to(tl.int32), 0, larger))
    wanted = found > 0
    wanted = wanted | (block >= own - 1) | (block == 0) | (own >= blocks - WHOLE_ROWS)
    kept = (wanted & (block <= own)).to(tl.int32)
    count = tl.reduce(kept, 0, plus)
    listed = indices + (head * all_rows + asked) * blocks
    tl.store(listed + tl.associative_scan(kept, 0, plus) - kept, block, mask=kept > 0)
    tl.store(listed + block, blocks, mask=(block >= count) & (block < blocks))
    tl.store(counts + head * all_rows + asked, count)


@triton.jit(do_not_specialize=["chunks", "rows"])
def descent_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    k_token_stride,
    k_head_stride,
    starts,
    stops,
    out,
    chunks,
    rows,
    group,
    QUERIES: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See `sparse.best_products`: each program goes down `TILE` chunks for one block of queries of one head.

    `q` is (heads, rows, QUERIES, HEAD_DIM), `starts` and `out` (heads, rows, chunks), `stops` (rows,).
    """
    row, head = tl.program_id(1), tl.program_id(2)
    place = head.to(tl.int64) * rows + row
    chunk = tl.program_id(0) * TILE + tl.arange(0, TILE)
    stop = tl.load(stops + row)
    low = tl.load(starts + place * chunks + chunk, mask=chunk < chunks, other=2147483647 - CHUNK)
    inside, high = low < stop, tl.minimum(low + CHUNK, stop)
    column = tl.arange(0, WIDTH)[None, :]
    query = place * QUERIES + tl.arange(0, QUERIES)[:, None]
    queries = tl.load(q + query * HEAD_DIM + column, mask=column < HEAD_DIM, other=0)
    own = k + (head // group).to(tl.int64) * k_head_stride + column
    seen = inside[:, None] & (column < HEAD_DIM)
    best = tl.full([TILE], float("-inf"), tl.float32)
    for _ in tl.range(0, STEPS):
        middle = (low + high) // 2
        left = _best(queries, own, (low + middle) // 2, k_token_stride, seen, PRECISION)
        right = _best(queries, own, (middle + high) // 2, k_token_stride, seen, PRECISION)
        best = tl.maximum(best, tl.maximum(left, right))
        high = tl.where(right > left, high, tl.maximum(middle, low + 1))
        low = tl.where(right > left, middle, low)
    tl.store(out + place * chunks + chunk, tl.where(inside, best, float("-inf")), mask=chunk < chunks)


@triton.jit
def _best(queries, k, token, token_stride, seen, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the key of each token the largest product with any of the queries."""
    keys = tl.load(k + token.to(tl.int64)[:, None] * token_stride, mask=seen, other=0)
    return tl.reduce(tl.dot(keys, tl.trans(queries), input_precision=PRECISION), 1, larger)
