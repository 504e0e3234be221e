"""What a decode step finds on the device of its rows: documents that they share, and how tokens are chosen.

Like all that a step works on the tables stay at their place, and the host writes to them between steps.
Letters: C columns of the batch, K tokens that a step makes of it at most, N tokens of a row's answer or, of
drafts, those of a row, O columns in the order of what they share, Q queries of a step, R ranges of a
document's slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.generation.lookup import Spread
from pipeline.generation.sampling import (
    Draws,
    RowDraws,
    is_drawn,
    mark_seen,
    penalised,
    penalty_of,
    settings_of,
)
from pipeline.kernels.decoding import Fp8Scales, Ranges, in_chunks, queries_of_a_range
from pipeline.kernels.segments import on_device
from pipeline.model.graphs import StepSize
from pipeline.model.store import Extent
from pipeline.pruning.shape import ModelShape

FEWEST_NUMBERS = 128  # for draws, that a row has room for


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a row's next token goes: in each layer the slot of its first token, and how many it has."""

    starts: Sequence[int]
    used: Sequence[int]
    position: int  # of the next token: counting the prompt as it was, not the tokens that a method left
    reach: int = 0  # tokens that its document may come to have, as `Decoder.rope` wants it
    line: int = 0  # of the scales of keys and values in e4m3
    new_tokens: int | None = None  # of its answer at most; None: as many as the batch makes of any
    shared: Extent | None = None  # of the document that stands before these tokens, and is others' too
    prompt: np.ndarray | None = None  # (T,) token ids, for drafts that are looked up and for a penalty


class Drafts(NamedTuple):
    """What is looked up for a step, and the queries that verify it."""

    tokens_BN: Tensor
    count_B: Tensor
    spread: Spread  # of the queries over the columns, the first of each being its newest token


class Queries(NamedTuple):
    """What a step runs through the model."""

    column_Q: Tensor
    tokens_Q: Tensor
    position_Q: Tensor
    reach_Q: Tensor
    drawn_Q: Tensor  # how many tokens the row has before the one that comes of it
    places_LQ: Tensor  # where keys and values go
    lines_Q: Tensor
    used_LB: Tensor  # of each column, all of these tokens included
    bounds_B1: Tensor  # of each column's queries
    most: int  # of a column


class SharedQueries(NamedTuple):
    """Of a step: which of its queries attend to each range of the documents that rows share."""

    queries_N1: Tensor
    order_O: Tensor


