"""The kernel of `hopper_attention.py` for keys and values that are rounded to eight bits.

As in `hopper_kernel.py` one warp copies tiles, and two groups of four attend with half a block of queries
each. Queries are rounded here, products with keys are whole numbers. A tile's weights refer to the largest
score in the tile, since e4m3 spans few magnitudes; they and the values are multiplied in e4m3, and what comes
of a tile is added to the others in float32, since the tensor cores add up products of e4m3 in fewer bits. See
SageAttention2 (arXiv 2411.10958) for both. Importing this module fails without Triton's Gluon.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from pipeline.kernels.blocks.hopper_kernel import (
    ATTENDING,
    COPYING,
    LARGEST_SUM,
    barriers,
    copy_tile,
    heard,
    pair_of_barriers,
    place_of,
    tell,
    told_works,
    write,
)

MOVED = gl.constexpr(12582912.0)  # 1.5 * 2^23, floats around which are whole numbers: 2^22 on either side
BITS_OF_MOVED = gl.constexpr(0x4B400000)
LOWEST = gl.constexpr(-0x40000000)  # below all products
LIFT = gl.constexpr(7.0)  # the largest weight of a tile is 2^7, near the end of e4m3's range, which is 448
MOST_UNIT = gl.constexpr(2.0)  # of scores, of which MOVED is rounded by 1 at most: weights are below 2^8


@gluon.jit
def _copy(  # type: ignore[no-untyped-def]
    taken,
    telling,
    tensors,
    buffers,
    lists,
    sizes,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Of each work that this program gets the queries, then blocks of keys and values, the own one first."""
    q, k, v = tensors
    queries, q_there, q_free, keys, values, there, free = buffers
    indices, counts, capacity, before = lists
    rows, all_rows, heads, kv_heads, works = sizes
    work, nth, tile = gl.program_id(0), 0, 0
    while work < works:
        tell(work, nth, telling)
        row, head, kv_head = place_of(work, rows, heads, kv_heads)
        place = head.to(gl.int64) * all_rows + row
        count, block, following_work = gl.load(counts + place), before + row, works
        mbarrier.wait(q_free, (nth & 1) ^ 1)
        mbarrier.expect(q_there, q.block_type.nbytes)
        copy_tile(q, [row * BLOCK, head * HEAD_DIM], q_there, queries)
        for listed in range(0, count):
            if listed + 1 == count:  # while there are tiles left to attend to
                following_work = gl.num_programs(0) + gl.atomic_add(taken, 1, sem="relaxed")
            following = gl.load(indices + place * capacity + listed)
            stage = tile % STAGES
            mbarrier.wait(free.index(stage), ((tile // STAGES) & 1) ^ 1)
            mbarrier.expect(there.index(stage), k.block_type.nbytes + v.block_type.nbytes)
            copy_tile(k, [block * BLOCK, kv_head * HEAD_DIM], there.index(stage), keys.index(stage))
            copy_tile(v, [kv_head * HEAD_DIM, block * BLOCK], there.index(stage), values.index(stage))
            tile += 1
            block = following
        work, nth = following_work, nth + 1
    tell(work, nth, telling)


@gluon.jit
def _rounded(queries, factors, unit, layout: gl.constexpr):  # type: ignore[no-untyped-def]
    """Queries in int8, and (ROWS,) the unit of their products with keys that were divided by `factors`."""
    column = gl.arange(0, queries.shape[1], layout=gl.SliceLayout(0, layout))
    wide = queries.load(layout).to(gl.float32) * (gl.load(factors + column) * unit)[None, :]
    # as whole numbers magnitudes are in the same order, and what is no number is above them all
    magnitudes = wide.to(gl.int32, bitcast=True) & 0x7FFFFFFF
    largest = gl.max(magnitudes, 1).to(gl.float32, bitcast=True) + 1.0e-30
    moved = wide * (127.0 / largest)[:, None] + MOVED  # rounded to whole numbers, which are its last bits
    return moved.to(gl.int32, bitcast=True).to(gl.int8), largest / 127.0


@gluon.jit
def _arrived(there, tile, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    mbarrier.wait(there.index(tile % STAGES), (tile // STAGES) & 1)


@gluon.jit
def _products(queries, keys, tile, layout: gl.constexpr, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin a tile's products, which are whole numbers."""
    nothing = gl.full([queries.shape[0], keys.shape[1]], 0, gl.int32, layout=layout)
    turned = keys.index(tile % STAGES).permute((1, 0))
    return hopper.warpgroup_mma(queries, turned, nothing, use_acc=False, is_async=True)


@gluon.jit
def _moved(products, top):  # type: ignore[no-untyped-def]
    """MOVED, and products less the largest of their query, as floats.

    A sum of whole numbers is read as the last bits of a float: that takes less than a conversion.
    """
    return (products + (BITS_OF_MOVED - top)[:, None]).to(gl.float32, bitcast=True)


@gluon.jit
def _of_rows(values, wide):  # type: ignore[no-untyped-def]
    """Values of each row, where the threads have them that hold the row of another tensor."""
    return gl.convert_layout(values, gl.SliceLayout(1, wide.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def _halves(values):  # type: ignore[no-untyped-def]
    """The left and the right half of columns, which lie in the same threads."""
    ROWS: gl.constexpr = values.shape[0]
    WIDTH: gl.constexpr = values.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    left, right = values.reshape([ROWS, 2, WIDTH]).permute((0, 2, 1)).split()
    left = gl.convert_layout(left, layout, assert_trivial=True)
    return left, gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def _sums(weights):  # type: ignore[no-untyped-def]
    """(ROWS, 4) what the weights come to that each thread has: a row's are added up when all are there."""
    return gl.sum(gl.sum(weights.reshape([weights.shape[0], weights.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _mixed(  # type: ignore[no-untyped-def]
    moved, unit, lowered, values, mixed, QUARTER: gl.constexpr, operand: gl.constexpr
):
    """Make a quarter of a tile's weights, and begin to add its values; also the weights' `_sums`.

    The order in which a thread holds products is not that of the operand of the next product. So it is taken
    for that, and each 16 values lie in `RoundedValues`' order.
    """
    ROWS: gl.constexpr = moved.shape[0]
    WIDTH: gl.constexpr = moved.shape[1]
    weights = gl.exp2(moved * _of_rows(unit, moved) - _of_rows(lowered, moved))
    turned = weights.reshape([ROWS, WIDTH // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, WIDTH])
    turned = gl.convert_layout(turned, operand, assert_trivial=True).to(gl.float8e4nv)
    own = values.slice(QUARTER * WIDTH, WIDTH, dim=1).permute((1, 0))
    mixed = hopper.warpgroup_mma(turned, own, mixed, use_acc=QUARTER > 0, is_async=True)
    return mixed, _sums(weights)


@gluon.jit
def _tile(moved, unit, lowered, values, mixed, operand: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin to mix a tile's values, a quarter of them while the next one's weights are made."""
    left, right = _halves(moved)
    first, second = _halves(left)
    third, fourth = _halves(right)
    mixed, total = _mixed(first, unit, lowered, values, mixed, 0, operand)
    mixed, more = _mixed(second, unit, lowered, values, mixed, 1, operand)
    total += more
    mixed, more = _mixed(third, unit, lowered, values, mixed, 2, operand)
    total += more
    mixed, more = _mixed(fourth, unit, lowered, values, mixed, 3, operand)
    return mixed, total + more


@gluon.jit
def _attend(  # type: ignore[no-untyped-def]
    HALF: gl.constexpr,
    telling,
    buffers,
    rounded,
    results,
    given,
    sizes,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Of each work of this program the first or second `HALF` of its queries."""
    queries, q_there, q_free, keys, values, there, free = buffers
    counts, breached, scale, factors, spans, middles = given
    rows, all_rows, heads, kv_heads, works = sizes
    ROWS: gl.constexpr = BLOCK // 2
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    of_quarter: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK // 4, 32])
    of_values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, of_values, k_width=4)
    by_query: gl.constexpr = gl.SliceLayout(1, of_scores)
    loaded: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    mine, asking = queries.slice(HALF * ROWS, ROWS), rounded.slice(HALF * ROWS, ROWS)
    at = HALF * ROWS + gl.arange(0, ROWS, layout=by_query)
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, of_scores))
    nth, tile = 0, 0
    work = heard(nth, telling)
    while work < works:
        row, head, kv_head = place_of(work, rows, heads, kv_heads)
        place = head.to(gl.int64) * all_rows + row
        tiles = gl.load(counts + place)
        largest = gl.full([ROWS], -1.0e30, gl.float32, layout=by_query)
        total = _sums(gl.full([ROWS, BLOCK // 4], 0.0, gl.float32, layout=of_quarter))
        mixed = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, layout=of_values)
        mbarrier.wait(q_there, nth & 1)
        whole, unit = _rounded(mine, factors + kv_head * HEAD_DIM, scale, loaded)
        mbarrier.arrive(q_free, count=1)
        asking.store(whole)
        fence_async_shared()
        unit = gl.convert_layout(unit, by_query)
        lowered = MOVED * unit - LIFT
        for n in range(0, gl.minimum(tiles, 2)):  # the own block and the first, by running maxima
            _arrived(there, tile, STAGES)
            products = _products(asking, keys, tile, of_scores, STAGES)
            products = hopper.warpgroup_mma_wait(0, deps=(products,))
            seen = (n >= 1) | (column[None, :] <= at[:, None])
            products = gl.where(seen, products, LOWEST)
            top = gl.max(products, 1)
            moved = gl.where(products == LOWEST, float("-inf"), _moved(products, top))
            level = top.to(gl.float32) * unit
            raised = gl.maximum(largest, level)
            shrunk, factor = gl.exp2(largest - raised), gl.exp2(level - raised)
            largest = raised
            mixed, total = mixed * _of_rows(shrunk, mixed), total * _of_rows(shrunk, total)
            added, weight = _tile(moved, unit, lowered, values.index(tile % STAGES), mixed, operand)
            total += weight * _of_rows(factor, total)
            added = hopper.warpgroup_mma_wait(0, deps=(added,))
            mbarrier.arrive(free.index(tile % STAGES), count=1)
            mixed += added * _of_rows(factor, mixed)
            tile += 1
        if tiles > 2:  # the others by these maxima
            _arrived(there, tile, STAGES)
            following = _products(asking, keys, tile, of_scores, STAGES)
            for _ in range(3, tiles):
                products = hopper.warpgroup_mma_wait(0, deps=(following,))
                _arrived(there, tile + 1, STAGES)
                top = gl.max(products, 1)
                factor = gl.exp2(top.to(gl.float32) * unit - largest)
                held = values.index(tile % STAGES)
                added, weight = _tile(_moved(products, top), unit, lowered, held, mixed, operand)
                total += weight * _of_rows(factor, total)
                following = _products(asking, keys, tile + 1, of_scores, STAGES)
                added = hopper.warpgroup_mma_wait(1, deps=(added,))
                mbarrier.arrive(free.index(tile % STAGES), count=1)
                mixed += added * _of_rows(factor, mixed)
                tile += 1
            products = hopper.warpgroup_mma_wait(0, deps=(following,))
            top = gl.max(products, 1)
            factor = gl.exp2(top.to(gl.float32) * unit - largest)
            held = values.index(tile % STAGES)
            added, weight = _tile(_moved(products, top), unit, lowered, held, mixed, operand)
            total += weight * _of_rows(factor, total)
            added = hopper.warpgroup_mma_wait(0, deps=(added,))
            mbarrier.arrive(free.index(tile % STAGES), count=1)
            mixed += added * _of_rows(factor, mixed)
            tile += 1
        whole_total = gl.convert_layout(gl.sum(total, 1), by_query)
        # a sum or a unit that is no number is to be told too
        is_good = (whole_total <= LARGEST_SUM) & (unit <= MOST_UNIT)
        gl.store(breached + place * 2 + HALF, gl.max(gl.where(is_good, 0, 1), 0))
        result = gl.convert_layout(mixed / _of_rows(whole_total, mixed), stored)
        own = kv_head * HEAD_DIM + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, stored))
        result = result * gl.load(spans + own)[None, :] + gl.load(middles + own)[None, :]
        write(result, results, row * BLOCK + HALF * ROWS, head)
        nth += 1
        work = heard(nth, telling)


@gluon.jit(do_not_specialize=["capacity", "asked", "before", "rows", "all_rows", "works"])
def rounded_kernel(  # type: ignore[no-untyped-def]
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
    capacity,
    asked,
    before,
    rows,
    all_rows,
    works,
    heads,
    kv_heads,
    scale,
    factors,
    spans,
    middles,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """See `hopper_attention.attend` and `hopper_kernel`.

    `q` and `k` are tensor descriptors of (tokens, heads * HEAD_DIM), `v` of (kv_heads * HEAD_DIM, tokens).
    `k` and `factors` are of `RoundedKeys`; `v`, `spans` and `middles` of `RoundedValues`.
    """
    queries = gl.allocate_shared_memory(q.dtype, [BLOCK, HEAD_DIM], q.layout)
    rounded = gl.allocate_shared_memory(gl.int8, [BLOCK, HEAD_DIM], k.layout)
    keys = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK, HEAD_DIM], k.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES, HEAD_DIM, BLOCK], v.layout)
    telling = told_works()
    q_there, q_free = pair_of_barriers()
    there, free = barriers(STAGES)
    buffers = queries, q_there, q_free, keys, values, there, free
    results = out, out_token_stride, out_head_stride, asked
    tensors, lists = (q, k, v), (indices, counts, capacity, before)
    given = counts, breached, scale, factors, spans, middles
    sizes = rows, all_rows, heads, kv_heads, works
    gl.warp_specialize(
        [
            (_attend, (0, telling, buffers, rounded, results, given, sizes, HEAD_DIM, BLOCK, STAGES)),
            (_attend, (1, telling, buffers, rounded, results, given, sizes, HEAD_DIM, BLOCK, STAGES)),
            (_copy, (taken, telling, tensors, buffers, lists, sizes, HEAD_DIM, BLOCK, STAGES)),
        ],
        [4, 1],
        [ATTENDING, COPYING],
    )
