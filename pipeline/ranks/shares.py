"""Which part of a model a rank has: of heads, of columns of the FFN, of rows of the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]  # half-open


@dataclass(frozen=True)
class TensorPart:
    """Ranges of a tensor's rows (dimension 0) or columns (1), which a rank has end to end."""

    dim: int
    ranges: tuple[Range, ...]

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Of the part of a tensor of this shape."""
        return (*whole[: self.dim], self.size, *whole[self.dim + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """The part, of its own memory."""
        parts = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone()


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank of `count` has of all that is divided."""

    rank: int
    count: int

    def range(self, size: int) -> Range:
        """Of so many things in a row; where they do not divide, the last ranks have fewer."""
        each = -(-size // self.count)
        start = min(size, self.rank * each)
        return start, min(size, start + each)

    def kv_range(self, kv_heads: int) -> Range:
        """Of the key/value heads; where there are fewer than ranks, several ranks have the same one."""
        if kv_heads >= self.count:
            return self.range(kv_heads)
        head = self.rank * kv_heads // self.count
        return head, head + 1

    def kv_heads(self, kv_heads: int) -> int:
        start, stop = self.kv_range(kv_heads)
        return stop - start


def fits(count: int, heads: int, kv_heads: int, ffn: int) -> bool:
    """Whether `count` ranks have equally many heads, key/value heads that those read, and columns."""
    whole_groups = kv_heads % count == 0 or count % kv_heads == 0
    return heads % count == 0 and whole_groups and ffn % count == 0


def sizes_that_fit(heads: int, kv_heads: int, ffn: int) -> list[int]:
    return [count for count in range(1, heads + 1) if fits(count, heads, kv_heads, ffn)]