class SharedTables:
    """Which columns read the same document, as a step finds it on the device: R ranges of a document's slots.

    Columns with the same one are put together, as many in a range as a program of the kernel holds, each with
    all its drafts. There are no more ranges than columns; those behind the last are empty, so that a captured
    step serves all.
    """

    def __init__(self, shape: ModelShape, capacity: int, device: torch.device, drafts: int) -> None:
        self.extents: list[Extent | None] = []  # of each column's row
        self._columns = max(1, queries_of_a_range(shape.heads, shape.kv_heads) // (1 + drafts))
        self._most = self._columns * (1 + drafts)
        self._starts_LR = np.zeros((shape.layers, capacity), np.int32)
        self._used_LR = np.zeros((shape.layers, capacity), np.int32)
        self._lines_R = np.zeros(capacity, np.int32)
        self._members_R1 = np.zeros(capacity + 1, np.int32)  # bounds of each range's columns in the order
        self._order_C = np.zeros(capacity, np.int32)
        self._told = False  # whether the device knows of a range
        self._starts_dev, self._used_dev, self._lines_dev, self._members_dev, self._order_dev = (
            torch.zeros(values.shape, dtype=torch.int32, device=device)
            for values in (self._starts_LR, self._used_LR, self._lines_R, self._members_R1, self._order_C)
        )
        self._place_C = torch.arange(capacity, dtype=torch.int32, device=device)

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
        chunks = [chunk for columns in members.values() for chunk in in_chunks(columns, self._columns)]
        self._used_LR[:] = 0
        self._members_R1[:] = sum(map(len, chunks))
        self._members_R1[: len(chunks) + 1] = [0, *accumulate(map(len, chunks))]
        for n, columns in enumerate(chunks):
            extent = self.extents[columns[0]]
            assert extent is not None
            self._starts_LR[:, n], self._used_LR[:, n] = extent.starts, extent.stored
            self._lines_R[n] = extent.line
            self._order_C[self._members_R1[n] : self._members_R1[n + 1]] = columns
        pairs = (
            (self._starts_dev, self._starts_LR),
            (self._used_dev, self._used_LR),
            (self._lines_dev, self._lines_R),
            (self._members_dev, self._members_R1),
            (self._order_dev, self._order_C),
        )
        for target, source in pairs:
            to_device(target, source)
        self._told = bool(self)

    def of_step(self, size: StepSize, spread: Spread | None) -> SharedQueries:
        """The queries of each range: of its columns all that `spread` gives them, or one each."""
        members_N1 = self._members_dev[: size.columns + 1]
        if spread is None:
            return SharedQueries(members_N1, self._order_dev)
        bounds_C1 = spread.bounds_N1.new_zeros(len(self._order_dev) + 1)
        bounds_C1[: size.columns + 1] = spread.bounds_N1
        count_O = bounds_C1.diff()[self._order_dev].masked_fill(self._place_C >= members_N1[-1], 0)
        own = Spread.of(count_O, size.queries)
        order_Q = bounds_C1[self._order_dev[own.owner_Q]] + own.index_Q
        return SharedQueries(own.bounds_N1[members_N1], order_Q)

    def ranges(self, layer: int, asked: SharedQueries, longest: int, scales: Fp8Scales | None) -> Ranges:
        """Of a step with these queries."""
        columns = len(asked.queries_N1) - 1
        return Ranges(
            starts_N=self._starts_dev[layer, :columns],
            used_N=self._used_dev[layer, :columns],
            queries_N1=asked.queries_N1,
            most_queries=self._most,
            longest=longest,
            order_O=asked.order_O,
            scales=scales,
            lines_N=None if scales is None else self._lines_dev[:columns],
        )


class DrawTable:
    """Of each column how its row is drawn, at no cost while all rows are greedy.

    It grows with the longest answer that is drawn. It then has another place, and `numbers` is another too:
    a step that was captured for fewer is not run again.
    """

    def __init__(self, capacity: int, device: torch.device, numbers: int = 0) -> None:
        """With room for so many numbers of a row at once; 0: until a row is drawn none is needed."""
        self._rows: list[RowDraws | None] = []
        self.numbers = 0  # that a row has room for; 0 where all rows are greedy
        self.sorts = self.floors = False  # whether a row needs the vocabulary sorted, or has a min-p
        self._settings_4C = torch.zeros((4, capacity), dtype=torch.float32, device=device)
        self._uniform_CN = torch.zeros((capacity, numbers), dtype=torch.float32, device=device)

    def join(self, draws: Sequence[RowDraws | None]) -> None:
        """Add rows behind those that are there."""
        first = len(self._rows)
        self._rows += draws
        if not any(map(is_drawn, draws)):
            return
        most = max(len(row.uniform_N) for row in draws if row is not None)
        self._widen(most)
        uniforms = np.zeros((len(draws), most), np.float32)
        for line, row in zip(uniforms, draws, strict=True):
            if row is not None:
                line[: len(row.uniform_N)] = row.uniform_N.numpy()
        settings = np.array([settings_of(row) for row in draws], np.float32)
        to_device(self._settings_4C[:, first : len(self._rows)], settings.T)
        to_device(self._uniform_CN[first : len(self._rows), :most], uniforms)
        self._count()

    def keep(self, columns: Sequence[int]) -> None:
        """Go on with the rows in these columns, in this order."""
        kept = len(columns)
        if self.numbers and list(columns) != list(range(kept)):
            order_B = on_device(list(columns), self._settings_4C.device)
            for values in (self._settings_4C.T, self._uniform_CN):
                values[:kept] = values.index_select(0, order_B)
        if self.numbers:
            self._settings_4C[0, kept:] = 0
        self._rows = [self._rows[column] for column in columns]
        if self.numbers:
            self._count()

    def of_step(self, size: StepSize, column_Q: Tensor, drawn_Q: Tensor) -> Draws | None:
        """What a step draws by: of each query its column, and how many tokens its row has before."""
        if not size.numbers:
            return None
        column_Q = column_Q.long()
        uniform_Q = self._uniform_CN[column_Q, drawn_Q.long().clamp(max=size.numbers - 1)]
        return Draws(self._settings_4C[:, column_Q], uniform_Q, size.sorts, size.floors)

    def _count(self) -> None:
        drawn = [row.sampling for row in self._rows if is_drawn(row)]
        self.numbers = self._uniform_CN.shape[1] if drawn else 0
        self.sorts = any(sampling.sorts for sampling in drawn)
        self.floors = any(sampling.has_floor for sampling in drawn)

    def _widen(self, numbers: int) -> None:
        """Have room for so many numbers of a row."""
        before_CN = self._uniform_CN
        if numbers <= before_CN.shape[1]:
            return
        width = max(FEWEST_NUMBERS, 1 << (numbers - 1).bit_length())
        self._uniform_CN = before_CN.new_zeros((len(before_CN), width))
        self._uniform_CN[:, : before_CN.shape[1]] = before_CN


class PenaltyTable:
    """Of each column the tokens that its row has, and the penalty on them; nothing while no row has one."""

    def __init__(self, capacity: int, vocab: int, device: torch.device, *, is_needed: bool = False) -> None:
        """Its memory, a byte for each column and token, is taken where `is_needed`, or with the first row."""
        self._vocab = vocab
        self._penalties: list[float] = []  # of each column's row; 1: none
        self._penalty_C = torch.ones(capacity, dtype=torch.float32, device=device)
        self._seen_CV = torch.zeros((capacity, vocab if is_needed else 0), dtype=torch.bool, device=device)

    @property
    def penalises(self) -> bool:
        """Whether a row has a penalty."""
        return any(penalty != 1 for penalty in self._penalties)

    def join(
        self, draws: Sequence[RowDraws | None], prompts: Sequence[np.ndarray | None], tokens: Sequence[int]
    ) -> None:
        """Add rows behind those that are there, each with its first token; a penalty needs the prompt."""
        first = len(self._penalties)
        own = list(map(penalty_of, draws))
        self._penalties += own
        if all(penalty == 1 for penalty in own):
            return
        if not self._seen_CV.numel():
            self._seen_CV = self._seen_CV.new_zeros((len(self._seen_CV), self._vocab))
        to_device(self._penalty_C[first : len(self._penalties)], np.array(own, np.float32))
        for column, (penalty, prompt, token) in enumerate(zip(own, prompts, tokens, strict=True), first):
            if penalty != 1:
                assert prompt is not None
                mark_seen(self._seen_CV[column].zero_(), np.append(prompt, token))

    def keep(self, columns: Sequence[int]) -> None:
        """Go on with the rows in these columns, in this order."""
        kept = len(columns)
        if self.penalises and list(columns) != list(range(kept)):
            order_B = on_device(list(columns), self._penalty_C.device)
            for values in (self._penalty_C, self._seen_CV):
                values[:kept] = values.index_select(0, order_B)
        if self.penalises:
            self._penalty_C[kept:] = 1
        self._penalties = [self._penalties[column] for column in columns]

    def applied(
        self, logits_QV: Tensor, tokens_C: Tensor, drafts_CN: Tensor | None, spread: Spread | None
    ) -> Tensor:
        """(Q, V) logits of a step, each query's by the tokens that stand before the one that it makes.

        Those are its row's, the newest of which is in `tokens_C`, and behind them the drafts up to the query.
        """
        columns = len(tokens_C)
        if drafts_CN is None or spread is None:
            return penalised(logits_QV, self._penalty_C[:columns], self._seen_CV[:columns])
        owner_Q = spread.owner_Q.long()
        before_QN = torch.arange(drafts_CN.shape[1], device=owner_Q.device) < spread.index_Q[:, None]
        read_QN = torch.where(before_QN, drafts_CN[owner_Q], tokens_C[owner_Q, None])
        seen_QV = self._seen_CV[owner_Q].scatter_(1, read_QN.long(), True)
        return penalised(logits_QV, self._penalty_C[owner_Q], seen_QV)

    def take(self, made_CK: Tensor, newest_C: Tensor) -> None:
        """Learn what a step made; a negative number is no token."""
        tokens_CK = torch.where(made_CK < 0, newest_C[:, None], made_CK)
        self._seen_CV[: len(made_CK)].scatter_(1, tokens_CK.long(), True)


def to_device(target: Tensor, source: np.ndarray) -> None:
    """Copy, in order behind the work queued so far, without waiting for it."""
    values = torch.from_numpy(np.ascontiguousarray(source).copy())
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)


def to_host(
    outcome_BX: Tensor, scores_CX: Tensor | None
) -> tuple[Tensor, Tensor | None, torch.cuda.Event | None]:
    """What came of a step for B rows on its way to the host, and when it will be there."""
    scores_BX = None if scores_CX is None else scores_CX[: len(outcome_BX)]
    if not outcome_BX.is_cuda:
        return outcome_BX.clone(), None if scores_BX is None else scores_BX.clone(), None
    host = _pinned(outcome_BX), None if scores_BX is None else _pinned(scores_BX)
    return *host, torch.cuda.current_stream(outcome_BX.device).record_event()


def _pinned(values: Tensor) -> Tensor:
    """A copy in page-locked memory, which is there once the device has done what was queued."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
