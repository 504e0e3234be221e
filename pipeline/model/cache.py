"""The KV cache of a pack: ragged, each document with its own room for the tokens it will generate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.kernels.attention import DecodeSlots
from pipeline.kernels.segments import Segments, on_device


class Slots:
    """Where each document's keys and values lie in the buffers of one or more layers."""

    def __init__(self, segments: Segments, new_tokens: int) -> None:
        self.segments = segments
        self.new_tokens = new_tokens
        self.capacity = segments.total + new_tokens * len(segments)
        # document b's tokens move up by the room left to the documents before it
        self.prompt_T = (
            torch.arange(segments.total, device=segments.device) + segments.document_T * new_tokens
        )
        self.rewind()

    def rewind(self) -> None:
        """All documents again, with the prompts' tokens alone."""
        offsets = self.segments.offsets[:-1]
        self.starts = [offset + self.new_tokens * b for b, offset in enumerate(offsets)]
        self.used = list(self.segments.lengths)
        self.room = [length + self.new_tokens for length in self.segments.lengths]

    def advance(self, tokens: Sequence[int] | None = None) -> None:
        added = tokens or (1,) * len(self.used)
        self.used = [min(n + more, most) for n, more, most in zip(self.used, added, self.room, strict=True)]

    def keep(self, documents: Sequence[int]) -> None:
        self.starts = [self.starts[b] for b in documents]
        self.used = [self.used[b] for b in documents]
        self.room = [self.room[b] for b in documents]


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

    def share(
        self, layers: Sequence[tuple[Tensor, Tensor]], first: Sequence[range], segments: Segments
    ) -> None:
        """Begin with layers that know the first tokens of each document: keys and values of other ones.

        Document b of `segments` begins with the tokens `first[b]` of the tensors in `layers`, (P, K, d) each,
        and has room for the rest of itself and for new tokens, which are to be written next.
        """
        assert not self.slots, "only an empty cache can begin with shared tokens"
        slots = Slots(segments, self.new_tokens)
        slots.used = [len(tokens) for tokens in first]
        rooms = Segments.of(slots.room, segments.device)
        # each slot without a token of its own yet gets a copy of the last one known, as it must be finite
        last_S = on_device([len(tokens) - 1 for tokens in first], rooms.device)[rooms.document_T]
        start_S = on_device([tokens.start for tokens in first], rooms.device)[rooms.document_T]
        place_S = start_S + torch.minimum(rooms.index_in_document_T, last_S)
        for k_PKd, v_PKd in layers:
            self.slots.append(slots)
            self.keys.append(k_PKd.index_select(0, place_S))
            self.values.append(v_PKd.index_select(0, place_S))

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

    def advance(self, tokens: Sequence[int] | None = None) -> None:
        """Count what every layer has just stored: so many tokens of each document, or one."""
        for slots in self.distinct_slots():
            slots.advance(tokens)

    def keep(self, documents: Sequence[int]) -> None:
        """Go on with these documents, by their places in the current batch."""
        for slots in self.distinct_slots():
            slots.keep(documents)

    def rewind(self) -> None:
        """Forget the generated tokens and take all documents back, of which none may have been parked."""
        for slots in self.distinct_slots():
            slots.rewind()

    def traffic(self) -> tuple[int, int]:
        """Bytes that lie on the host, and bytes brought from there while decoding."""
        return 0, 0

    @property
    def nbytes(self) -> int:
        """Of the device."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class NextSlots:
    """Where the batch's next tokens go in every layer, counted on the device as well as on the host.

    Letters: G distinct slots, B documents. `used` counts the token that a step is about to store. A count
    that has reached its document's room stays there, so that no step writes into another's slots.
    """

    def __init__(self, cache: RaggedCache) -> None:
        distinct = cache.distinct_slots()
        full = any(n >= room for slots in distinct for n, room in zip(slots.used, slots.room, strict=True))
        assert not full, "a document's slots are full"
        device, documents = distinct[0].segments.device, len(distinct[0].used)
        self._room = [list(slots.room) for slots in distinct]
        self.room_GB = on_device(self._room, device, torch.int32)
        self.used_GB = on_device([slots.used for slots in distinct], device, torch.int32) + 1
        self._before_GB = on_device([slots.starts for slots in distinct], device) - 1
        self.places_GB = self._before_GB + self.used_GB
        bounds = on_device([[*slots.starts, slots.capacity] for slots in distinct], device, torch.int32)
        queries = torch.arange(documents + 1, dtype=torch.int32, device=device)
        self._distinct = [
            DecodeSlots(
                starts=tuple(slots.starts),
                used=[n + 1 for n in slots.used],
                longest=max(slots.room),
                used_B=self.used_GB[g],
                bounds_B1=bounds[g],
                queries_B1=queries,
                queries=(1,) * documents,
            )
            for g, slots in enumerate(distinct)
        ]
        group = {id(slots): g for g, slots in enumerate(distinct)}
        self._group = [group[id(slots)] for slots in cache.slots]

    def at(self, layer: int) -> tuple[DecodeSlots, Tensor]:
        """A layer's slots, and in which of them (B,) the next tokens go."""
        group = self._group[layer]
        return self._distinct[group], self.places_GB[group]

    def advance_(self) -> None:
        """On the device, go on to the next token."""
        self.used_GB.add_(1)
        self._fit_()

    def advance_host(self) -> None:
        """The same in the numbers that the host reads."""
        for slots, room in zip(self._distinct, self._room, strict=True):
            slots.used = _one_more(slots.used, room)

    def park(self, rows: Sequence[int]) -> None:
        """Let finished documents write and read their first slot alone: a long one would cost bandwidth."""
        self.room_GB.index_fill_(1, on_device(rows, self.room_GB.device), 1)
        self._fit_()
        for slots, room in zip(self._distinct, self._room, strict=True):
            for row in rows:
                room[row] = slots.used[row] = 1

    def _fit_(self) -> None:
        torch.minimum(self.used_GB, self.room_GB, out=self.used_GB)
        torch.add(self._before_GB, self.used_GB, out=self.places_GB)


def _one_more(used: Sequence[int], room: Sequence[int]) -> list[int]:
    return [min(n + 1, most) for n, most in zip(used, room, strict=True)]
