"""Block-sparse causal attention of long prompts: a block of queries attends to the blocks of keys it needs.

Which ones is judged by the keys' means: each query meets the mean of each block's keys, as in FlashPrefill
(arXiv 2603.06199). `STRIDE` queries beside each other, whose attention is averaged, choose together, and a
block of queries has what any of them choose: what a few of them look for is not outvoted. The attention to
what is chosen here is in `blocks/`. Letters beside those of segments.py: M blocks of queries, N blocks of
keys, R strides of queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.kernels.modules import kernels_for, kernels_on, power_of_two

BLOCK = 128  # tokens, of queries as of keys
STRIDE = 16  # queries that choose together
OTHERS_FROM = 65_536  # tokens of a document in which only every other query chooses
SHORTEST = 4096  # tokens of a document, below which choosing costs what it saves
LEAST_WORK = 1 << 38  # squared tokens times width of all heads, likewise
CAPACITY = (
    512  # blocks of keys that the choosing kernel has room for: more than 65,536 tokens compile it anew
)
SHARES_AT_ONCE = 1 << 27  # of the estimate that lie in memory: 512 MB
CHOSEN_AT_ONCE = 1 << 15  # of them that a program of the choosing kernel holds in registers
FEWEST_QUERIES = 16  # that a program of the kernels multiplies
WHOLE_ROWS = 2  # last blocks of queries, where the question stands: they attend to everything


@dataclass(frozen=True)
class BlockLists:
    """Of one document, or a piece of it: the blocks of keys that each head's blocks of queries attend to."""

    # (H, M, N) int32, ascending, of which the first `counts` are valid; the last is the row's own. None: the
    # first block, and before the row's own as many as `counts` says
    indices: Tensor | None
    counts: Tensor  # (H, M) int32, at least 1
    before: int = 0  # blocks of queries that stand before these in the document


def applies(length: int, width: int, device: torch.device, sparse_from: int | None = None) -> bool:
    """Whether a document of so many tokens is block-sparse; see `AttentionBackend` for `sparse_from`."""
    least = shortest(width, device, sparse_from)
    return least is not None and length >= least


