"""Keys and values of a pack, as its prefill makes them: ragged, with room behind each document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.families.rope import UNROTATED
from pipeline.kernels.decoding import Fp8Scales
from pipeline.kernels.devices import copied_by_tiles
from pipeline.kernels.fused import FP8
from pipeline.kernels.kv_fp8 import KvTarget, put_prompts, rounded
from pipeline.kernels.segments import Segments, end_to_end, on_device
from pipeline.pruning.memories.key_memory import KeyMemory
from pipeline.pruning.shape import ModelShape
from pipeline.ranks.leading import OnEachRank


class KeysValues(OnEachRank):
    """Where the keys and values of rows that are being decoded lie, layer by layer."""

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (S, K, d) of a layer; those of several layers may share them."""
        raise NotImplementedError

    def scales(self, layer: int) -> Fp8Scales | None:
        """Of a layer whose keys and values are in e4m3."""
        return None

    def ready(self, layer: int) -> None:
        """Make sure that a layer's keys and values are there for the work queued from now on."""

    def observe(self, layer: int, q_BHd: Tensor) -> None:
        """See the queries of newly generated tokens."""

    def stepped(self) -> None:
        """Learn that a step has been queued."""

    has_spare_slot = False  # whether slot 0 is nobody's, for the columns that pad a batch

    @property
    def on_device_alone(self) -> bool:
        """Whether a step needs nothing of the host, so that it can be captured."""
        return True


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
        self.starts = [offset + new_tokens * b for b, offset in enumerate(segments.offsets[:-1])]
        self.used = list(segments.lengths)
        self.room = [length + new_tokens for length in segments.lengths]

    def placed(self, x_TKd: Tensor) -> Tensor:
        """(S, K, d) the prompt tokens in their slots.

        Those not yet used are zero, since kernels multiply what they mask: NaN there would reach the answer.
        """
        slots_SKd = x_TKd.new_empty((self.capacity, *x_TKd.shape[1:]))
        if len(self.starts) > 1:
            return slots_SKd.zero_().index_copy_(0, self.prompt_T, x_TKd)
        _copy(x_TKd, slots_SKd[: len(x_TKd)])  # no slot is written twice, and no index read
        slots_SKd[len(x_TKd) :] = 0
        return slots_SKd

    def advance(self, tokens: Sequence[int]) -> None:
        """Count so many tokens of each document as stored."""
        self.used = [n + more for n, more in zip(self.used, tokens, strict=True)]


def _copy(source_TKd: Tensor, target_TKd: Tensor) -> None:
    """By elements of 16 bytes where both have them: a GPU is slow with small ones that lie between others."""
    both = source_TKd, target_TKd
    if all(copied_by_tiles(x) and x.shape[2] * x.itemsize % 16 == 0 for x in both):
        source_TKd, target_TKd = (x.view(torch.complex128) for x in both)
    target_TKd.copy_(source_TKd)


@dataclass(frozen=True)
class SharedDocuments:
    """Documents' keys and values that stand before the slots of a cache, the same for several of its rows."""

    cache: RaggedCache  # of the documents, which have equally many tokens in each layer
    of_row: tuple[int, ...]  # which of them stands before each row

    def members(self) -> list[list[int]]:
        """The rows of each document."""
        rows: list[list[int]] = [[] for _ in self.cache.slots[0].used]
        for row, document in enumerate(self.of_row):
            rows[document].append(row)
        return rows


