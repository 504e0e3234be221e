"""Block-sparse attention by the kernel for Hopper. Importing this module fails without Gluon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pipeline.kernels.blocks import rounded_keys
from pipeline.kernels.blocks.hopper_kernel import hopper_kernel
from pipeline.kernels.devices import copied_by_tiles, is_hopper, multiprocessors
from pipeline.kernels.sparse import BlockLists, score_scale

HEAD_DIMS = (64, 128, 256)


def tiles_of(head_dim: int, *, rounded: bool) -> tuple[int, int]:
    """Keys of a tile, and how many tiles of keys and of values lie in shared memory, which has 227 KB."""
    return {64: (128, 4), 128: (128, 3 if rounded else 2), 256: (64, 2)}[head_dim]


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


def rounds(k_TKd: Tensor, blocks: BlockLists, sinks_H: Tensor | None) -> bool:
    """Whether `attend` takes keys in int8: of 128 channels, where they are many, and there are no sinks.

    Fewer channels gain nothing, and rounded queries of more leave too few registers. Sinks are scores beside
    the others, which need the zero that all keys share.
    """
    are_many = len(k_TKd) >= rounded_keys.ROUNDED_FROM and k_TKd.shape[2] == rounded_keys.HEAD_DIM
    return are_many and blocks.indices is not None and sinks_H is None


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
    rounded = rounded_keys.RoundedKeys.of(q_QHd, k_TKd) if rounds(k_TKd, blocks, sinks_H) else None
    keys_TKd = k_TKd if rounded is None else rounded.keys_TKd
    tile, stages = tiles_of(head_dim, rounded=rounded is not None)
    breached_HM2 = torch.empty(heads, all_rows, 2, dtype=torch.int32, device=q_QHd.device)
    taken = torch.zeros(1, dtype=torch.int32, device=q_QHd.device)
    # where there are none, others stand for them, which are not looked at
    listed = counts if blocks.indices is None else blocks.indices
    sinks = counts if sinks_H is None else sinks_H
    factors = counts if rounded is None else rounded.factors_Kd
    hopper_kernel[(min(works, multiprocessors(q_QHd.device)),)](
        *(_described(q_QHd, block), _described(keys_TKd, tile), _described(v_TKd, tile)),
        *(out_QHd, *out_QHd.stride()[:2], listed, counts, breached_HM2, taken, sinks, listed.shape[-1]),
        *(asked, blocks.before, rows, all_rows, works, heads, kv_heads, score_scale(head_dim), factors),
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
    dtype = gl.int8 if x_TNd.dtype == torch.int8 else gl.bfloat16
    layout = NVMMASharedLayout.get_default_for([rows, head_dim], dtype)
    return TensorDescriptor(x_TNd, [tokens, heads * head_dim], [x_TNd.stride(0), 1], [rows, head_dim], layout)
