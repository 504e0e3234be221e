"""The rows that take decode steps together, wherever their keys and values lie.

What a step works on stays at its place on the device, so that it can be replayed as a CUDA graph. The host
counts along, since a step adds one token to each row: it need not ask the device. Rows are the batch's first
columns; where a batch is padded to the size of a graph, the columns behind them read and write a slot of
nobody. Letters: C columns that there are, B those of a step, L layers, N new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend, DecodeSlots
from pipeline.kernels.decoding import Fp8Scales, Ranges, in_chunks, queries_of_a_range
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.kernels.segments import on_device
from pipeline.model.cache import KeysValues
from pipeline.model.sampling import Sampling, next_tokens
from pipeline.model.store import Extent
from pipeline.pruning.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a row's next token goes: in each layer the slot of its first token, and how many it has."""

    starts: Sequence[int]
    used: Sequence[int]
    position: int  # of the next token: counting the prompt as it was, not the tokens that a method left
    reach: int = 0  # tokens that its document may come to have, as `Decoder.rope` wants it
    line: int = 0  # of the scales of keys and values in e4m3
    shared: Extent | None = None  # of the document that stands before these tokens, and is others' too


class DecodeBatch:
    """Up to `capacity` rows. Raises nothing but what the device does."""

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        kv: KeysValues,
        *,
        capacity: int,
        longest: int,
        sampling: Sampling | None = None,
        new_tokens: int = 0,
    ) -> None:
        """No row ever has more than `longest` tokens in a layer; those that draw do so for `new_tokens`."""
        self._decoder, self._attention, self._kv = decoder, attention, kv
        self._longest = longest
        self.sampling = sampling or Sampling()
        device, layers = decoder.device, decoder.shape.layers
        self.rows = 0
        # of each column: its row's counts on the host, and what of it the device needs
        self._starts_LC = np.zeros((layers, capacity + 1), np.int32)
        self._used_LC = np.ones((layers, capacity), np.int32)  # the next token counts
        self._position_C = np.zeros(capacity, np.int64)
        self._reach_C = np.zeros(capacity, np.int64)
        self._drawn_C = np.zeros(capacity, np.int64)
        self._lines_C = np.zeros(capacity, np.int32)
        self._moving_C = np.zeros(capacity, np.int32)
        self.tokens_C = torch.zeros(capacity, dtype=torch.int64, device=device)  # the newest, to be stored
        self.next_C = torch.zeros_like(self.tokens_C)  # what the last step chose; NOT_FINITE is among them
        self._starts_dev = torch.zeros((layers, capacity + 1), dtype=torch.int32, device=device)
        self._used_dev = torch.ones((layers, capacity), dtype=torch.int32, device=device)
        self._places_dev = torch.zeros((layers, capacity), dtype=torch.int64, device=device)
        self._position_dev = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._reach_dev = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._moving_dev = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._drawn_dev = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._lines_dev = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._queries_dev = torch.arange(capacity + 1, dtype=torch.int32, device=device)
        self._shared = _SharedTables(decoder.shape, capacity, device)
        draws = 0 if self.sampling.is_greedy else new_tokens
        self._uniform_CN = torch.zeros((capacity, draws), dtype=torch.float32, device=device)

    @property
    def capacity(self) -> int:
        return len(self.tokens_C)

    @property
    def shares(self) -> bool:
        """Whether a step attends to documents that several rows share."""
        return bool(self._shared)

    @torch.inference_mode()
    def join(self, seats: Sequence[Seat], tokens: Sequence[int], uniforms: Sequence[Tensor] = ()) -> None:
        """Add rows behind those that are there, each with its newest token, and its numbers for draws."""
        first, last = self.rows, self.rows + len(seats)
        assert last <= self.capacity, "more rows than the batch has columns"
        new = slice(first, last)
        self._starts_LC[:, new] = np.array([seat.starts for seat in seats], np.int32).T
        self._used_LC[:, new] = np.array([seat.used for seat in seats], np.int32).T + 1
        self._position_C[new] = [seat.position for seat in seats]
        self._reach_C[new] = [seat.reach for seat in seats]
        self._drawn_C[new] = 1  # the first token was drawn after the prefill
        self._lines_C[new] = [seat.line for seat in seats]
        self._moving_C[new] = 1
        self.tokens_C[new] = on_device(tokens, self.tokens_C.device)
        if self._uniform_CN.shape[1]:
            self._uniform_CN[new] = torch.stack(list(uniforms)).to(self._uniform_CN.device)
        self._shared.extents += [seat.shared for seat in seats]
        self.rows = last
        self._tell_device()

    @torch.inference_mode()
    def keep(self, columns: Sequence[int], starts: Sequence[Sequence[int]] | None = None) -> None:
        """Go on with the rows in these columns, in this order; `starts` where they have been moved."""
        kept = len(columns)
        chosen = list(columns)
        kept_LC = self._starts_LC[:, chosen] if starts is None else np.array(starts, np.int32).T
        for values, nobody in (
            (self._used_LC, 1),
            (self._position_C, 0),
            (self._reach_C, 0),
            (self._drawn_C, 0),
            (self._lines_C, 0),
            (self._moving_C, 0),
        ):
            values[..., :kept] = values[..., chosen]
            values[..., kept : self.rows] = nobody
        self._starts_LC[:, :kept] = kept_LC
        self._starts_LC[:, kept : self.rows] = 0
        if chosen != list(range(kept)):
            order_B = on_device(chosen, self.tokens_C.device)
            self.tokens_C[:kept] = self.tokens_C.index_select(0, order_B)
            if self._uniform_CN.shape[1]:
                self._uniform_CN[:kept] = self._uniform_CN.index_select(0, order_B)
        self.tokens_C[kept : self.rows] = 0
        self._shared.extents = [self._shared.extents[column] for column in chosen]
        self.rows = kept
        self._tell_device()

    def _tell_device(self) -> None:
        """Bring the host's counts to their places on the device, in order behind the work queued so far."""
        pairs = (
            (self._starts_dev, self._starts_LC),
            (self._used_dev, self._used_LC),
            (self._position_dev, self._position_C),
            (self._reach_dev, self._reach_C),
            (self._moving_dev, self._moving_C),
            (self._drawn_dev, self._drawn_C),
            (self._lines_dev, self._lines_C),
        )
        for target, source in pairs:
            _to_device(target, source)
        self._place_(self.capacity)
        self._shared.tell_device()

    def _place_(self, columns: int) -> None:
        """Where the next tokens go: each behind the others of its row."""
        part = (slice(None), slice(columns))
        torch.add(self._starts_dev[part], self._used_dev[part], alpha=1, out=self._places_dev[part])
        self._places_dev[part].sub_(1)

    @torch.inference_mode()
    def step(self, columns: int) -> None:
        """Run the newest tokens of the first `columns` columns through the model, and choose the next ones.

        Reads nothing of the host that changes from step to step, if the attention `captures`. Keeps the
        tokens chosen in `next_C`, and goes on to them.
        """
        decoder, kv = self._decoder, self._kv
        hidden_BD = decoder.embed(self.tokens_C[:columns])
        rope = decoder.rope(hidden_BD, self._position_dev[:columns], self._reach_dev[:columns])
        normed = None  # the next layer's input, where a layer's last kernel makes it
        for layer in range(decoder.shape.layers):
            places_B, lines_B = self._places_dev[layer, :columns], self._lines_dev[:columns]
            target = KvTarget(*kv.buffers(layer), places_B, kv.scales(layer), lines_B)
            slots = self._slots(layer, columns)

            def attend(q_BHd: Tensor, layer: int = layer, slots: DecodeSlots = slots) -> Tensor:
                kv.ready(layer)
                attended_BHd = self._attention.decode(q_BHd, *kv.buffers(layer), slots)
                kv.observe(layer, q_BHd)
                return attended_BHd

            normed = decoder.step_layer_(layer, hidden_BD, rope, target, attend, normed)
        self._choose_(decoder.head(hidden_BD), columns)
        moving_C = self._moving_dev[:columns]
        self._used_dev[:, :columns].add_(moving_C)
        self._position_dev[:columns].add_(moving_C)
        self._drawn_dev[:columns].add_(moving_C)
        self._place_(columns)

    def _choose_(self, logits_BV: Tensor, columns: int) -> None:
        uniform_B = None
        if not self.sampling.is_greedy:
            last = self._uniform_CN.shape[1] - 1
            drawn_B1 = self._drawn_dev[:columns, None].clamp(max=last)
            uniform_B = self._uniform_CN[:columns].gather(1, drawn_B1)[:, 0]
        self.next_C[:columns] = next_tokens(logits_BV, self.sampling, uniform_B)
        # rows are looked up by their tokens, those that have ended too: NOT_FINITE would be no row
        torch.clamp(self.next_C[:columns], min=0, out=self.tokens_C[:columns])

    def count(self) -> None:
        """Let the host's counts follow a step."""
        moving_C = self._moving_C[: self.rows]
        self._used_LC[:, : self.rows] += moving_C
        self._position_C[: self.rows] += moving_C
        self._drawn_C[: self.rows] += moving_C
        self._kv.stepped()

    def _slots(self, layer: int, columns: int) -> DecodeSlots:
        scales = self._kv.scales(layer)
        slots = DecodeSlots(
            starts=self._starts_LC[layer, :columns].tolist(),
            used=self._used_LC[layer, :columns].tolist(),
            longest=self._longest,
            used_B=self._used_dev[layer, :columns],
            bounds_B1=self._starts_dev[layer, : columns + 1],
            queries_B1=self._queries_dev[: columns + 1],
            queries=(1,) * columns,
            shared=self._shared.ranges(layer, columns, self._longest, scales) if self.shares else None,
            scales=scales,
            lines_B=None if scales is None else self._lines_dev[:columns],
        )
        return slots.within(self._decoder.shape.window(layer))


