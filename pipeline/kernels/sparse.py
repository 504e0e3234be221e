"""Block-sparse causal attention of long prompts: a block of queries attends to the blocks of keys it needs.

Which ones is judged by antidiagonals (XAttention, arXiv 2503.16428): of every `STRIDE` x `STRIDE` tile of the
attention map only the scores on one antidiagonal are computed, which meets every query and every key of the
tile once. Letters beside those of segments.py: M blocks of queries, N blocks of keys, R strided queries.
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
STRIDE = 16
SHORTEST = 4096  # tokens of a document, below which choosing costs what it saves
LEAST_WORK = 1 << 38  # squared tokens times width of all heads, likewise
CAPACITY = (
    1024  # blocks of keys that the choosing kernel has room for: more than 131,072 tokens compile it anew
)
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
    """The fewest blocks of keys that reach `mass` of each head's and query block's attention, as estimated.

    To them belong always the block itself, the one before it and the first, the attention sink; and all, for
    the last `WHOLE_ROWS`. Ties go to the earlier block.
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
    masses_HRN = _log_masses(q_THd, k_TKd)
    if kernels is None:
        return _plain_choice(masses_HRN, mass)
    indices = torch.empty(heads, blocks, blocks, dtype=torch.int32, device=q_THd.device)
    counts = torch.empty(heads, blocks, dtype=torch.int32, device=q_THd.device)
    capacity = power_of_two(blocks, CAPACITY)
    kernels.choice_kernel[(blocks, heads)](
        *(masses_HRN, masses_HRN.shape[1], blocks, indices, counts, mass),
        PER_BLOCK=BLOCK // STRIDE,
        WHOLE_ROWS=WHOLE_ROWS,
        CAPACITY=capacity,
        num_warps=min(16, max(4, capacity // 256)),
    )
    return BlockLists(indices, counts)


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
    """Query-key products, of each head, by which the blocks of a document are chosen.

    A strided query meets each strided key that is not in its future, by `STRIDE` products.
    """
    rows = -(-tokens // STRIDE)
    return STRIDE * rows * (rows + 1) // 2


def _ragged_pairs(tokens: int) -> int:
    """What is to be added to whole blocks of pairs, those of all rows but the last.

    The last block of queries, which may be short, must attend to all keys.
    """
    before = -(-tokens // BLOCK) - 1
    last = tokens - before * BLOCK
    within = before * BLOCK * (BLOCK + 1) // 2 + last * (last + 1) // 2
    return within + before * BLOCK * (last - BLOCK)  # the last one's blocks, less every other's own


def _plain_choice(masses_HRN: Tensor, mass: float) -> BlockLists:
    """See `choose_blocks`."""
    blocks = masses_HRN.shape[-1]
    ordered, order = _block_shares(masses_HRN).sort(dim=-1, descending=True, stable=True)
    wanted = (ordered.cumsum(-1) - ordered) < mass
    kept_HMN = torch.zeros_like(wanted).scatter_(-1, order, wanted)
    return _lists((kept_HMN & _past(blocks, masses_HRN.device)) | _near(blocks, masses_HRN.device))


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


def _block_shares(masses_HRN: Tensor) -> Tensor:
    """(H, M, N) of each block of queries' attention the share that each block of keys gets, as estimated."""
    per_block = BLOCK // STRIDE
    padded = pad(masses_HRN.softmax(-1), (0, 0, 0, -masses_HRN.shape[1] % per_block))
    shares_HMN = padded.unflatten(1, (-1, per_block)).sum(2)
    return shares_HMN / shares_HMN.sum(-1, keepdim=True)


def _log_masses(q_THd: Tensor, k_TKd: Tensor) -> Tensor:
    """(H, R, N) logarithm of the sum of exponentials of a strided query's scores, for each block of keys.

    -inf for blocks in its future. A strided query stands for `STRIDE` of them, and so does a strided key.
    """
    tokens, heads, head_dim = q_THd.shape
    rows, blocks = -(-tokens // STRIDE), -(-tokens // BLOCK)
    scale = 1 / (math.sqrt(head_dim) * STRIDE)
    kernels = _kernels(q_THd)
    if kernels is None:
        return _plain_log_masses(q_THd, k_TKd, scale, blocks)
    out_HRN = torch.empty(heads, rows, blocks, dtype=torch.float32, device=q_THd.device)
    wide = q_THd.dtype == torch.float32
    tile = 64 if wide else 128
    grid = (-(-blocks // (tile * STRIDE // BLOCK)), -(-rows // tile), heads)
    kernels.antidiagonal_kernel[grid](
        *(q_THd, *q_THd.stride()[:2], k_TKd, *k_TKd.stride()[:2], out_HRN, rows, blocks, tokens),
        *(heads // k_TKd.shape[1], scale / math.log(2)),
        STRIDE=STRIDE,
        HEAD_DIM=head_dim,
        WIDTH=power_of_two(head_dim, 16),
        BLOCK=BLOCK,
        TILE=tile,
        PRECISION="ieee" if wide else "tf32",
        num_warps=8,
        num_stages=3,
    )
    return out_HRN


def _plain_log_masses(q_THd: Tensor, k_TKd: Tensor, scale: float, blocks: int) -> Tensor:
    """The same a head at a time."""
    heads, group = q_THd.shape[1], q_THd.shape[1] // k_TKd.shape[1]
    # within a stride the keys are in reverse: products of whole rows are then sums over an antidiagonal
    q_HRD, k_KRD = (_strided(x, reverse) for x, reverse in ((q_THd, False), (k_TKd, True)))
    rows = q_HRD.shape[1]
    future_RR = torch.ones(rows, rows, dtype=torch.bool, device=q_THd.device).triu(1)
    parts = []
    for head in range(heads):
        scores_RR = (q_HRD[head] @ k_KRD[head // group].T).mul_(scale).masked_fill_(future_RR, -math.inf)
        padded = pad(scores_RR, (0, blocks * (BLOCK // STRIDE) - rows), value=-math.inf)
        parts.append(padded.unflatten(1, (blocks, -1)).logsumexp(-1))
    return torch.stack(parts)


def _strided(x_TNd: Tensor, reverse: bool) -> Tensor:
    """(N, R, STRIDE * d) float32: the tokens of a stride side by side, zeros where the last one is short."""
    padded = pad(x_TNd.float(), (0, 0, 0, 0, 0, -len(x_TNd) % STRIDE)).unflatten(0, (-1, STRIDE))
    ordered = padded.flip(1) if reverse else padded
    return ordered.permute(2, 0, 1, 3).flatten(2)


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
