"""The KV cache of a pack: ragged, each document with its own room for the tokens it will generate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.kernels.segments import Segments


class Slots:
    """Where each document's keys and values lie in the buffers of one or more layers."""

    def __init__(self, segments: Segments, new_tokens: int) -> None:
        self.segments = segments
        self.capacity = segments.total + new_tokens * len(segments)
        self.starts = [offset + new_tokens * b for b, offset in enumerate(segments.offsets[:-1])]
        self.used = list(segments.lengths)
        # document b's tokens move up by the room left to the documents before it
        self.prompt_T = (
            torch.arange(segments.total, device=segments.device) + segments.document_T * new_tokens
        )

    def next_B(self) -> Tensor:
        """(B,) the slot of each document's next token."""
        places = [start + used for start, used in zip(self.starts, self.used, strict=True)]
        return torch.tensor(places, device=self.segments.device)

    def advance(self) -> None:
        self.used = [used + 1 for used in self.used]

    def keep(self, documents: Sequence[int]) -> None:
        self.starts = [self.starts[b] for b in documents]
        self.used = [self.used[b] for b in documents]


class RaggedCache:
    """Keys and values of all layers; lengths may differ by layer where a method drops tokens.

    Documents that have finished leave the batch without a copy: only their slots are forgotten.
    """

    def __init__(self, new_tokens: int) -> None:
        self.new_tokens = new_tokens
        self.keys: list[Tensor] = []  # of each layer, (S, K, d)
        self.values: list[Tensor] = []
        self.slots: list[Slots] = []  # of each layer; layers with the same tokens share one

    def store(self, k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> None:
        """Store the next layer's prompt tokens."""
        if self.slots and self.slots[-1].segments.lengths == segments.lengths:
            slots = self.slots[-1]
        else:
            slots = Slots(segments, self.new_tokens)
        self.slots.append(slots)
        for buffers, source in ((self.keys, k_TKd), (self.values, v_TKd)):
            # zeros, since kernels multiply what they mask: NaN in a slot not yet used would reach the answer
            buffer = source.new_zeros((slots.capacity, *source.shape[1:]))
            buffers.append(buffer.index_copy_(0, slots.prompt_T, source))

    def settle(self, layer: int, scores_N: Tensor) -> None:
        """Learn, before `layer` is stored, how its method scores the blocks of tokens that entered it."""

    def ready(self, layer: int) -> None:
        """Make sure that a layer's keys and values are there for the work queued from now on."""

    def observe(self, layer: int, q_BHd: Tensor) -> None:
        """See the queries of newly generated tokens."""

    def distinct_slots(self) -> list[Slots]:
        return list({id(slots): slots for slots in self.slots}.values())

    def prompt_tokens(self) -> list[list[int]]:
        """Of each layer, the stored prompt tokens of each document."""
        return [list(slots.segments.lengths) for slots in self.slots]

    def advance(self) -> None:
        """Count the token that every layer has just stored."""
        for slots in self.distinct_slots():
            slots.advance()

    def keep(self, documents: Sequence[int]) -> None:
        """Go on with these documents, by their places in the current batch."""
        for slots in self.distinct_slots():
            slots.keep(documents)

    def traffic(self) -> tuple[int, int]:
        """Bytes that lie on the host, and bytes brought from there while decoding."""
        return 0, 0

    @property
    def nbytes(self) -> int:
        """Of the device."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
