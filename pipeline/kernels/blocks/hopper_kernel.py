"""The kernel of `hopper_attention.py`, by warps that specialise. Importing this module fails without Gluon.

One warp copies tiles of keys and values into shared memory, two groups of four attend with half a block of
queries each, as in FlashAttention-3 (arXiv 2407.08608): while a tile's values are multiplied, the next tile's
weights are made. What makes them cheap is a softmax that refers to a maximum that stays as it is, as in
FlashDecoding++ (arXiv 2311.01282): that of the queries' own block and the first, where the largest scores
are. Should other scores exceed it by so much that sums might overflow, this is told, and whoever asked has to
compute those queries again by running maxima.

It is written in Triton's Gluon, since Triton itself waits for each product before it goes on.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from pipeline.kernels import sparse

VERSIONS = (3, 6), (3, 10)  # of Triton, the latter excluded: Gluon is experimental, and changes
if not VERSIONS[0] <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < VERSIONS[1]:
    raise ImportError(f"Triton {triton.__version__}: this is written for 3.6 to 3.9")

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after 3.6
LOG2_E = gl.constexpr(1.4426950408889634)
LARGEST_SUM = gl.constexpr(2.0**96)  # of weights, so that those of values up to 2^31 do not overflow
FIRST_ROWS = gl.constexpr(sparse.WHOLE_ROWS)
COPYING = gl.constexpr(24)  # registers of a thread
ATTENDING = gl.constexpr(240)


@gluon.jit
def place_of(work, rows, heads, kv_heads):  # type: ignore[no-untyped-def]
    """The block of queries that a work is, its head, and the head of its keys.

    The last blocks of all heads are first, since they may attend to everything; then those of heads with the
    same keys are beside each other, and later ones before earlier.
    """
    group, first_rows = heads // kv_heads, gl.minimum(rows, FIRST_ROWS)
    is_first, later = work < first_rows * heads, work - first_rows * heads
    others = gl.maximum((rows - first_rows) * group, 1)  # of a head of keys
    within = later % others
    row = gl.where(is_first, rows - 1 - work // heads, rows - 1 - first_rows - within // group)
    head = gl.where(is_first, work % heads, later // others * group + within % group)
    return row, head, head // group


@gluon.jit
def barriers(COUNT: gl.constexpr):  # type: ignore[no-untyped-def]
    """(COUNT, 1) barriers each: that what is copied is there, and that both groups have read it."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    there = gl.allocate_shared_memory(gl.int64, [COUNT, 1], layout)
    free = gl.allocate_shared_memory(gl.int64, [COUNT, 1], layout)
    for nth in gl.static_range(COUNT):
        mbarrier.init(there.index(nth), count=1)
        mbarrier.init(free.index(nth), count=2)
    return there, free


@gluon.jit
def pair_of_barriers():  # type: ignore[no-untyped-def]
    """The same of what there is one of."""
    there, free = barriers(1)
    return there.index(0), free.index(0)


@gluon.jit
def told_works():  # type: ignore[no-untyped-def]
    """Where `tell` leaves a work, and the barriers that tell of it."""
    told = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    there, free = pair_of_barriers()
    return told, there, free


