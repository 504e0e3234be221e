"""Block-sparse attention by the kernels for Hopper. Importing this module fails without Gluon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pipeline.kernels.blocks import rounded_keys
from pipeline.kernels.blocks.hopper_kernel import hopper_kernel
from pipeline.kernels.blocks.hopper_rounded_kernel import rounded_kernel
from pipeline.kernels.blocks.rounded_values import RoundedValues
from pipeline.kernels.devices import copied_by_tiles, is_hopper, multiprocessors
from pipeline.kernels.sparse import BlockLists, score_scale

# keys of a tile by head dimension, and how many tiles of keys and of values lie in shared memory, of 227 KB
TILES = {64: (128, 4), 128: (128, 2), 256: (64, 2)}
ROUNDED_STAGES = 4  # the same of rounded keys and values, whose tiles are whole blocks
GLUON = {torch.bfloat16: gl.bfloat16, torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv}


def applies(q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> bool:
    """Whether `attend` can: in bfloat16, on a Hopper GPU, heads of a size and place that its copies bear.

    float16 holds no weights that are far above 1, which a maximum that stays as it is makes.
    """
    return (
        q_QHd.shape[2] in TILES
        and q_QHd.dtype == torch.bfloat16
        and is_hopper(q_QHd.device)
        and all(map(copied_by_tiles, (q_QHd, k_TKd, v_TKd)))
    )


def rounds(k_TKd: Tensor, blocks: BlockLists, sinks_H: Tensor | None) -> bool:
    """Whether `attend` rounds to eight bits: 128 channels, where keys are many, and there are no sinks.

    Fewer channels gain nothing, and more leave too few registers. Sinks are scores beside the others, which
    need the zero that all keys share.
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
    programs = min(works, multiprocessors(q_QHd.device))
    breached_HM2 = torch.empty(heads, all_rows, 2, dtype=torch.int32, device=q_QHd.device)
    taken = torch.zeros(1, dtype=torch.int32, device=q_QHd.device)
    # where there are none, others stand for them, which are not looked at
    listed = counts if blocks.indices is None else blocks.indices
    queries = _of_tokens(q_QHd, block)
    results = (out_QHd, *out_QHd.stride()[:2], listed, counts, breached_HM2)
    sizes = (listed.shape[-1], asked, blocks.before, rows, all_rows, works, heads, kv_heads)
    if rounds(k_TKd, blocks, sinks_H):
        keys, values = rounded_keys.RoundedKeys.of(q_QHd, k_TKd), RoundedValues.of(v_TKd)
        # a head with a value that is no number is told as one with such a key is
        factors_Kd = keys.factors_Kd + 0 * values.spans_Kd.sum(1, keepdim=True)
        rounded_kernel[(programs,)](
            *(queries, _of_tokens(keys.keys_TKd, block), _of_channels(values.values_KdT, block)),
            *(*results, taken, *sizes, score_scale(head_dim), factors_Kd, values.spans_Kd, values.middles_Kd),
            HEAD_DIM=head_dim,
            BLOCK=block,
            STAGES=ROUNDED_STAGES,
            num_warps=4,
        )
        return breached_HM2
    tile, stages = TILES[head_dim]
    hopper_kernel[(programs,)](
        *(queries, _of_tokens(k_TKd, tile), _of_tokens(v_TKd, tile)),
        *(*results, taken, counts if sinks_H is None else sinks_H, *sizes, score_scale(head_dim)),
        LISTED=blocks.indices is not None,
        SINKS=sinks_H is not None,
        HEAD_DIM=head_dim,
        BLOCK=block,
        TILE=tile,
        STAGES=stages,
        num_warps=4,
    )
    return breached_HM2


def _of_tokens(x_TNd: Tensor, tokens: int) -> Any:
    """To copy a head of so many tokens at a time."""
    (count, heads, head_dim), stride = x_TNd.shape, x_TNd.stride(0)
    return _described(x_TNd, (count, heads * head_dim), stride, (tokens, head_dim))


def _of_channels(x_KdT: Tensor, tokens: int) -> Any:
    """The same of tokens that lie side by side."""
    heads, head_dim, count = x_KdT.shape
    return _described(x_KdT, (heads * head_dim, count), count, (head_dim, tokens))


def _described(x: Tensor, shape: tuple[int, int], stride: int, tile: tuple[int, int]) -> Any:
    layout = NVMMASharedLayout.get_default_for([*tile], GLUON[x.dtype])
    return TensorDescriptor(x, [*shape], [stride, 1], [*tile], layout)