class RaggedCache(KeysValues):
    """What one prefill makes: keys and values of all layers; lengths may differ by layer."""

    def __init__(
        self, new_tokens: int, shared: SharedDocuments | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """In the type of what is stored, or in `dtype` float8_e4m3fn, with scales of each document."""
        self.new_tokens = new_tokens
        self.dtype = dtype
        self.shared = shared
        self.reaches: tuple[int, ...] = ()  # tokens that each document may come to have, answer included
        self.keys: list[Tensor] = []  # of each layer, (S, K, d)
        self.values: list[Tensor] = []
        self.slots: list[Slots] = []  # of each layer; layers with the same tokens share one
        self._scales: list[Fp8Scales] = []  # of each layer in e4m3, a line a document

    @property
    def device(self) -> torch.device:
        return self.slots[0].segments.device

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    def scales(self, layer: int) -> Fp8Scales | None:
        return self._scales[layer] if self._scales else None

    def check_rows(self, rows: int, *, again: bool) -> None:
        """Raise ConfigError unless so many rows can be decoded from it, and `again` if that is asked for."""

    def starts(self, document: int) -> list[int]:
        """Of each layer, the slot of a document's first token."""
        return [slots.starts[document] for slots in self.slots]

    def used(self, document: int) -> list[int]:
        """Of each layer, how many of a document's slots hold a token."""
        return [slots.used[document] for slots in self.slots]

    def store(self, k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> None:
        """Store the next layer's prompt tokens."""
        if self.slots and self.slots[-1].segments.lengths == segments.lengths:
            slots = self.slots[-1]
        else:
            slots = Slots(segments, self.new_tokens)
        self.slots.append(slots)
        if self.dtype == FP8:
            self._store_in_e4m3(k_TKd, v_TKd, slots)
            return
        self.keys.append(slots.placed(k_TKd))
        self.values.append(slots.placed(v_TKd))

    def store_chosen(
        self,
        k_TKd: Tensor,
        v_TKd: Tensor,
        segments: Segments,
        indices: Tensor | None,
        lengths: tuple[int, ...] | None = None,
    ) -> None:
        """The same of the tokens `indices`: None for all, (C,) of all heads, or (K, C) of each head its own.

        `lengths` says how many that are of each document, where it is known.
        """
        if indices is None:
            self.store(k_TKd, v_TKd, segments)
            return
        stored = segments.left(indices if indices.dim() == 1 else indices[0], lengths)
        if indices.dim() == 1:
            self.store(k_TKd.index_select(0, indices), v_TKd.index_select(0, indices), stored)
        else:
            index_CKd = indices.T[:, :, None].expand(-1, -1, k_TKd.shape[-1])
            self.store(k_TKd.gather(0, index_CKd), v_TKd.gather(0, index_CKd), stored)

    def _store_in_e4m3(self, k_TKd: Tensor, v_TKd: Tensor, slots: Slots) -> None:
        size, device, documents = k_TKd.shape[1:], k_TKd.device, len(slots.starts)
        for buffers in (self.keys, self.values):
            zeros = torch.zeros((slots.capacity, *size), dtype=torch.uint8, device=device)
            buffers.append(zeros.view(FP8))
        scales = Fp8Scales.ones(documents, size[0], size[1], device)
        starts_B, lines_B = on_device(slots.starts, device), torch.arange(documents, device=device)
        target = KvTarget(self.keys[-1], self.values[-1], starts_B, scales, lines_B)
        put_prompts(k_TKd, v_TKd, slots.segments, target)
        self._scales.append(scales)

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

    def reserve(self, segments: Segments, shape: ModelShape, dtype: torch.dtype) -> None:
        """Make room in all layers for tokens that are to be written next, and for new tokens behind them."""
        assert not self.slots, "only an empty cache can be reserved"
        slots = Slots(segments, self.new_tokens)
        slots.used = [0] * len(segments)
        size = (slots.capacity, shape.kv_heads, shape.head_dim)
        for _layer in range(shape.layers):
            self.slots.append(slots)
            for buffers in (self.keys, self.values):
                buffers.append(torch.zeros(size, dtype=dtype, device=segments.device))

    def settle(self, layer: int, scores_N: Tensor) -> None:
        """Learn, before `layer` is stored, how its method scores the blocks of tokens that entered it."""

    def distinct_slots(self) -> list[Slots]:
        return list({id(slots): slots for slots in self.slots}.values())

    @torch.inference_mode()
    def round_to_e4m3(self) -> None:
        """Leave of the prompts' keys and values what float8 would, in their own type."""
        for layer, slots in enumerate(self.slots):
            buffers = self.buffers(layer)
            k_TKd, v_TKd = (buffer[slots.prompt_T] for buffer in buffers)
            near = rounded(k_TKd, v_TKd, slots.segments)
            for buffer, values in zip(buffers, near, strict=True):
                buffer.index_copy_(0, slots.prompt_T, values)

    def own_tokens(self) -> list[list[int]]:
        """Of each layer, the prompt tokens of each document that are stored here."""
        return [list(slots.segments.lengths) for slots in self.slots]

    def prompt_tokens(self) -> list[list[int]]:
        """The same, with those that are shared."""
        own, shared = self.own_tokens(), self.shared
        if shared is None:
            return own
        before = [[layer[document] for document in shared.of_row] for layer in shared.cache.own_tokens()]
        return [list(map(add, *pair)) for pair in zip(before, own, strict=True)]

    def advance(self, tokens: Sequence[int]) -> None:
        """Count what every layer has just stored: so many tokens of each document."""
        for slots in self.distinct_slots():
            slots.advance(tokens)

    def traffic(self) -> tuple[int, int]:
        """Bytes that lie on the host, and bytes brought from there while decoding."""
        return 0, 0

    @property
    def nbytes(self) -> int:
        """Of the device."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class MemoryCache(RaggedCache):
    """In place of keys and values of all layers, the memory that a method holds of each document."""

    def __init__(self, memories: Sequence[KeyMemory], device: torch.device, new_tokens: int) -> None:
        super().__init__(new_tokens)
        self.memories = memories
        self._prompts = [memory.stored for memory in memories]  # what there is before anything is generated
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def on_device_alone(self) -> bool:
        return False  # which keys are attended to is chosen step by step

    def layer_(
        self,
        decoder: Decoder,
        layer: int,
        hidden_ND: Tensor,
        counts: Sequence[int],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Run a layer for the next tokens of each document, on the residual stream in place."""
        check()
        q_NHd, k_NKd, v_NKd = decoder.qkv(layer, hidden_ND, UNROTATED)
        parts = zip(*(x.split(list(counts)) for x in (q_NHd, k_NKd, v_NKd)), strict=True)
        attended = [
            memory.attend(layer, *part)
            for memory, part in zip(self.memories, parts, strict=True)
            if len(part[0])
        ]
        decoder.add_attention_(layer, hidden_ND, end_to_end(attended))
        decoder.add_feed_forward_(layer, hidden_ND)

    def check_rows(self, rows: int, *, again: bool) -> None:
        if rows > 1 or again:
            raise ConfigError("keys that are held before RoPE are decoded once, and a document at a time")

    def starts(self, document: int) -> list[int]:
        return [0] * len(self.used(document))

    def used(self, document: int) -> list[int]:
        return self.memories[document].stored

    def own_tokens(self) -> list[list[int]]:
        return [list(layer) for layer in zip(*self._prompts, strict=True)]

    def round_to_e4m3(self) -> None:
        raise ConfigError("keys that are held before RoPE stay in the model's dtype, and not in fp8")

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self.memories)
