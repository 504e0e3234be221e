"""Block-sparse causal attention of long prompts: a block of queries attends to the blocks of keys it needs.

Which ones is judged by the keys' means: each query meets the mean of each block's keys, as in FlashPrefill
(arXiv 2603.06199). `STRIDE` queries beside each other, whose attention is averaged, choose together, and a
block of queries has what any of them choose: what a few of them look for is not outvoted. Letters beside
those of segments.py: M blocks of queries, N blocks of keys, R strides of queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.modules import kernels_for, kernels_on, power_of_two
from pipeline.kernels.sdpa import attention_with_sinks
from pipeline.kernels.segments import Segments

BLOCK = 128  # tokens, of queries as of keys
STRIDE = 16  # queries that choose together
SHORTEST = 4096  # tokens of a document, below which choosing costs what it saves
LEAST_WORK = 1 << 38  # squared tokens times width of all heads, likewise
CAPACITY = (
    512  # blocks of keys that the choosing kernel has room for: more than 65,536 tokens compile it anew
)
SHARES_AT_ONCE = 1 << 27  # of the estimate that lie in memory: 512 MB
WHOLE_ROWS = 2  # last blocks of queries, where the question stands: they attend to everything


@dataclass(frozen=True)
class BlockLists:
    """Of one document: the blocks of keys that each head's blocks of queries attend to."""

    # (H, M, N) int32, ascending, of which the first `counts` are valid; the last is the row's own. None: the
    # first block, and before the row's own as many as `counts` says
    indices: Tensor | None
    counts: Tensor  # (H, M) int32, at least 1


