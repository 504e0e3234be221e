"""Where each document begins and ends in a pack: documents lie end to end, without padding.

Shape letters used across the package: T tokens of the pack, B documents, H query heads, K key/value
heads, d head size, D model width, S slots of a cache buffer, L the longest document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor, without waiting for the device as `torch.tensor` there would."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """Tensors joined along their first dimension; one alone is returned itself, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def runs(starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """(sum of counts,) the numbers start, start + 1, ... of each run, one after the other."""
    total, before = sum(counts), accumulate(counts, initial=0)
    shifts = [start - passed for start, passed in zip(starts, before, strict=False)]
    shift_B, count_B = on_device(shifts, device), on_device(counts, device)
    return torch.arange(total, device=device) + torch.repeat_interleave(shift_B, count_B, output_size=total)


@dataclass(frozen=True)
class Segments:
    """Document lengths of a pack, known on the host, with their device tensors made once on first use."""

    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        return cls(tuple(lengths), torch.device(device))

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return Segments, (self.lengths, self.device)

    @property
    def total(self) -> int:
        return self.offsets[-1]

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """B + 1 boundaries, on the host."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32 boundaries on the device, as variable-length attention kernels want them."""
        return on_device(self.offsets, self.device, torch.int32)

    @cached_property
    def bounds(self) -> Tensor:
        """The same in int64."""
        return self.cu_seqlens.long()

    @cached_property
    def lengths_B(self) -> Tensor:
        """(B,) on the device."""
        return self.bounds.diff()

    @cached_property
    def document_T(self) -> Tensor:
        """(T,) which document each token belongs to."""
        documents = torch.arange(len(self.lengths), device=self.device)
        return torch.repeat_interleave(documents, self.lengths_B, output_size=self.total)

    @cached_property
    def index_in_document_T(self) -> Tensor:
        """(T,) each token's index within its document, counting the tokens that are left."""
        starts = self.bounds[:-1][self.document_T]
        return torch.arange(self.total, device=self.device) - starts

    def left(self, indices: Tensor, lengths: tuple[int, ...] | None = None) -> Segments:
        """Of the ascending tokens `indices`; the host needs their `lengths`, and waits if it must count."""
        return Segments.of(self.counts(indices).tolist() if lengths is None else lengths, self.device)

    def ranges(self) -> list[tuple[int, int]]:
        """Half-open token range of each document."""
        return list(zip(self.offsets[:-1], self.offsets[1:], strict=True))

    def last_indices(self) -> Tensor:
        """(B,) index of each document's last token."""
        return self.bounds[1:] - 1

    def ends(self, counts: Sequence[int]) -> Tensor:
        """(sum of counts,) indices of each document's last so many tokens, known without the device."""
        ends = zip(self.offsets[1:], counts, strict=True)
        return runs([end - count for end, count in ends], counts, self.device)

    def padded(self, values_T: Tensor, fill: float) -> Tensor:
        """Lay a value per token out as (B, L), short documents filled up with `fill`."""
        padded_BL = values_T.new_full((len(self), self.longest), fill)
        padded_BL[self.document_T, self.index_in_document_T] = values_T
        return padded_BL

    def counts(self, indices: Tensor) -> Tensor:
        """(B,) how many of the ascending token `indices` lie in each document; stays on the device."""
        return torch.searchsorted(indices, self.bounds).diff()