def shortest(width: int, device: torch.device, sparse_from: int | None = None) -> int | None:
    """Tokens from which on a document is block-sparse: `sparse_from`, or else where that saves time.

    None where it never does, which is so without kernels: plain torch takes longer for some blocks than whole
    attention for all.
    """
    if sparse_from is not None:
        return sparse_from
    if not kernels_on(device.type):
        return None
    return max(SHORTEST, math.isqrt(-(-LEAST_WORK // width) - 1) + 1)


def first_choosing(masses: Sequence[float | None]) -> int | None:
    """The first layer that chooses blocks, of the masses of all; None: attention is whole or local."""
    return next((layer for layer, mass in enumerate(masses) if mass), None)


def choose_blocks(q_QHd: Tensor, k_TKd: Tensor, mass: float, before: int = 0) -> BlockLists:
    """The blocks of keys that each head's blocks of queries need, to reach `mass` of attention by estimate.

    Of each stride of queries these are the fewest that reach it, and those with the same share as the least
    of them; a block of queries has what any of its strides needs. To them belong always the block itself, the
    one before it and the first, the attention sink; and all, for the last `WHOLE_ROWS` of the document.

    The keys are the whole document's, the queries those from its block `before` on, as many as there are.
    """
    heads, blocks = q_QHd.shape[1], -(-len(k_TKd) // BLOCK)
    rows = slice(before, before - (-len(q_QHd) // BLOCK))
    kernels = _kernels(q_QHd)
    if mass >= 1:
        return _lists(_past(rows, blocks, q_QHd.device).expand(heads, -1, -1), before)
    if mass <= 0:
        if kernels is None:
            return _lists(_near(rows, blocks, q_QHd.device).expand(heads, -1, -1), before)
        row_M = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=q_QHd.device) + 1
        near_M = torch.where(row_M > blocks - WHOLE_ROWS, row_M, row_M.clamp(max=3))
        return BlockLists(None, near_M.repeat(heads, 1), before)
    if kernels is None:
        kept_HMN = _plain_choice(_plain_shares(q_QHd, k_TKd, before), mass) & _past(
            rows, blocks, q_QHd.device
        )
        return _lists(kept_HMN | _near(rows, blocks, q_QHd.device), before)
    return _choice_by_kernels(kernels, q_QHd, k_TKd, mass, before)


def listed_blocks(blocks: BlockLists, tokens: int) -> Tensor:
    """How many blocks of keys there are for all blocks of queries but the document's last, of all heads."""
    is_last = blocks.before + blocks.counts.shape[1] == -(-tokens // BLOCK)
    return (blocks.counts[:, :-1] if is_last else blocks.counts).sum()


def estimated_pairs(tokens: int) -> int:
    """Products of queries and means of keys, of each head, by which the blocks of a document are chosen.

    A query that chooses meets the mean of each block that is not in its future.
    """
    before, step = -(-tokens // BLOCK) - 1, choosing_step(tokens)
    return BLOCK // step * before * (before + 1) // 2 - (before * BLOCK - tokens) // step * (before + 1)


def choosing_step(tokens: int) -> int:
    """Which queries of a document choose blocks: the first of so many that stand side by side."""
    return 2 if tokens >= OTHERS_FROM else 1


def ragged_pairs(tokens: int) -> int:
    """What is to be added to whole blocks of pairs, those of all rows but the last.

    The last block of queries, which may be short, must attend to all keys.
    """
    before = -(-tokens // BLOCK) - 1
    last = tokens - before * BLOCK
    within = before * BLOCK * (BLOCK + 1) // 2 + last * (last + 1) // 2
    return within + before * BLOCK * (last - BLOCK)  # the last one's blocks, less every other's own


def _choice_by_kernels(kernels: Any, q_QHd: Tensor, k_TKd: Tensor, mass: float, before: int) -> BlockLists:
    """See `choose_blocks`; some blocks of queries at a time, so that the estimate takes little room."""
    (tokens, kv_heads, head_dim), heads, device = k_TKd.shape, q_QHd.shape[1], q_QHd.device
    blocks, rows, per_block = -(-tokens // BLOCK), -(-len(q_QHd) // BLOCK), BLOCK // STRIDE
    sizes = {"HEAD_DIM": head_dim, "WIDTH": power_of_two(head_dim, 16), "BLOCK": BLOCK}
    means_KNd = torch.empty(kv_heads, blocks, head_dim, dtype=k_TKd.dtype, device=device)
    kernels.mean_keys_kernel[(blocks, kv_heads)](
        *(k_TKd, *k_TKd.stride()[:2], means_KNd, blocks, tokens), **sizes, num_warps=4
    )
    indices = torch.empty(heads, rows, blocks, dtype=torch.int32, device=device)
    counts = torch.empty(heads, rows, dtype=torch.int32, device=device)
    capacity = power_of_two(blocks, CAPACITY)
    strides = max(1, min(per_block, CHOSEN_AT_ONCE // capacity))
    at_once = max(1, min(rows, SHARES_AT_ONCE // (heads * per_block * blocks)))
    shares_HRN = torch.empty(heads, at_once * per_block, blocks, dtype=_shares_dtype(q_QHd), device=device)
    wide = q_QHd.dtype == torch.float32
    for first in range(0, rows, at_once):
        grid = (min(at_once, rows - first), heads)
        kernels.estimate_kernel[grid](
            *(q_QHd, *q_QHd.stride()[:2], means_KNd, shares_HRN, shares_HRN.shape[1], blocks, before, first),
            *(tokens, heads // kv_heads, score_scale(head_dim)),
            **sizes,
            STRIDE=STRIDE,
            STEP=choosing_step(tokens),
            COLUMNS=32 if wide or head_dim > 128 else 64,
            PRECISION="ieee" if wide else "tf32",
            num_warps=4,
            num_stages=1 if head_dim > 128 else 2,
        )
        kernels.choice_kernel[grid](
            *(shares_HRN, shares_HRN.shape[1], blocks, before, first, rows, tokens, indices, counts, mass),
            STRIDE=STRIDE,
            BLOCK=BLOCK,
            WHOLE_ROWS=WHOLE_ROWS,
            CAPACITY=capacity,
            STRIDES=strides,
            num_warps=max(2, capacity * strides // 2048),
        )
    return BlockLists(indices, counts, before)


def _plain_choice(shares_HRN: Tensor, mass: float) -> Tensor:
    """(H, M, N) the blocks that any stride of a block of queries wants, see `choose_blocks`."""
    shares_HRN = shares_HRN.float()
    ordered = shares_HRN.sort(dim=-1, descending=True).values
    wanted = (ordered.cumsum(-1) - ordered) < mass
    least_HR1 = ordered.masked_fill(~wanted, 1).amin(-1, keepdim=True)
    kept_HRN = pad(shares_HRN >= least_HR1, (0, 0, 0, -shares_HRN.shape[1] % (BLOCK // STRIDE)))
    return kept_HRN.unflatten(1, (-1, BLOCK // STRIDE)).any(2)


def _past(rows: slice, blocks: int, device: torch.device) -> Tensor:
    """(M, N) the blocks of keys that some blocks of queries can attend to."""
    return torch.arange(rows.start, rows.stop, device=device)[:, None] >= torch.arange(blocks, device=device)


def _near(rows: slice, blocks: int, device: torch.device) -> Tensor:
    """(M, N) the blocks of keys that they always attend to."""
    row_M1 = torch.arange(rows.start, rows.stop, device=device)[:, None]
    block_N = torch.arange(blocks, device=device)
    always_MN = (block_N == 0) | (block_N >= row_M1 - 1) | (row_M1 >= blocks - WHOLE_ROWS)
    return always_MN & (block_N <= row_M1)


def _plain_shares(q_QHd: Tensor, k_TKd: Tensor, before: int = 0) -> Tensor:
    """(H, R, N) of a stride's attention the share that each block gets whose mean stands for all of its keys.

    0 for blocks in the future. Of `before` see `choose_blocks`.
    """
    (queries, heads, head_dim), tokens = q_QHd.shape, len(k_TKd)
    blocks, group, step = -(-tokens // BLOCK), heads // k_TKd.shape[1], choosing_step(tokens)
    of_block_N = torch.full((blocks,), BLOCK, device=q_QHd.device)
    of_block_N[-1] = tokens - (blocks - 1) * BLOCK
    sums_NKd = pad(k_TKd.float(), (0, 0, 0, 0, 0, -tokens % BLOCK)).unflatten(0, (blocks, BLOCK)).sum(1)
    means_NKd = (sums_NKd / of_block_N[:, None, None]).to(k_TKd.dtype).float()
    place_Q = torch.arange(0, queries, step, device=q_QHd.device)  # of those that choose
    future_QN = torch.arange(blocks, device=q_QHd.device) > before + place_Q[:, None] // BLOCK
    choosing = STRIDE // step
    of_stride_R1 = (len(place_Q) - torch.arange(0, len(place_Q), choosing, device=q_QHd.device))[:, None]
    parts = []
    for head in range(heads):
        scores_QN = q_QHd[place_Q, head].float() @ means_NKd[:, head // group].T / math.sqrt(head_dim)
        shares_QN = scores_QN.masked_fill_(future_QN, -math.inf).softmax(-1)
        sums_RN = pad(shares_QN, (0, 0, 0, -len(place_Q) % choosing)).unflatten(0, (-1, choosing)).sum(1)
        parts.append(sums_RN / of_stride_R1.clamp(max=choosing))
    return torch.stack(parts).to(_shares_dtype(q_QHd))


def _shares_dtype(q_QHd: Tensor) -> torch.dtype:
    """In which shares are compared: to the third digit where queries are known to no more."""
    return torch.float32 if q_QHd.dtype.itemsize > 2 else torch.bfloat16


def _lists(kept_HMN: Tensor, before: int = 0) -> BlockLists:
    blocks = kept_HMN.shape[-1]
    places_N = torch.arange(blocks, device=kept_HMN.device, dtype=torch.int32)
    indices = places_N.masked_fill(~kept_HMN, blocks).sort(dim=-1).values
    return BlockLists(indices, kept_HMN.sum(-1, dtype=torch.int32), before)


def best_products(q_HBQd: Tensor, k_TKd: Tensor, start_HBC: Tensor, stop_B: Tensor, chunk: int) -> Tensor:
    """(H, B, C) the best product that a block of queries sees in a chunk of keys on the way down to one key.

    A chunk begins at `start_HBC` and has `chunk` keys, or ends at its block's stop. It is halved until one
    key is left: a half is stood for by the key in its middle, and that half goes on whose key has the larger
    product with any of the queries. Chunks that begin at the stop or behind it have minus infinity.
    """
    kernels, steps = _kernels(q_HBQd), max(1, (chunk - 1).bit_length())
    if kernels is None:
        return _plain_products(q_HBQd, k_TKd, start_HBC, stop_B[:, None], chunk, steps)
    if q_HBQd.shape[2] < FEWEST_QUERIES:
        q_HBQd = q_HBQd.repeat(1, 1, -(-FEWEST_QUERIES // q_HBQd.shape[2]), 1)
    (heads, blocks, queries, head_dim), chunks = q_HBQd.shape, start_HBC.shape[-1]
    best_HBC = torch.empty(start_HBC.shape, dtype=torch.float32, device=q_HBQd.device)
    wide = q_HBQd.dtype == torch.float32
    tile = 32 if wide else 64
    kernels.descent_kernel[(-(-chunks // tile), blocks, heads)](
        *(q_HBQd.contiguous(), k_TKd, *k_TKd.stride()[:2], start_HBC.int().contiguous(), stop_B.int()),
        *(best_HBC, chunks, blocks, heads // k_TKd.shape[1]),
        QUERIES=queries,
        CHUNK=chunk,
        STEPS=steps,
        HEAD_DIM=head_dim,
        WIDTH=power_of_two(head_dim, 16),
        TILE=tile,
        PRECISION="ieee" if wide else "tf32",
        num_warps=4,
    )
    return best_HBC


def _plain_products(
    q_HBQd: Tensor, k_TKd: Tensor, start_HBC: Tensor, stop_B1: Tensor, chunk: int, steps: int
) -> Tensor:
    """See `best_products`."""
    k_KTd, group = k_TKd.transpose(0, 1), len(q_HBQd) // k_TKd.shape[1]
    head_H11 = torch.arange(len(q_HBQd), device=q_HBQd.device)[:, None, None] // group
    wide = torch.promote_types(q_HBQd.dtype, torch.float32)

    def best(place_HBC: Tensor) -> Tensor:
        k_HBCd = k_KTd[head_H11, place_HBC.clamp(max=len(k_TKd) - 1)]
        return (q_HBQd.to(wide) @ k_HBCd.to(wide).transpose(2, 3)).amax(2)

    low, high = start_HBC, torch.minimum(start_HBC + chunk, stop_B1)
    best_HBC = torch.full(low.shape, -math.inf, dtype=wide, device=low.device)
    for _ in range(steps):
        middle = (low + high) // 2
        left, right = best((low + middle) // 2), best((middle + high) // 2)
        best_HBC = torch.maximum(best_HBC, torch.maximum(left, right))
        is_right = right > left
        low, high = (
            torch.where(is_right, middle, low),
            torch.where(is_right, high, torch.maximum(middle, low + 1)),
        )
    return best_HBC.masked_fill_(start_HBC >= stop_B1, -math.inf)


def score_scale(head_dim: int) -> float:
    """By which products of queries and keys become scores, for a softmax in base 2."""
    return 1 / (math.sqrt(head_dim) * math.log(2))


def has_kernels(x: Tensor) -> bool:
    """Whether attention with blocks runs by kernels on this tensor."""
    return _kernels(x) is not None


def _kernels(x: Tensor) -> Any | None:
    """The module of Triton kernels where they can run on this tensor, else None."""
    return kernels_for(x, "triton_sparse")