@gluon.jit
def tell(work, nth, telling):  # type: ignore[no-untyped-def]
    """Tell those who attend what this program's work is, when they have heard of the one before."""
    told, told_there, told_free = telling
    mbarrier.wait(told_free, (nth & 1) ^ 1)
    told.store(gl.full([1], work, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(told_there, count=1)


@gluon.jit
def heard(nth, telling):  # type: ignore[no-untyped-def]
    told, told_there, told_free = telling
    mbarrier.wait(told_there, nth & 1)
    work = gl.max(told.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(told_free, count=1)
    return work


@gluon.jit
def _copy(  # type: ignore[no-untyped-def]
    taken,
    telling,
    tensors,
    buffers,
    lists,
    sizes,
    LISTED: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Of each work that this program gets the queries, then tiles of keys and values, the own block first."""
    PARTS: gl.constexpr = BLOCK // TILE
    q, k, v = tensors
    queries, q_there, q_free, keys, k_there, k_free, values, v_there, v_free = buffers
    indices, counts, capacity, before = lists
    rows, all_rows, heads, kv_heads, works = sizes
    work, nth, tile = gl.program_id(0), 0, 0
    while work < works:
        tell(work, nth, telling)
        row, head, kv_head = place_of(work, rows, heads, kv_heads)
        place = head.to(gl.int64) * all_rows + row
        count, own, following_work = gl.load(counts + place), before + row, works
        mbarrier.wait(q_free, (nth & 1) ^ 1)
        mbarrier.expect(q_there, q.block_type.nbytes)
        copy_tile(q, [row * BLOCK, head * HEAD_DIM], q_there, queries)
        block = own
        for listed in range(0, count):
            if listed + 1 == count:  # while there are tiles left to attend to
                following_work = gl.num_programs(0) + gl.atomic_add(taken, 1, sem="relaxed")
            if LISTED:
                following = gl.load(indices + place * capacity + listed)
            else:
                following = gl.where(listed == 0, 0, own + 1 - count + listed)
            for part in gl.static_range(PARTS):
                stage, lap = tile % STAGES, ((tile // STAGES) & 1) ^ 1
                first = block * BLOCK + part * TILE
                mbarrier.wait(k_free.index(stage), lap)
                mbarrier.expect(k_there.index(stage), k.block_type.nbytes)
                copy_tile(k, [first, kv_head * HEAD_DIM], k_there.index(stage), keys.index(stage))
                mbarrier.wait(v_free.index(stage), lap)
                mbarrier.expect(v_there.index(stage), v.block_type.nbytes)
                copy_tile(v, [first, kv_head * HEAD_DIM], v_there.index(stage), values.index(stage))
                tile += 1
            block = following
        work, nth = following_work, nth + 1
    tell(work, nth, telling)


@gluon.jit
def _scores(queries, keys, k_there, tile, layout: gl.constexpr, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin a tile's products, when its keys have come."""
    stage = tile % STAGES
    mbarrier.wait(k_there.index(stage), (tile // STAGES) & 1)
    ROWS: gl.constexpr = queries.shape[0]
    TILE: gl.constexpr = keys.shape[1]
    nothing = gl.full([ROWS, TILE], 0, gl.float32, layout=layout)
    turned = keys.index(stage).permute((1, 0))
    return hopper.warpgroup_mma(queries, turned, nothing, use_acc=False, is_async=True)


@gluon.jit
def _mixed(weights, values, v_there, tile, mixed, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin to add a tile's values, when they have come."""
    stage = tile % STAGES
    mbarrier.wait(v_there.index(stage), (tile // STAGES) & 1)
    return hopper.warpgroup_mma(weights, values.index(stage), mixed, is_async=True)


@gluon.jit
def write(result, results, first, head):  # type: ignore[no-untyped-def]
    """Write what a head's queries from the `first` on got, but for those that there are not."""
    out, out_token_stride, out_head_stride, asked = results
    ROWS: gl.constexpr = result.shape[0]
    HEAD_DIM: gl.constexpr = result.shape[1]
    query = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, result.type.layout))
    value = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, result.type.layout))
    start = out + head.to(gl.int64) * out_head_stride
    places = start + query[:, None].to(gl.int64) * out_token_stride + value[None, :]
    gl.store(places, result.to(out.dtype.element_ty), mask=(query < asked)[:, None])


@gluon.jit
def _attend(  # type: ignore[no-untyped-def]
    HALF: gl.constexpr,
    telling,
    buffers,
    results,
    given,
    sizes,
    SINKS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Of each work of this program the first or second `HALF` of its queries."""
    queries, q_there, q_free, keys, k_there, k_free, values, v_there, v_free = buffers
    counts, breached, scale, sinks = given
    rows, all_rows, heads, kv_heads, works = sizes
    PARTS: gl.constexpr = BLOCK // TILE
    ROWS: gl.constexpr = BLOCK // 2
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    of_values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    of_factors: gl.constexpr = gl.DotOperandLayout(0, of_values, k_width=2)
    by_query: gl.constexpr = gl.SliceLayout(1, of_scores)
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = results[0].dtype.element_ty
    mine = queries.slice(HALF * ROWS, ROWS)
    at = HALF * ROWS + gl.arange(0, ROWS, layout=by_query)
    column = gl.arange(0, TILE, layout=gl.SliceLayout(0, of_scores))
    nth, tile = 0, 0
    work = heard(nth, telling)
    while work < works:
        row, head, _ = place_of(work, rows, heads, kv_heads)
        place = head.to(gl.int64) * all_rows + row
        tiles = gl.load(counts + place) * PARTS
        largest = gl.full([ROWS], -1.0e30, gl.float32, layout=by_query)
        total = gl.full([ROWS], 0.0, gl.float32, layout=by_query)
        mixed = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, layout=of_values)
        mbarrier.wait(q_there, nth & 1)
        for n in range(0, gl.minimum(tiles, 2 * PARTS)):  # the own block and the first, by running maxima
            scores = _scores(mine, keys, k_there, tile, of_scores, STAGES)
            scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_free.index(tile % STAGES), count=1)
            seen = (n >= PARTS) | ((n * TILE + column)[None, :] <= at[:, None])
            scores = gl.where(seen, scores * scale, float("-inf"))
            raised = gl.maximum(largest, gl.max(scores, 1))
            weights = gl.exp2(scores - raised[:, None])
            shrunk = gl.exp2(largest - raised)
            total = total * shrunk + gl.sum(weights, 1)
            mixed = mixed * gl.convert_layout(shrunk, gl.SliceLayout(1, of_values))[:, None]
            largest = raised
            shares = gl.convert_layout(weights.to(dtype), of_factors)
            mixed = _mixed(shares, values, v_there, tile, mixed, STAGES)
            mixed = hopper.warpgroup_mma_wait(0, deps=(mixed,))
            mbarrier.arrive(v_free.index(tile % STAGES), count=1)
            tile += 1
        if tiles > 2 * PARTS:  # the others by these maxima
            scores = _scores(mine, keys, k_there, tile, of_scores, STAGES)
            scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_free.index(tile % STAGES), count=1)
            weights = gl.exp2(scores * scale - largest[:, None])
            total += gl.sum(weights, 1)
            shares = gl.convert_layout(weights.to(dtype), of_factors)
            tile += 1
            for _ in range(2 * PARTS + 1, tiles):
                scores = _scores(mine, keys, k_there, tile, of_scores, STAGES)
                mixed = _mixed(shares, values, v_there, tile - 1, mixed, STAGES)
                scores = hopper.warpgroup_mma_wait(1, deps=(scores,))
                mbarrier.arrive(k_free.index(tile % STAGES), count=1)
                weights = gl.exp2(scores * scale - largest[:, None])
                total += gl.sum(weights, 1)
                following = gl.convert_layout(weights.to(dtype), of_factors)
                mixed, shares = hopper.warpgroup_mma_wait(0, deps=(mixed, shares))
                mbarrier.arrive(v_free.index((tile - 1) % STAGES), count=1)
                shares = following
                tile += 1
            mbarrier.arrive(q_free, count=1)
            mixed = _mixed(shares, values, v_there, tile - 1, mixed, STAGES)
            mixed = hopper.warpgroup_mma_wait(0, deps=(mixed,))
            mbarrier.arrive(v_free.index((tile - 1) % STAGES), count=1)
        else:
            mbarrier.arrive(q_free, count=1)
        if SINKS:
            total += gl.exp2(gl.load(sinks + head) * LOG2_E - largest)
        # a sum that is no number is to be told too
        gl.store(breached + place * 2 + HALF, gl.max(gl.where(total <= LARGEST_SUM, 0, 1), 0))
        result = mixed / gl.convert_layout(total, gl.SliceLayout(1, of_values))[:, None]
        result = gl.convert_layout(result.to(dtype), stored)
        write(result, results, row * BLOCK + HALF * ROWS, head)
        nth += 1
        work = heard(nth, telling)


@gluon.jit(do_not_specialize=["capacity", "asked", "before", "rows", "all_rows", "works"])
def hopper_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    out,
    out_token_stride,
    out_head_stride,
    indices,
    counts,
    breached,
    taken,
    sinks,
    capacity,
    asked,
    before,
    rows,
    all_rows,
    works,
    heads,
    kv_heads,
    scale,
    LISTED: gl.constexpr,
    SINKS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """See `hopper_attention.attend`. A program a multiprocessor; a work is a block of queries of a head.

    Each has one block of keys or more. Since works have very different numbers of them, a program takes the
    next one when it can: `taken`, which is 0 at first, counts those that were taken beside each program's
    first.

    `q`, `k` and `v` are tensor descriptors of (tokens, heads * HEAD_DIM), the rest is as in
    `triton_attention`. Barriers tell that a buffer's tile is there, and that both halves have read it.
    """
    queries = gl.allocate_shared_memory(q.dtype, [BLOCK, HEAD_DIM], q.layout)
    keys = gl.allocate_shared_memory(k.dtype, [STAGES, TILE, HEAD_DIM], k.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES, TILE, HEAD_DIM], v.layout)
    telling = told_works()
    q_there, q_free = pair_of_barriers()
    k_there, k_free = barriers(STAGES)
    v_there, v_free = barriers(STAGES)
    buffers = queries, q_there, q_free, keys, k_there, k_free, values, v_there, v_free
    results = out, out_token_stride, out_head_stride, asked
    tensors, lists, given = (q, k, v), (indices, counts, capacity, before), (counts, breached, scale, sinks)
    sizes = rows, all_rows, heads, kv_heads, works
    # fmt: off
    gl.warp_specialize(
        [
            (_attend, (0, telling, buffers, results, given, sizes, SINKS, HEAD_DIM, BLOCK, TILE, STAGES)),
            (_attend, (1, telling, buffers, results, given, sizes, SINKS, HEAD_DIM, BLOCK, TILE, STAGES)),
            (_copy, (taken, telling, tensors, buffers, lists, sizes, LISTED, HEAD_DIM, BLOCK, TILE, STAGES)),
        ],
        [4, 1],
        [ATTENDING, COPYING],
    )
    # fmt: on
