"""Kernels in Triton, each the fast version of a function beside it that needs only torch.

Imported only where Triton is: importing this module fails without it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetch_blocks_kernel(pairs, slots, blocks, copies, count, words, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """See `swap.fetch_blocks`: each program takes every n-th piece of all blocks of all copies.

    `pairs` holds the addresses of each copy's target and source.
    """
    pieces = (words + WORDS - 1) // WORDS
    for i in range(tl.program_id(0), copies * count * pieces, tl.num_programs(0)):
        pair = pairs + i // (count * pieces) * 2
        target = tl.load(pair).to(tl.pointer_type(tl.int64))
        source = tl.load(pair + 1).to(tl.pointer_type(tl.int64))
        place = i // pieces % count
        at = (i % pieces) * WORDS + tl.arange(0, WORDS)
        inside = at < words
        moved = tl.load(source + tl.load(blocks + place) * words + at, mask=inside)
        tl.store(target + tl.load(slots + place) * words + at, moved, mask=inside)
