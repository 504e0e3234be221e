"""Which keys a block of queries needs, found by halving: the hierarchical choice of HiP (arXiv 2502.08910).

A stage cuts the keys that are left to it into chunks. In each chunk it goes down by halves: a half is stood
for by the key in its middle, and the half whose key has the larger product with any of the block's queries
goes on. The best product on the way is the chunk's score, and the chunks of the highest scores go to the
next stage. Letters beside those of segments.py: B blocks of queries, Q queries of a block, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.select import top_indices

QUERY_BLOCK = 64  # queries that choose together
AVERAGED = 4  # neighbouring queries that one stands for, in all stages but the last
AT_ONCE = 1 << 26  # numbers of keys that are gathered at once


class ChunkStage(NamedTuple):
    """Chunks of so many keys, of which those go on that hold `keep` keys."""

    chunk: int
    keep: int


def stages_of(chunk: int, keep: int) -> tuple[ChunkStage, ...]:
    """Those of the paper, but that no chunk is smaller than `chunk`, and for `keep` keys in the end.

    A stage keeps no less than the one after it needs, of which one chunk may be cut.
    """
    small = max(32, chunk)
    second = max(8192, keep)
    return ChunkStage(256, max(32768, second + 256)), ChunkStage(small, second), ChunkStage(chunk, keep)


def most_chunks(stages: Sequence[ChunkStage], keys: int) -> int:
    """Chunks that any stage has before it, of so many keys."""
    most, left = 1, max(0, keys)
    for stage in stages:
        most, left = max(most, -(-left // stage.chunk)), min(left, stage.keep)
    return most


def blocks_at_once(heads: int, keys: int, head_dim: int) -> int:
    """Blocks of queries for which so many keys of each head are gathered at once."""
    return max(1, AT_ONCE // (heads * max(1, keys) * head_dim))


def choose_chunks(
    q_BQHd: Tensor, k_TKd: Tensor, first: int, stops: list[int], stages: tuple[ChunkStage, ...]
) -> Tensor:
    """(H, B, C) ascending first keys of the chunks that each head of each block needs.

    They are taken of the keys from `first` on, up to `stops` of each block. Of blocks that have fewer the
    places left at the end hold `len(k_TKd)`. `first` and stops must be multiples of the last stage's chunk.
    Queries and keys are as they are to be compared.
    """
    blocks, _, heads, head_dim = q_BQHd.shape
    q_HBQd, k_KTd = q_BQHd.permute(2, 0, 1, 3), k_TKd.transpose(0, 1)
    at_once = blocks_at_once(heads, most_chunks(stages, max(stops) - first), head_dim)
    parts = [
        _choose(q_HBQd[:, each : each + at_once], k_KTd, first, stops[each : each + at_once], stages)
        for each in range(0, blocks, at_once)
    ]
    widest = max(part.shape[-1] for part in parts)
    missing = len(k_TKd)
    return torch.cat(
        [torch.nn.functional.pad(part, (0, widest - part.shape[-1]), value=missing) for part in parts], dim=1
    )


def _choose(
    q_HBQd: Tensor, k_KTd: Tensor, first: int, stops: list[int], stages: tuple[ChunkStage, ...]
) -> Tensor:
    """The same of as many blocks as there is memory for."""
    missing, device = k_KTd.shape[1], q_HBQd.device
    stop_B1 = torch.tensor(stops, device=device)[:, None]
    chunk = stages[0].chunk
    start_C = torch.arange(first, max(*stops, first + 1), chunk, device=device)
    start_HBC = start_C.expand(len(q_HBQd), len(stops), -1)
    means_HBQd = q_HBQd.unflatten(2, (-1, AVERAGED)).mean(3)
    for number, stage in enumerate(stages):
        is_last = number + 1 == len(stages)
        if stage.chunk < chunk:
            steps_N = torch.arange(0, chunk, stage.chunk, device=device)
            # a cut chunk's last parts may lie behind the stop: then they are nobody's
            start_HBC = (start_HBC[..., None] + steps_N).flatten(2)
        chunk = stage.chunk
        start_HBC = start_HBC.masked_fill(start_HBC >= stop_B1, missing)
        count = stage.keep // chunk
        if start_HBC.shape[-1] > count:
            end_HBC = torch.minimum(start_HBC + chunk, stop_B1)
            queries = q_HBQd if is_last else means_HBQd
            score_HBC = _best_products(queries, k_KTd, start_HBC, end_HBC, chunk)
            score_HBC = score_HBC.masked_fill(start_HBC >= missing, float("-inf"))
            best_HBC = top_indices(score_HBC.flatten(0, 1), count).unflatten(0, score_HBC.shape[:2])
            start_HBC = start_HBC.gather(2, best_HBC)
    return start_HBC.sort(dim=-1).values


def _best_products(q_HBQd: Tensor, k_KTd: Tensor, start_HBC: Tensor, end_HBC: Tensor, chunk: int) -> Tensor:
    """(H, B, C) the best product that is seen in a chunk on the way down to one key."""
    low, high = start_HBC, end_HBC
    best_HBC = torch.full(low.shape, float("-inf"), dtype=torch.float32, device=low.device)
    if q_HBQd.dtype == torch.float64:
        best_HBC = best_HBC.double()
    for _ in range(max(1, (chunk - 1).bit_length())):
        middle = (low + high) // 2
        left, right = (
            _products(q_HBQd, k_KTd, place) for place in ((low + middle) // 2, (middle + high) // 2)
        )
        best_HBC = torch.maximum(best_HBC, torch.maximum(left, right))
        goes_right = right > left
        low, high = (
            torch.where(goes_right, middle, low),
            torch.where(goes_right, high, torch.maximum(middle, low + 1)),
        )
    return best_HBC


def _products(q_HBQd: Tensor, k_KTd: Tensor, place_HBC: Tensor) -> Tensor:
    """(H, B, C) of the key at each place the largest product with any of the queries."""
    heads, kv_heads = len(q_HBQd), len(k_KTd)
    head_H11 = torch.arange(heads, device=q_HBQd.device)[:, None, None] // (heads // kv_heads)
    k_HBCd = k_KTd[head_H11, place_HBC.clamp(max=k_KTd.shape[1] - 1)]
    return products(q_HBQd, k_HBCd).amax(2)


def products(q_HBQd: Tensor, k_HBCd: Tensor) -> Tensor:
    """(H, B, Q, C) in float32, or in float64 of such."""
    k_HBdC = k_HBCd.transpose(2, 3)
    if q_HBQd.dtype.itemsize > 2:
        return q_HBQd @ k_HBdC
    if not q_HBQd.is_cuda:
        return q_HBQd.float() @ k_HBdC.float()
    flat = torch.bmm(q_HBQd.flatten(0, 1), k_HBdC.flatten(0, 1), out_dtype=torch.float32)
    return flat.unflatten(0, q_HBQd.shape[:2])
