"""Blocks of keys and values scattered in host memory, brought to their slots on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.kernels.modules import kernels_for
from pipeline.kernels.segments import on_device

PROGRAMS = 16  # few, as they mostly wait for the bus, and the other multiprocessors are to compute
WORDS = 2048  # 8-byte words that a program moves at a time


class BlockCopies:
    """The same scattered blocks of several tensors, such as keys and values of some layers.

    All are (rows, words) int64, rows contiguous. On a GPU the sources are pinned host memory, which one
    kernel reads over the bus: a copy a block would cost the host more time than the bus.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self.targets, self.sources = targets, sources
        self.words = targets[0].shape[1]
        kernels = kernels_for(targets[0], "triton_kernels")
        self._kernel = None if kernels is None else kernels.fetch_blocks_kernel
        if self._kernel is not None:
            addresses = [(to.data_ptr(), of.data_ptr()) for to, of in zip(targets, sources, strict=True)]
            self._pairs = on_device(addresses, targets[0].device)

    def fetch(self, slots_N: Tensor, blocks_N: Tensor) -> int:
        """Copy rows `blocks_N` of each source to rows `slots_N` of its target; returns the bytes.

        On the current stream; the sources must be kept until it is done.
        """
        if self._kernel is not None:
            counts = len(self.targets), len(slots_N), self.words
            self._kernel[(PROGRAMS,)](self._pairs, slots_N, blocks_N, *counts, WORDS=WORDS, num_warps=8)
        else:
            for target, source in zip(self.targets, self.sources, strict=True):
                rows = source[blocks_N.to(source.device)]
                target.index_copy_(0, slots_N, rows.to(target.device))
        return len(self.targets) * len(slots_N) * self.words * 8


def as_rows(values_TKd: Tensor, block: int) -> Tensor:
    """The same memory, of whole blocks of tokens, as (blocks, words) int64."""
    return values_TKd.view(len(values_TKd) // block, -1).view(torch.int64)
