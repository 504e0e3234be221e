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

from pipeline.kernels.segments import on_device
from pipeline.kernels.select import top_indices
from pipeline.kernels.sparse import best_products, has_kernels

QUERY_BLOCK = 64  # queries that choose together
AVERAGED = 4  # neighbouring queries that one stands for, in all stages but the last
AT_ONCE = 1 << 26  # numbers of keys that are gathered at once
PLACE_NUMBERS = 16  # that as many bytes take as the places and scores of a chunk


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


def blocks_at_once(heads: int, keys: int, numbers: int) -> int:
    """Blocks of queries for which so many keys of each head, of `numbers` each, are gathered at once."""
    return max(1, AT_ONCE // (heads * max(1, keys) * numbers))


def choose_chunks(
    q_BQHd: Tensor, k_TKd: Tensor, first: int, stops: list[int], stages: tuple[ChunkStage, ...]
) -> Tensor:
    """(H, B, C) ascending first keys of the chunks that each head of each block needs.

    They are taken of the keys from `first` on, up to `stops` of each block. Of blocks that have fewer the
    places left at the end hold `len(k_TKd)`. `first` and stops must be multiples of the last stage's chunk.
    Queries and keys are as they are to be compared.
    """
    blocks, _, heads, head_dim = q_BQHd.shape
    q_HBQd = q_BQHd.permute(2, 0, 1, 3)
    numbers = PLACE_NUMBERS if has_kernels(q_BQHd) else head_dim
    at_once = blocks_at_once(heads, most_chunks(stages, max(stops) - first), numbers)
    parts = [
        _choose(q_HBQd[:, each : each + at_once], k_TKd, first, stops[each : each + at_once], stages)
        for each in range(0, blocks, at_once)
    ]
    widest = max(part.shape[-1] for part in parts)
    missing = len(k_TKd)
    return torch.cat(
        [torch.nn.functional.pad(part, (0, widest - part.shape[-1]), value=missing) for part in parts], dim=1
    )


def _choose(
    q_HBQd: Tensor, k_TKd: Tensor, first: int, stops: list[int], stages: tuple[ChunkStage, ...]
) -> Tensor:
    """The same of as many blocks as there is memory for."""
    missing, device = len(k_TKd), q_HBQd.device
    stop_B1 = on_device(stops, device)[:, None]
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
            queries = q_HBQd if is_last else means_HBQd
            score_HBC = best_products(queries, k_TKd, start_HBC, stop_B1[:, 0], chunk)
            best_HBC = top_indices(score_HBC.flatten(0, 1), count).unflatten(0, score_HBC.shape[:2])
            start_HBC = start_HBC.gather(2, best_HBC)
    return start_HBC.sort(dim=-1).values
