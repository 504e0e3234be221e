"""Block-sparse attention for Hopper, by warps that specialise. Importing this module fails without Gluon.

One warp copies tiles of keys and values into shared memory, two groups of four attend with half a block of
queries each, as in FlashAttention-3 (arXiv 2407.08608): while a tile's values are multiplied, the next tile's
weights are made. What makes them cheap is a softmax that refers to a maximum that stays as it is, as in
FlashDecoding++ (arXiv 2311.01282): that of the queries' own block and the first, where the largest scores
are. Should other scores exceed it by so much that sums might overflow, this is told, and whoever asked has to
compute those queries again by running maxima.

It is written in Triton's Gluon, since Triton itself waits for each product before it goes on.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pipeline.kernels.devices import copied_by_tiles, is_hopper
from pipeline.kernels.sparse import BlockLists, score_scale

VERSIONS = (3, 6), (3, 10)  # of Triton, the latter excluded: Gluon is experimental, and changes
if not VERSIONS[0] <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < VERSIONS[1]:
    raise ImportError(f"Triton {triton.__version__}: this is written for 3.6 to 3.9")

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after 3.6
LOG2_E = gl.constexpr(1.4426950408889634)
LARGEST_SUM = gl.constexpr(2.0**96)  # of weights, so that those of values up to 2^31 do not overflow
HEAD_DIMS = (64, 128, 256)
COPYING = gl.constexpr(24)  # registers of a thread
ATTENDING = gl.constexpr(240)


@gluon.jit
def _place(work, rows, heads, kv_heads):  # type: ignore[no-untyped-def]
    """See `triton_attention._place`, which Gluon cannot take: it compiles functions of its own alone."""
    group = heads // kv_heads
    within = work % (rows * group)
    row = rows - 1 - within // group
    head = work // (rows * group) * group + within % group
    return row, head, head // group


@gluon.jit
def _copy(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    queries,
    keys,
    values,
    q_there,
    q_free,
    k_there,
    k_free,
    v_there,
    v_free,
    indices,
    capacity,
    before,
    LISTED: gl.constexpr,
    counts,
    rows,
    all_rows,
    heads,
    kv_heads,
    works,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Of each work of this program the queries, then tiles of keys and values, the own block first."""
    PARTS: gl.constexpr = BLOCK // TILE
    tile = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        row, head, kv_head = _place(work, rows, heads, kv_heads)
        place = head.to(gl.int64) * all_rows + row
        count, own = gl.load(counts + place), before + row
        turn = (work // gl.num_programs(0)) & 1  # works of a program are so many apart
        mbarrier.wait(q_free, turn ^ 1)
        mbarrier.expect(q_there, q.block_type.nbytes)
        copy_tile(q, [row * BLOCK, head * HEAD_DIM], q_there, queries)
        block = own
        for listed in range(0, count):
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


@gluon.jit
def _scores(queries, keys, k_there, tile, layout: gl.constexpr, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin a tile's scores, when its keys have come."""
    stage = tile % STAGES
    mbarrier.wait(k_there.index(stage), (tile // STAGES) & 1)
    ROWS: gl.constexpr = queries.shape[0]
    TILE: gl.constexpr = keys.shape[1]
    nothing = gl.full([ROWS, TILE], 0.0, gl.float32, layout=layout)
    turned = keys.index(stage).permute((1, 0))
    return hopper.warpgroup_mma(queries, turned, nothing, use_acc=False, is_async=True)


@gluon.jit
def _mixed(weights, values, v_there, tile, mixed, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin to add a tile's values, when they have come."""
    stage = tile % STAGES
    mbarrier.wait(v_there.index(stage), (tile // STAGES) & 1)
    return hopper.warpgroup_mma(weights, values.index(stage), mixed, is_async=True)


@gluon.jit
def _attend(  # type: ignore[no-untyped-def]
    HALF: gl.constexpr,
    all_queries,
    keys,
    values,
    q_there,
    q_free,
    k_there,
    k_free,
    v_there,
    v_free,
    out,
    out_token_stride,
    out_head_stride,
    breached,
    sinks,
    SINKS: gl.constexpr,
    asked,
    scale,
    counts,
    rows,
    all_rows,
    heads,
    kv_heads,
    works,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Of each work of this program the first or second `HALF` of its queries."""
    PARTS: gl.constexpr = BLOCK // TILE
    ROWS: gl.constexpr = BLOCK // 2
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    of_values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    of_factors: gl.constexpr = gl.DotOperandLayout(0, of_values, k_width=2)
    by_query: gl.constexpr = gl.SliceLayout(1, of_scores)
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = out.dtype.element_ty
    queries = all_queries.slice(HALF * ROWS, ROWS)
    at = HALF * ROWS + gl.arange(0, ROWS, layout=by_query)
    column = gl.arange(0, TILE, layout=gl.SliceLayout(0, of_scores))
    tile = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        row, head, _ = _place(work, rows, heads, kv_heads)
        place = head.to(gl.int64) * all_rows + row
        tiles = gl.load(counts + place) * PARTS
        largest = gl.full([ROWS], -1.0e30, gl.float32, layout=by_query)
        total = gl.full([ROWS], 0.0, gl.float32, layout=by_query)
        mixed = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, layout=of_values)
        mbarrier.wait(q_there, (work // gl.num_programs(0)) & 1)
        for n in range(0, gl.minimum(tiles, 2 * PARTS)):  # the own block and the first, by running maxima
            scores = _scores(queries, keys, k_there, tile, of_scores, STAGES)
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
            factors = gl.convert_layout(weights.to(dtype), of_factors)
            mixed = _mixed(factors, values, v_there, tile, mixed, STAGES)
            mixed = hopper.warpgroup_mma_wait(0, deps=(mixed,))
            mbarrier.arrive(v_free.index(tile % STAGES), count=1)
            tile += 1
        if tiles > 2 * PARTS:  # the others by these maxima
            scores = _scores(queries, keys, k_there, tile, of_scores, STAGES)
            scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_free.index(tile % STAGES), count=1)
            weights = gl.exp2(scores * scale - largest[:, None])
            total += gl.sum(weights, 1)
            factors = gl.convert_layout(weights.to(dtype), of_factors)
            tile += 1
            for _ in range(2 * PARTS + 1, tiles):
                scores = _scores(queries, keys, k_there, tile, of_scores, STAGES)
                mixed = _mixed(factors, values, v_there, tile - 1, mixed, STAGES)
                scores = hopper.warpgroup_mma_wait(1, deps=(scores,))
                mbarrier.arrive(k_free.index(tile % STAGES), count=1)
                weights = gl.exp2(scores * scale - largest[:, None])
                total += gl.sum(weights, 1)
                following = gl.convert_layout(weights.to(dtype), of_factors)
                mixed, factors = hopper.warpgroup_mma_wait(0, deps=(mixed, factors))
                mbarrier.arrive(v_free.index((tile - 1) % STAGES), count=1)
                factors = following
                tile += 1
            mbarrier.arrive(q_free, count=1)
            mixed = _mixed(factors, values, v_there, tile - 1, mixed, STAGES)
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
        query = row * BLOCK + HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored))
        value = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, stored))
        start = out + head.to(gl.int64) * out_head_stride
        places = start + query[:, None].to(gl.int64) * out_token_stride + value[None, :]
        gl.store(places, result, mask=(query < asked)[:, None])


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
    """See `attend`. A program a multiprocessor; each takes every n-th of `works` blocks of queries of a head.

    `q`, `k` and `v` are tensor descriptors of (tokens, heads * HEAD_DIM), the rest is as in
    `triton_attention`. Barriers tell that a buffer's tile is there, and that both halves have read it.
    """
    queries = gl.allocate_shared_memory(q.dtype, [BLOCK, HEAD_DIM], q.layout)
    keys = gl.allocate_shared_memory(k.dtype, [STAGES, TILE, HEAD_DIM], k.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES, TILE, HEAD_DIM], v.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_there = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_there, count=1)
    mbarrier.init(q_free, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_there.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_there.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    # fmt: off
    gl.warp_specialize(
        [
            (_attend, (0, queries, keys, values, q_there, q_free, k_there, k_free, v_there, v_free,
                       out, out_token_stride, out_head_stride, breached, sinks, SINKS, asked, scale,
                       counts, rows, all_rows, heads, kv_heads, works, HEAD_DIM, BLOCK, TILE, STAGES)),
            (_attend, (1, queries, keys, values, q_there, q_free, k_there, k_free, v_there, v_free,
                       out, out_token_stride, out_head_stride, breached, sinks, SINKS, asked, scale,
                       counts, rows, all_rows, heads, kv_heads, works, HEAD_DIM, BLOCK, TILE, STAGES)),
            (_copy, (q, k, v, queries, keys, values, q_there, q_free, k_there, k_free, v_there, v_free,
                     indices, capacity, before, LISTED,
                     counts, rows, all_rows, heads, kv_heads, works, HEAD_DIM, BLOCK, TILE, STAGES)),
        ],
        [4, 1],
        [ATTENDING, COPYING],
    )
    # fmt: on


def tiles_of(head_dim: int) -> tuple[int, int]:
    """Keys of a tile, and how many tiles of keys and of values lie in shared memory, which has 227 KB."""
    return {64: (128, 4), 128: (128, 2), 256: (64, 2)}[head_dim]


def applies(q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> bool:
    """Whether `attend` can: in bfloat16, on a Hopper GPU, heads of a size and place that its copies bear.

    float16 holds no weights that are far above 1, which a maximum that stays as it is makes.
    """
    return (
        q_QHd.shape[2] in HEAD_DIMS
        and q_QHd.dtype == torch.bfloat16
        and is_hopper(q_QHd.device)
        and all(map(copied_by_tiles, (q_QHd, k_TKd, v_TKd)))
    )


def attend(
    q_QHd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    out_QHd: Tensor,
    blocks: BlockLists,
    rows: int,
    sinks_H: Tensor | None,
    block: int,
) -> Tensor:
    """Attend with the first `rows` blocks of queries, into `out_QHd`.

    Returns (H, M, 2) int32, not 0 where a half of a block of queries has to be computed again.
    """
    (asked, heads, head_dim), kv_heads = q_QHd.shape, k_TKd.shape[1]
    counts, all_rows, works = blocks.counts, blocks.counts.shape[1], rows * heads
    tile, stages = tiles_of(head_dim)
    breached_HM2 = torch.empty(heads, all_rows, 2, dtype=torch.int32, device=q_QHd.device)
    # where there are none, others stand for them, which are not looked at
    listed = counts if blocks.indices is None else blocks.indices
    sinks = counts if sinks_H is None else sinks_H
    hopper_kernel[(min(works, _multiprocessors(q_QHd.device)),)](
        *(_described(q_QHd, block), _described(k_TKd, tile), _described(v_TKd, tile)),
        *(out_QHd, *out_QHd.stride()[:2], listed, counts, breached_HM2, sinks, listed.shape[-1]),
        *(asked, blocks.before, rows, all_rows, works, heads, kv_heads, score_scale(head_dim)),
        LISTED=blocks.indices is not None,
        SINKS=sinks_H is not None,
        HEAD_DIM=head_dim,
        BLOCK=block,
        TILE=tile,
        STAGES=stages,
        num_warps=4,
    )
    return breached_HM2


def _described(x_TNd: Tensor, rows: int) -> Any:
    tokens, heads, head_dim = x_TNd.shape
    layout = NVMMASharedLayout.get_default_for([rows, head_dim], gl.bfloat16)
    return TensorDescriptor(x_TNd, [tokens, heads * head_dim], [x_TNd.stride(0), 1], [rows, head_dim], layout)


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
