"""Which slots of keys and values the queries of a decode step attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pipeline.kernels.decoding import Fp8Scales, Ranges
from pipeline.kernels.segments import Segments, on_device


class HostSlots(NamedTuple):
    """What the host knows of `DecodeSlots`, by document."""

    starts: tuple[int, ...]
    used: list[int]
    queries: tuple[int, ...]

    def within(self, window: int) -> HostSlots:
        """See `DecodeSlots.within`."""
        used = [min(n, window + asked - 1) for n, asked in zip(self.used, self.queries, strict=True)]
        moved = zip(self.starts, self.used, used, strict=True)
        return HostSlots(tuple(start + before - left for start, before, left in moved), used, self.queries)


@dataclass(kw_only=True)
class DecodeSlots:
    """The slots of one buffer that the queries of a decode step attend to.

    Document b's are starts[b] .. starts[b] + used[b], new tokens included, of which its queries, at least
    one, are the last. Within a captured step the device's counts go on, and the host has none.
    """

    longest: int  # no document ever uses more slots
    used_B: Tensor  # int32, as the following
    bounds_B1: Tensor  # the starts and the buffer's end
    queries_B1: Tensor  # bounds of each document's queries
    most_queries: int  # of a document
    host: HostSlots | None
    shared: Ranges | None = None  # slots before these that several documents share, of the same buffer
    scales: Fp8Scales | None = None  # of a buffer in e4m3
    lines_B: Tensor | None = None  # of each document, in the scales
    window: int | None = None  # slots that a query sees, its own the last; None: all up to its own

    def within(self, window: int | None) -> DecodeSlots:
        """The same for queries that see the last `window` slots; None: all.

        Nothing is read of the device, so that it serves a captured step.
        """
        if window is None or self.longest <= window:
            return self
        assert self.shared is None, "attention with a window to documents that several rows share"
        most = window + self.most_queries - 1
        seen_B = torch.minimum(self.used_B, self.queries_B1.diff() + (window - 1))
        bounds_B1 = self.bounds_B1.clone()
        bounds_B1[:-1] += self.used_B - seen_B
        return replace(
            self,
            longest=min(self.longest, most),
            used_B=seen_B,
            bounds_B1=bounds_B1,
            host=None if self.host is None else self.host.within(window),
            window=window if self.most_queries > 1 else None,
        )

    @classmethod
    def of(
        cls,
        starts: Sequence[int],
        used: Sequence[int],
        slots: int,
        device: torch.device,
        queries: Sequence[int] | None = None,
    ) -> Self:
        """Of a buffer of `slots`, for a step that will not be captured; one query a document by default."""
        asked = Segments.of((1,) * len(starts) if queries is None else queries, device)
        return cls(
            longest=max(used),
            used_B=on_device(used, device, torch.int32),
            bounds_B1=on_device([*starts, slots], device, torch.int32),
            queries_B1=asked.cu_seqlens,
            most_queries=asked.longest,
            host=HostSlots(tuple(starts), list(used), asked.lengths),
        )

    @property
    def known(self) -> HostSlots:
        """The host's counts, where there are any."""
        assert self.host is not None, "the device alone knows these slots"
        return self.host

    @property
    def ranges(self) -> Ranges:
        """The same as the kernels for few queries want it."""
        return Ranges(
            starts_N=self.bounds_B1[:-1],
            used_N=self.used_B,
            queries_N1=self.queries_B1,
            most_queries=self.most_queries,
            longest=self.longest,
            scales=self.scales,
            lines_N=self.lines_B,
        )