class _SharedTables:
    """Which columns read the same document, as a step finds it on the device: R ranges of a document's slots.

    Columns with the same one are put together, as many in a range as a program of the kernel holds. There are
    no more ranges than columns; those behind the last are empty, so that a captured step serves all.
    """

    def __init__(self, shape: ModelShape, capacity: int, device: torch.device) -> None:
        self.extents: list[Extent | None] = []  # of each column's row
        self._most = queries_of_a_range(shape.heads, shape.kv_heads)
        self._starts_LR = np.zeros((shape.layers, capacity), np.int32)
        self._used_LR = np.zeros((shape.layers, capacity), np.int32)
        self._lines_R = np.zeros(capacity, np.int32)
        self._queries_R1 = np.zeros(capacity + 1, np.int32)
        self._order_C = np.zeros(capacity, np.int32)
        self._told = False  # whether the device knows of a range
        self._starts_dev, self._used_dev, self._lines_dev, self._queries_dev, self._order_dev = (
            torch.zeros(values.shape, dtype=torch.int32, device=device)
            for values in (self._starts_LR, self._used_LR, self._lines_R, self._queries_R1, self._order_C)
        )

    def __bool__(self) -> bool:
        return any(extent is not None for extent in self.extents)

    def tell_device(self) -> None:
        """Bring the tables to the device, behind the work queued so far; an extent may have been moved."""
        if not (self or self._told):
            return
        members: dict[int, list[int]] = {}
        for column, extent in enumerate(self.extents):
            if extent is not None:
                members.setdefault(id(extent), []).append(column)
        chunks = [chunk for columns in members.values() for chunk in in_chunks(columns, self._most)]
        self._used_LR[:] = 0
        self._queries_R1[:] = sum(map(len, chunks))
        self._queries_R1[: len(chunks) + 1] = [0, *accumulate(map(len, chunks))]
        for n, columns in enumerate(chunks):
            extent = self.extents[columns[0]]
            assert extent is not None
            self._starts_LR[:, n], self._used_LR[:, n] = extent.starts, extent.stored
            self._lines_R[n] = extent.line
            self._order_C[self._queries_R1[n] : self._queries_R1[n + 1]] = columns
        pairs = (
            (self._starts_dev, self._starts_LR),
            (self._used_dev, self._used_LR),
            (self._lines_dev, self._lines_R),
            (self._queries_dev, self._queries_R1),
            (self._order_dev, self._order_C),
        )
        for target, source in pairs:
            _to_device(target, source)
        self._told = bool(self)

    def ranges(self, layer: int, columns: int, longest: int, scales: Fp8Scales | None) -> Ranges:
        """Of a step of so many columns."""
        return Ranges(
            starts_N=self._starts_dev[layer, :columns],
            used_N=self._used_dev[layer, :columns],
            queries_N1=self._queries_dev[: columns + 1],
            most_queries=self._most,
            longest=longest,
            order_O=self._order_dev,
            scales=scales,
            lines_N=None if scales is None else self._lines_dev[:columns],
        )


def _to_device(target: Tensor, source: np.ndarray) -> None:
    """Copy, in order behind the work queued so far, without waiting for it."""
    values = torch.from_numpy(source.copy())
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
