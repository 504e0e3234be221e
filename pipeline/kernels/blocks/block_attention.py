"""Attention of a document's blocks of queries to the blocks of keys chosen for them: see sparse.py.

By the kernel for Hopper where it applies, else by one in Triton, or by plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.kernels import sparse
from pipeline.kernels.devices import multiprocessors
from pipeline.kernels.modules import kernels_for, power_of_two
from pipeline.kernels.sdpa import attention_with_sinks
from pipeline.kernels.sparse import BlockLists, score_scale

TILE = 64  # keys of a block that the kernel in Triton attends to at a time
LOOKING = 256  # programs that look for blocks of queries to be computed again, of which there are hardly any


def block_sparse_attention(
    q_QHd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    blocks: BlockLists,
    left_out: int = 0,
    sinks_H: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Causal attention of one document's queries to the keys in the blocks chosen, (Q, H, d).

    The queries are those that the blocks were chosen for. What the last `left_out` blocks of them get is not
    computed, and undefined. Blocks have `block` tokens, 64 or the usual 128.
    """
    block = block or sparse.BLOCK
    queries, heads, head_dim = q_QHd.shape
    rows = max(0, blocks.counts.shape[1] - left_out)
    out_QHd = torch.empty(queries, heads, head_dim, dtype=q_QHd.dtype, device=q_QHd.device)
    kernels, hopper = _kernels(q_QHd), hopper_for(q_QHd, k_TKd, v_TKd, block)
    if kernels is None:
        done = _plain(q_QHd[: rows * block], k_TKd, v_TKd, blocks, sinks_H, block)
        out_QHd[: len(done)] = done
    elif rows and hopper is not None:
        breached_HM2 = hopper.attend(q_QHd, k_TKd, v_TKd, out_QHd, blocks, rows, sinks_H, block)
        _by_triton(kernels, q_QHd, k_TKd, v_TKd, out_QHd, blocks, rows, sinks_H, block, breached_HM2)
    elif rows:
        _by_triton(kernels, q_QHd, k_TKd, v_TKd, out_QHd, blocks, rows, sinks_H, block)
    return out_QHd


def suits_whole_rows(
    q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, blocks: BlockLists, sinks_H: Tensor | None = None
) -> bool:
    """Whether blocks of queries that attend to everything are best left to `block_sparse_attention`.

    The kernel for Hopper is as fast as whole attention, and does them beside all others. Not where it rounds
    keys and values: what stands at a document's end, as the question does, is to be computed in full. And not
    where there are few others: whole attention divides the keys of a block among multiprocessors.
    """
    hopper = hopper_for(q_QHd, k_TKd, v_TKd, sparse.BLOCK)
    if hopper is None or hopper.rounds(k_TKd, blocks, sinks_H):
        return False
    return blocks.counts.numel() >= multiprocessors(q_QHd.device)


def hopper_for(q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, block: int) -> Any | None:
    """The module of the kernel for Hopper where it serves these tensors and blocks, else None."""
    hopper = kernels_for(q_QHd, "blocks.hopper_attention")
    if hopper is None or block != sparse.BLOCK or not hopper.applies(q_QHd, k_TKd, v_TKd):
        return None
    return hopper


def _by_triton(
    kernels: Any,
    q_QHd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    out_QHd: Tensor,
    blocks: BlockLists,
    rows: int,
    sinks_H: Tensor | None,
    block: int,
    breached_HM2: Tensor | None = None,
) -> None:
    """Attend with the first `rows` blocks of queries, or those of them that are told to be breached."""
    queries, heads, head_dim = q_QHd.shape
    indices = blocks.counts if blocks.indices is None else blocks.indices  # the former are not looked at
    wide = q_QHd.dtype == torch.float32
    tried = not wide and q_QHd.is_cuda
    described = kernels.described(q_QHd, k_TKd, v_TKd, block, TILE) if tried else None
    sources = described or (q_QHd, k_TKd, v_TKd)
    tile, options = _tiles(head_dim, block, wide=wide, described=described is not None)
    programs = rows * heads if breached_HM2 is None else min(rows * heads, LOOKING)
    kernels.attention_kernel[(programs,)](
        *(sources[0], *q_QHd.stride()[:2], sources[1], *k_TKd.stride()[:2], sources[2], *v_TKd.stride()[:2]),
        *(out_QHd, *out_QHd.stride()[:2], indices, blocks.counts, sinks_H, breached_HM2, indices.shape[-1]),
        *(len(k_TKd), queries, blocks.before, rows, blocks.counts.shape[1], heads, k_TKd.shape[1]),
        score_scale(head_dim),
        LISTED=blocks.indices is not None,
        HEAD_DIM=head_dim,
        WIDTH=power_of_two(head_dim, 16),
        BLOCK=block,
        TILE=tile,
        DESCRIBED=described is not None,
        PRECISION="ieee" if wide else "tf32",
        num_warps=block // 16,
        **options,
    )


def _tiles(head_dim: int, block: int, *, wide: bool, described: bool) -> tuple[int, dict[str, int]]:
    """Keys that the attention kernel takes at a time, and how it is compiled.

    A block of queries and two tiles of keys and values are to fit a multiprocessor's shared memory: 192 KB of
    Hopper's 227 for heads of 256 dimensions in 16 bits, and half of that where tiles are loaded otherwise.
    """
    if head_dim > 128:
        if described:
            return TILE, {"num_stages": 2}
        return TILE // 4 if wide else TILE // 2, {"num_stages": 1}
    tile = TILE // 2 if wide else TILE
    if described and head_dim > 64 and block == sparse.BLOCK:
        # so that two programs fit a multiprocessor: one multiplies while the other is at its softmax
        return tile, {"num_stages": 2, "maxnreg": 128}
    return tile, {"num_stages": 2 if wide or head_dim > 64 else 3}


def _plain(
    q_QHd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    blocks: BlockLists,
    sinks_H: Tensor | None,
    block: int,
) -> Tensor:
    """A block of queries at a time, through SDPA over the keys that each head has gathered for it.

    The queries may be the first of those that blocks were chosen for.
    """
    assert blocks.indices is not None
    heads, head_dim = q_QHd.shape[1:]
    group = heads // k_TKd.shape[1]
    k_HTd, v_HTd = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (k_TKd, v_TKd))
    within = torch.arange(block, device=q_QHd.device)
    outputs = []
    for row, start in enumerate(range(0, len(q_QHd), block)):
        end = min(start + block, len(q_QHd))
        own_Q = blocks.before * block + torch.arange(start, end, device=q_QHd.device)
        most = int(blocks.counts[:, row].max())
        # entries behind a head's last block stand for one in the future: masked, and no place to read
        place_HC = (blocks.indices[:, row, :most, None] * block + within).flatten(1).long()
        seen_HQC = place_HC[:, None] <= own_Q[:, None]
        index_HCd = place_HC.clamp(max=len(k_TKd) - 1)[..., None].expand(-1, -1, head_dim)
        keys, values = (x.gather(1, index_HCd) for x in (k_HTd, v_HTd))
        queries = q_QHd[start:end].transpose(0, 1)
        if sinks_H is None:
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=seen_HQC)
        else:
            attended = attention_with_sinks(queries, keys, values, sinks_H, seen=seen_HQC)
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs) if outputs else q_QHd


def _kernels(x: Tensor) -> Any | None:
    """The module of kernels in Triton where they can run on this tensor, else None."""
    return kernels_for(x, "blocks.triton_attention")