@dataclass(frozen=True)
class SparsePrefill:
    """Causal attention within each document of a pack, of long ones block-sparse, of short ones whole."""

    attention: AttentionBackend
    segments: Segments
    width: int  # of all query heads together

    @cached_property
    def long(self) -> tuple[bool, ...]:
        """Of each document whether it is block-sparse."""
        device = self.segments.device
        least = self.attention.sparse_from
        return tuple(applies(length, self.width, device, least) for length in self.segments.lengths)

    @cached_property
    def last(self) -> tuple[list[slice], DecodeSlots]:
        """The tokens of long documents' last `WHOLE_ROWS` blocks, and what they attend to: everything."""
        ranges = [each for each, is_long in zip(self.segments.ranges(), self.long, strict=True) if is_long]
        lengths = [end - start for start, end in ranges]
        first = [start + BLOCK * max(0, -(-(end - start) // BLOCK) - WHOLE_ROWS) for start, end in ranges]
        asked = [slice(at, end) for at, (_, end) in zip(first, ranges, strict=True)]
        starts = [start for start, _ in ranges]
        counts = [rows.stop - rows.start for rows in asked]
        slots = DecodeSlots.of(starts, lengths, self.segments.total, self.segments.device, counts)
        return asked, slots

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, mass: float, sinks_H: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(T, H, d), and how many query-key pairs were computed of each document: (B,) mean over heads.

        None for all pairs. `mass` is the share of the attention that the blocks chosen are to reach, as
        estimated; with 0 nothing is estimated, and only those are attended to that always are. Sinks, see
        attention.py, change nothing of the choice.
        """
        if not any(self.long):
            attended_THd = self.attention.prefill(q_THd, k_TKd, v_TKd, self.segments, sinks_H=sinks_H)
            return attended_THd, None
        ranges = self.segments.ranges()
        short = [document for document, is_long in zip(ranges, self.long, strict=True) if not is_long]
        of_short = iter(self._whole(q_THd, k_TKd, v_TKd, short, sinks_H))
        outputs: list[Tensor] = []
        pairs: list[Tensor] = []
        for is_long, (start, end) in zip(self.long, ranges, strict=True):
            length = end - start
            if is_long:
                q, k, v = (x[start:end] for x in (q_THd, k_TKd, v_TKd))
                blocks = choose_blocks(q, k, mass)
                outputs.append(block_sparse_attention(q, k, v, blocks, WHOLE_ROWS, sinks_H))
                pairs.append(computed_pairs(blocks, length))
            else:
                outputs.append(next(of_short))
                whole = length * (length + 1) // 2
                pairs.append(torch.full((), whole, dtype=torch.int64, device=q_THd.device))
        attended_THd = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        asked, slots = self.last
        asking_QHd = torch.cat([q_THd[rows] for rows in asked])
        own_QHd = self.attention.decode(asking_QHd, k_TKd, v_TKd, slots, sinks_H)
        for rows, own in zip(asked, own_QHd.split(slots.known.queries), strict=True):
            attended_THd[rows] = own
        return attended_THd, torch.stack(pairs)

    def estimated_pairs(self, mass: float) -> tuple[int, ...]:
        """Query-key products, of all heads, by which `attend` chooses blocks, of each document."""
        if not 0 < mass < 1:
            return (0,) * len(self.segments)
        documents = zip(self.segments.lengths, self.long, strict=True)
        return tuple(estimated_pairs(length) if is_long else 0 for length, is_long in documents)

    def _whole(
        self,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        documents: list[tuple[int, int]],
        sinks_H: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Attention of some documents of the pack over all pairs, in one call."""
        if not documents:
            return ()
        lengths = [end - start for start, end in documents]
        q, k, v = (torch.cat([x[start:end] for start, end in documents]) for x in (q_THd, k_TKd, v_TKd))
        segments = Segments.of(lengths, q.device)
        return self.attention.prefill(q, k, v, segments, sinks_H=sinks_H).split(lengths)


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


def choose_blocks(q_THd: Tensor, k_TKd: Tensor, mass: float) -> BlockLists:
    """The blocks of keys that each head's blocks of queries need, to reach `mass` of attention by estimate.

    Of each stride of queries these are the fewest that reach it, and those with the same share as the least
    of them; a block of queries has what any of its strides needs. To them belong always the block itself, the
    one before it and the first, the attention sink; and all, for the last `WHOLE_ROWS`.
    """
    heads, blocks = q_THd.shape[1], -(-len(q_THd) // BLOCK)
    kernels = _kernels(q_THd)
    if mass >= 1:
        return _lists(_past(blocks, q_THd.device).expand(heads, -1, -1))
    if mass <= 0:
        near_MN = _near(blocks, q_THd.device)
        if kernels is None:
            return _lists(near_MN.expand(heads, -1, -1))
        return BlockLists(None, near_MN.sum(-1, dtype=torch.int32).repeat(heads, 1))
    if kernels is None:
        return _plain_choice(_plain_shares(q_THd, k_TKd), mass)
    return _choice_by_kernels(kernels, q_THd, k_TKd, mass)


def block_sparse_attention(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    blocks: BlockLists,
    left_out: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention of one document's queries to the keys in the blocks chosen, (T, H, d).

    What the last `left_out` blocks of queries get is not computed, and undefined.
    """
    tokens, heads, head_dim = q_THd.shape
    rows = max(0, blocks.counts.shape[1] - left_out)
    kernels = _kernels(q_THd)
    out_THd = torch.empty(tokens, heads, head_dim, dtype=q_THd.dtype, device=q_THd.device)
    if kernels is None:
        done = _plain(q_THd[: rows * BLOCK], k_TKd, v_TKd, blocks, sinks_H)
        out_THd[: len(done)] = done
        return out_THd
    if not rows:
        return out_THd
    indices = blocks.counts if blocks.indices is None else blocks.indices  # the former are not looked at
    wide = q_THd.dtype == torch.float32
    tile = 32 if wide else 64
    described = kernels.described(q_THd, k_TKd, v_TKd, BLOCK, tile) if q_THd.is_cuda and not wide else None
    sources = described or (q_THd, k_TKd, v_TKd)
    # so that two programs fit a multiprocessor: one multiplies while the other is at its softmax
    compact = {"maxnreg": 128} if described is not None and head_dim > 64 else {}
    kernels.attention_kernel[(rows * heads,)](
        *(sources[0], *q_THd.stride()[:2], sources[1], *k_TKd.stride()[:2], sources[2], *v_TKd.stride()[:2]),
        *(out_THd, *out_THd.stride()[:2], indices, blocks.counts, sinks_H, indices.shape[-1]),
        *(tokens, rows, heads, k_TKd.shape[1], 1 / (math.sqrt(head_dim) * math.log(2))),
        LISTED=blocks.indices is not None,
        HEAD_DIM=head_dim,
        WIDTH=power_of_two(head_dim, 16),
        BLOCK=BLOCK,
        TILE=tile,
        DESCRIBED=described is not None,
        PRECISION="ieee" if wide else "tf32",
        num_warps=8,
        num_stages=2 if wide or head_dim > 64 else 3,
        **compact,
    )
    return out_THd


def computed_pairs(blocks: BlockLists, tokens: int) -> Tensor:
    """Query-key pairs that attention computes, mean over the heads, as a whole number on the device."""
    heads = blocks.counts.shape[0]
    return (blocks.counts[:, :-1].sum() * BLOCK**2 + _ragged_pairs(tokens) * heads) // heads


@lru_cache(maxsize=4096)
def local_pairs(tokens: int) -> int:
    """The same with a mass of 0, on the host."""
    rows = -(-tokens // BLOCK)
    counts = [row + 1 if row >= rows - WHOLE_ROWS else min(row + 1, 3) for row in range(rows - 1)]
    return sum(counts) * BLOCK**2 + _ragged_pairs(tokens)


def estimated_pairs(tokens: int) -> int:
    """Products of queries and means of keys, of each head, by which the blocks of a document are chosen.

    A query meets the mean of each block that is not in its future.
    """
    before = -(-tokens // BLOCK) - 1
    return BLOCK * before * (before + 1) // 2 + (tokens - before * BLOCK) * (before + 1)


def _ragged_pairs(tokens: int) -> int:
    """What is to be added to whole blocks of pairs, those of all rows but the last.

    The last block of queries, which may be short, must attend to all keys.
    """
    before = -(-tokens // BLOCK) - 1
    last = tokens - before * BLOCK
    within = before * BLOCK * (BLOCK + 1) // 2 + last * (last + 1) // 2
    return within + before * BLOCK * (last - BLOCK)  # the last one's blocks, less every other's own


def _choice_by_kernels(kernels: Any, q_THd: Tensor, k_TKd: Tensor, mass: float) -> BlockLists:
    """See `choose_blocks`; some blocks of queries at a time, so that the estimate takes little room."""
    (tokens, heads, head_dim), kv_heads, device = q_THd.shape, k_TKd.shape[1], q_THd.device
    blocks, per_block = -(-tokens // BLOCK), BLOCK // STRIDE
    sizes = {"HEAD_DIM": head_dim, "WIDTH": power_of_two(head_dim, 16), "BLOCK": BLOCK}
    means_KNd = torch.empty(kv_heads, blocks, head_dim, dtype=k_TKd.dtype, device=device)
    kernels.mean_keys_kernel[(blocks, kv_heads)](
        *(k_TKd, *k_TKd.stride()[:2], means_KNd, blocks, tokens), **sizes, num_warps=4
    )
    indices = torch.empty(heads, blocks, blocks, dtype=torch.int32, device=device)
    counts = torch.empty(heads, blocks, dtype=torch.int32, device=device)
    capacity = power_of_two(blocks, CAPACITY)
    at_once = max(1, min(blocks, SHARES_AT_ONCE // (heads * per_block * blocks)))
    shares_HRN = torch.empty(heads, at_once * per_block, blocks, dtype=_shares_dtype(q_THd), device=device)
    wide = q_THd.dtype == torch.float32
    for first in range(0, blocks, at_once):
        grid = (min(at_once, blocks - first), heads)
        kernels.estimate_kernel[grid](
            *(q_THd, *q_THd.stride()[:2], means_KNd, shares_HRN, shares_HRN.shape[1], blocks, first, tokens),
            *(heads // kv_heads, 1 / (math.sqrt(head_dim) * math.log(2))),
            **sizes,
            STRIDE=STRIDE,
            COLUMNS=32 if wide else 64,
            PRECISION="ieee" if wide else "tf32",
            num_warps=4,
            num_stages=2,
        )
        kernels.choice_kernel[grid](
            *(shares_HRN, shares_HRN.shape[1], blocks, first, tokens, indices, counts, mass),
            STRIDE=STRIDE,
            BLOCK=BLOCK,
            WHOLE_ROWS=WHOLE_ROWS,
            CAPACITY=capacity,
            num_warps=capacity // 256,
        )
    return BlockLists(indices, counts)


def _plain_choice(shares_HRN: Tensor, mass: float) -> BlockLists:
    """See `choose_blocks`."""
    shares_HRN, blocks = shares_HRN.float(), shares_HRN.shape[-1]
    ordered = shares_HRN.sort(dim=-1, descending=True).values
    wanted = (ordered.cumsum(-1) - ordered) < mass
    least_HR1 = ordered.masked_fill(~wanted, 1).amin(-1, keepdim=True)
    kept_HRN = pad(shares_HRN >= least_HR1, (0, 0, 0, -shares_HRN.shape[1] % (BLOCK // STRIDE)))
    kept_HMN = kept_HRN.unflatten(1, (blocks, -1)).any(2)
    return _lists((kept_HMN & _past(blocks, shares_HRN.device)) | _near(blocks, shares_HRN.device))


def _past(blocks: int, device: torch.device) -> Tensor:
    """(M, N) the blocks of keys that a block of queries can attend to."""
    return torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril()


def _near(blocks: int, device: torch.device) -> Tensor:
    """(M, N) the blocks of keys that a block of queries always attends to."""
    past_MN = _past(blocks, device)
    near_MN = past_MN & ~past_MN.tril(-2)
    near_MN[:, 0] = True
    near_MN[-WHOLE_ROWS:] = past_MN[-WHOLE_ROWS:]
    return near_MN


def _plain_shares(q_THd: Tensor, k_TKd: Tensor) -> Tensor:
    """(H, R, N) of a stride's attention the share that each block gets whose mean stands for all of its keys.

    0 for blocks in the future.
    """
    tokens, heads, head_dim = q_THd.shape
    blocks, group = -(-tokens // BLOCK), heads // k_TKd.shape[1]
    of_block_N = torch.full((blocks,), BLOCK, device=q_THd.device)
    of_block_N[-1] = tokens - (blocks - 1) * BLOCK
    sums_NKd = pad(k_TKd.float(), (0, 0, 0, 0, 0, -tokens % BLOCK)).unflatten(0, (blocks, BLOCK)).sum(1)
    means_NKd = (sums_NKd / of_block_N[:, None, None]).to(k_TKd.dtype).float()
    own_T = torch.arange(tokens, device=q_THd.device) // BLOCK
    future_TN = torch.arange(blocks, device=q_THd.device) > own_T[:, None]
    of_stride_R1 = (tokens - torch.arange(0, tokens, STRIDE, device=q_THd.device)).clamp(max=STRIDE)[:, None]
    parts = []
    for head in range(heads):
        scores_TN = q_THd[:, head].float() @ means_NKd[:, head // group].T / math.sqrt(head_dim)
        shares_TN = scores_TN.masked_fill_(future_TN, -math.inf).softmax(-1)
        sums_RN = pad(shares_TN, (0, 0, 0, -tokens % STRIDE)).unflatten(0, (-1, STRIDE)).sum(1)
        parts.append(sums_RN / of_stride_R1)
    return torch.stack(parts).to(_shares_dtype(q_THd))


def _shares_dtype(q_THd: Tensor) -> torch.dtype:
    """In which shares are compared: to the third digit where queries are known to no more."""
    return torch.float32 if q_THd.dtype.itemsize > 2 else torch.bfloat16


def _lists(kept_HMN: Tensor) -> BlockLists:
    blocks = kept_HMN.shape[-1]
    places_N = torch.arange(blocks, device=kept_HMN.device, dtype=torch.int32)
    indices = places_N.masked_fill(~kept_HMN, blocks).sort(dim=-1).values
    return BlockLists(indices, kept_HMN.sum(-1, dtype=torch.int32))


def _plain(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, blocks: BlockLists, sinks_H: Tensor | None) -> Tensor:
    """A block of queries at a time, through SDPA over the keys that each head has gathered for it.

    The queries may be the first of the document's.
    """
    assert blocks.indices is not None
    heads, head_dim = q_THd.shape[1:]
    group = heads // k_TKd.shape[1]
    k_HTd, v_HTd = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (k_TKd, v_TKd))
    within = torch.arange(BLOCK, device=q_THd.device)
    outputs = []
    for row, start in enumerate(range(0, len(q_THd), BLOCK)):
        end = min(start + BLOCK, len(q_THd))
        most = int(blocks.counts[:, row].max())
        # entries behind a head's last block stand for one in the future: masked, and no place to read
        place_HC = (blocks.indices[:, row, :most, None] * BLOCK + within).flatten(1).long()
        seen_HQC = place_HC[:, None] <= torch.arange(start, end, device=q_THd.device)[:, None]
        index_HCd = place_HC.clamp(max=len(k_TKd) - 1)[..., None].expand(-1, -1, head_dim)
        keys, values = (x.gather(1, index_HCd) for x in (k_HTd, v_HTd))
        queries = q_THd[start:end].transpose(0, 1)
        if sinks_H is None:
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=seen_HQC)
        else:
            attended = attention_with_sinks(queries, keys, values, sinks_H, seen=seen_HQC)
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs) if outputs else q_THd


def _kernels(x: Tensor) -> Any | None:
    """The module of Triton kernels where they can run on this tensor, else None."""
    return kernels_for(x, "triton_sparse")
