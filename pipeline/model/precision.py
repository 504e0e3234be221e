"""Which tokens of a prefill keep the model's dtype where its large matrix products are in fp8.

An answer feels the rounding of the tokens that ask for it far more than that of the document before them: on
Qwen2.5-Coder-1.5B the divergence from the model's own answers falls fivefold where the last 64 tokens and the
answer are kept, and by half again where queries, keys and values of the first and last layers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.families.residual import Normed
from pipeline.families.rope import Rope
from pipeline.kernels.query_pieces import QueryPiece
from pipeline.kernels.segments import Segments, runs
from pipeline.pruning.base import Selection
from pipeline.pruning.shape import ModelShape

WINDOW = 64  # last tokens of each document
FEW = 1 / 8  # of a pack's tokens, up to which kept ones are computed twice, and the others not gathered
LEAST_WORK = 1 << 38  # products of a layer, below which fp8 costs a GPU more launches than it saves


class Make(Protocol):
    """Something made of the residual stream: see `Kept.in_both`."""

    def __call__(self, hidden_TD: Tensor, rope: Rope, fp8: bool | None = None) -> tuple[Tensor, ...]: ...


class Step(Protocol):
    """A step on the residual stream in place: see `Piece.take_`."""

    def __call__(
        self, hidden_TD: Tensor, *inputs_T: Tensor, fp8: bool | None = None, later: bool = False
    ) -> Normed | None: ...


@dataclass(frozen=True)
class Kept:
    """Tokens of a pack that keep the model's dtype, and the others."""

    ranges: tuple[tuple[int, int], ...]  # half-open, ascending, none empty, with gaps between them
    total: int
    device: torch.device

    @cached_property
    def rows(self) -> Tensor:
        """(W,) ascending."""
        return self._places(self.ranges)

    @cached_property
    def others(self) -> Tensor:
        """(T - W,) ascending."""
        starts, ends = [start for start, _ in self.ranges], [end for _, end in self.ranges]
        return self._places(list(zip((0, *ends), (*starts, self.total), strict=True)))

    def within(self, rows: slice) -> Kept:
        """Those of a piece of the pack, and the others there; either may be none."""
        clipped = [(max(start, rows.start), min(end, rows.stop)) for start, end in self.ranges]
        ranges = tuple((a - rows.start, b - rows.start) for a, b in clipped if a < b)
        return Kept(ranges, rows.stop - rows.start, self.device)

    @cached_property
    def in_one(self) -> bool | None:
        """Whether all tokens are computed in fp8, or none is; None: some of both."""
        if not self.ranges:
            return True
        return False if self.ranges == ((0, self.total),) else None

    @property
    def beside_all(self) -> Tensor | None:
        """The tokens to compute in fp8 beside the kept ones: (T - W,), or None for all where few are kept."""
        return None if len(self.rows) <= FEW * self.total else self.others

    def in_both_(self, step: Step, hidden_TD: Tensor, *inputs_T: Tensor) -> Normed | None:
        """Take a step on the residual stream in place, of each token in its precision.

        However many documents there are it is taken twice: `step` is given tokens of the stream and of the
        inputs, and whether to compute in fp8. What few kept tokens would be in fp8 is overwritten.

        What the step returns is returned if it is of all tokens; then rows of kept ones hold what they would
        be in fp8.
        """
        given = (hidden_TD, *inputs_T)
        if self.in_one is not None:
            return step(*given, fp8=self.in_one)
        own = [x.index_select(0, self.rows) for x in given]
        step(*own, fp8=False)
        beside, normed = self.beside_all, None
        if beside is None:
            normed = step(*given, fp8=True)
        else:
            others = [x.index_select(0, beside) for x in given]
            step(*others, fp8=True)
            hidden_TD.index_copy_(0, beside, others[0])
        hidden_TD.index_copy_(0, self.rows, own[0])
        return normed

    def in_both(self, make: Make, hidden_TD: Tensor, rope: Rope) -> tuple[Tensor, ...]:
        """What `make` makes of the residual stream, (T, ...) each, of each token in its precision."""
        if self.in_one is not None:
            return make(hidden_TD, rope, fp8=self.in_one)
        own = make(hidden_TD.index_select(0, self.rows), rope.at(self.rows), fp8=False)
        if (beside := self.beside_all) is not None:
            hidden_TD, rope = hidden_TD.index_select(0, beside), rope.at(beside)
        others = make(hidden_TD, rope, fp8=True)
        return tuple(self.merged(mine, other) for mine, other in zip(own, others, strict=True))

    def merged(self, own: Tensor, others: Tensor) -> Tensor:
        """(T, ...) of what the kept tokens have and those `beside_all`, in whose tensor if they are all."""
        beside = self.beside_all
        if beside is not None:
            others = others.new_empty(self.total, *others.shape[1:]).index_copy_(0, beside, others)
        return others.index_copy_(0, self.rows, own)

    @cached_property
    def _mask_T(self) -> Tensor:
        mask_T = torch.zeros(self.total, dtype=torch.bool, device=self.device)
        mask_T[self.rows] = True
        return mask_T

    def split(self, passes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the tokens `passes` (None: all) those that are kept, and the others."""
        if passes is None:
            return self.rows, self.others
        kept_C = self._mask_T.index_select(0, passes)
        return passes[kept_C], passes[~kept_C]

    def _places(self, ranges: Sequence[tuple[int, int]]) -> Tensor:
        return runs([start for start, _ in ranges], [end - start for start, end in ranges], self.device)


@dataclass(kw_only=True)
class Piece:
    """Some tokens of a pack, and which of them keep the model's dtype; None: all are in one precision."""

    queries: QueryPiece
    kept: Kept | None
    normed: Normed | None = None  # the stream as whoever reads it next wants it, if its last sum gave that

    @property
    def rows(self) -> slice:
        return self.queries.rows

    def take_(self, step: Step, stream_TD: Tensor, *inputs_T: Tensor) -> None:
        """Take a step on its tokens of the residual stream, each in its precision.

        The inputs are the piece's alone. Where no tokens are kept apart, sums over ranks may be on their way
        afterwards.
        """
        rows_TD = stream_TD[self.rows]
        if self.kept is None:
            self.normed = step(rows_TD, *inputs_T, later=True)
        else:
            self.normed = self.kept.in_both_(step, rows_TD, *inputs_T)

    def give_normed(self) -> Normed | None:
        """Leave `normed` to its last reader."""
        normed, self.normed = self.normed, None
        return normed


def kept_of(segments: Segments, shape: ModelShape) -> Kept | None:
    """Each document's last `WINDOW` tokens, and all of those that are too short to gain; None if that is all.

    Each document, or what is left of it, is judged by itself, so that it is computed alike whatever its pack.
    """
    ranges: list[tuple[int, int]] = []
    for start, end in segments.ranges():
        first = max(start, end - WINDOW) if worthwhile(end - start, shape, segments.device) else start
        if first == end:
            continue
        if ranges and ranges[-1][1] == first:
            first = ranges.pop()[0]
        ranges.append((first, end))
    if sum(end - start for start, end in ranges) == segments.total:
        return None
    return Kept(tuple(ranges), segments.total, segments.device)


def worthwhile(length: int, shape: ModelShape, device: torch.device) -> bool:
    """Whether fp8 makes a document of so many tokens faster."""
    weights = shape.hidden * (shape.heads * shape.head_dim + 3 * shape.ffn_per_token)
    return length * weights >= LEAST_WORK or device.type != "cuda"


def feed_forward(
    decoder: Decoder,
    layer: int,
    hidden_TD: Tensor,
    selection: Selection,
    kept: Kept | None,
    pieces: Sequence[Piece],
    read_B: Tensor | None,
    *,
    norms: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Take the tokens selected through the network: those (None: all) by default, and those in fp8.

    Of them only `read_B`, if that is given: what becomes of the others is not read. `kept` are the tokens
    that keep the model's dtype, and `pieces` has them of each piece of the pack. With `norms` pieces get what
    the next layer reads, where one kernel makes that with the sum.
    """
    ffn, ffn_fp8 = selection.live if selection.ffn is None else selection.ffn, selection.ffn_fp8
    if read_B is not None:
        ffn = read_B if ffn is None else ffn[torch.isin(ffn, read_B)]
        ffn_fp8 = None if ffn_fp8 is None else ffn_fp8[torch.isin(ffn_fp8, read_B)]
    if ffn is not None and len(ffn) == len(hidden_TD):
        ffn = None
    if decoder.ranks is not None and not (ffn is None and ffn_fp8 is None and kept is None):
        decoder.ranks.settle()  # what is gathered is read
    if ffn is None and ffn_fp8 is None:
        for piece in pieces:
            step = partial(decoder.add_feed_forward_, layer, normed=piece.give_normed(), norms=norms)
            piece.take_(step, hidden_TD)
        return (None, None) if kept is None else kept.split(None)
    for piece in pieces:
        piece.give_normed()  # which is not of the stream as the network leaves it
    if ffn_fp8 is None and kept is not None:
        ffn, ffn_fp8 = kept.split(ffn)
    if ffn_fp8 is None:
        feed_forward_(decoder, layer, hidden_TD, ffn)
    else:
        feed_forward_(decoder, layer, hidden_TD, ffn, fp8=False)
        feed_forward_(decoder, layer, hidden_TD, ffn_fp8, fp8=True)
    return ffn, ffn_fp8


def feed_forward_(
    decoder: Decoder,
    layer: int,
    hidden_TD: Tensor,
    passes: Tensor | None,
    fp8: bool | None = None,
) -> None:
    """Add the feed-forward network's output in place, for the tokens `passes` (None: all).

    The network and its norm run on the gathered tokens alone, a piece at a time; the rows of the others are
    not touched. `fp8` says in which precision, None in that of all linear layers.
    """
    if passes is None:
        decoder.add_feed_forward_(layer, hidden_TD, fp8, later=True)
        return
    for rows in decoder.pieces(len(passes)):
        chosen_C = passes[rows]
        chosen_CD = hidden_TD.index_select(0, chosen_C)
        decoder.add_feed_forward_(layer, chosen_CD, fp8)
        hidden_TD.index_copy_(0, chosen_C, chosen_CD)
