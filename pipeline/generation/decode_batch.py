"""The rows that take decode steps together, wherever their keys and values lie.

What a step works on stays at its place on the device, so that it can be replayed as a CUDA graph, and it is
the device that counts: how many of its drafts a row accepts, the host learns later. Rows are the batch's
first columns; where a batch is padded to the size of a graph, the columns behind them read and write a slot
of nobody. Letters: C columns that there are, B those of a step, L layers, N drafts of a row at most, K tokens
that a step makes of it at most, Q queries of a step, X numbers that are kept of a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.families.step_skipping import StepSkipping
from pipeline.generation.graphs import StepSize
from pipeline.generation.lookup import Lookup, Spread, Texts, drafts_of
from pipeline.generation.sampling import Draws, RowDraws, next_tokens
from pipeline.generation.step_tables import (
    Drafts,
    DrawTable,
    PenaltyTable,
    Queries,
    Seat,
    SharedQueries,
    SharedTables,
    to_device,
)
from pipeline.generation.token_masks import MaskTable, logprobs_of
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots, HostSlots
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.kernels.segments import on_device
from pipeline.model.cache import KeysValues, MemoryCache
from pipeline.ranks.leading import OnEachRank, on_every_rank

NOTHING = -2  # in place of a token that a step might have made


class DecodeBatch(OnEachRank):
    """Up to `capacity` rows. Raises nothing but what the device does."""

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        kv: KeysValues,
        *,
        capacity: int,
        longest: int,
        new_tokens: int,
        numbers: int = 0,
        penalises: bool = False,
        lookup: Lookup | None = None,
        scored: int | None = None,
    ) -> None:
        """No row ever has more than `longest` tokens in a layer, of which it makes `new_tokens` at most.

        With `lookup` there must be a slot of nobody, and room behind `new_tokens` for a row's drafts. There
        is room for so many `numbers` of a row that is drawn, and for more once one needs them; and with
        `penalises` for the tokens of rows that have a penalty, else once one has. With `scored` it tells the
        log-probabilities of tokens, and the logits of up to so many others that may follow.
        """
        self._decoder, self._attention, self._kv = decoder, attention, kv
        self._new_tokens = new_tokens
        device, layers, drafts = decoder.device, decoder.shape.layers, drafts_of(lookup)
        self._longest = longest + drafts
        # attention needs no counts of the host
        self._by_device = attention.captures(device, decoder.dtype, decoder.shape.head_dim)
        self.rows = 0
        self._state_XC = torch.zeros((2 * layers + 7, capacity + 1), dtype=torch.int32, device=device)
        self._starts_LC, self._used_LC = self._state_XC[:layers], self._state_XC[layers : 2 * layers]
        self._used_LC.fill_(1)  # the newest token, which is to be stored, counts
        of_column = self._state_XC[2 * layers :]
        self._tokens_C, self._position_C, self._reach_C = of_column[:3]  # of that token
        # how many tokens there are of the answer, and at most; and whether the column has a row
        self._drawn_C, self._most_C, self._lines_C, self._moving_C = of_column[3:]
        self._nobody_X1 = self._state_XC[:, :1].clone()
        # of each column, how many drafts the last step verified, and the tokens that it made
        self.outcome_CX = torch.zeros((capacity, 2 + drafts), dtype=torch.int64, device=device)
        self._queries_B1 = torch.arange(capacity + 1, dtype=torch.int32, device=device)
        self._index_K = torch.arange(1 + drafts, dtype=torch.int32, device=device)
        self._shared = SharedTables(decoder.own, capacity, device, drafts)
        self.skipping: StepSkipping | None = None  # of a row that is decoded alone
        self._ranks = decoder.ranks
        decides = self._ranks is None or self._ranks.leads  # which tokens follow; other ranks are told
        self._texts = (
            None if lookup is None or not decides else Texts(lookup, capacity, self._longest, device)
        )
        self._draws = DrawTable(capacity, device, numbers if decides else 0)
        self._penalties = PenaltyTable(capacity, decoder.shape.vocab, device, is_needed=penalises and decides)
        self.masks = MaskTable(decoder, capacity, scored or 0)
        # of each column the log-probabilities of the tokens that the last step made, and those logits
        self.scores_CX: Tensor | None = None
        if scored is not None and decides:
            self.scores_CX = torch.zeros((capacity, 1 + drafts + scored), dtype=torch.float32, device=device)

    @property
    def capacity(self) -> int:
        return len(self.outcome_CX)

    @property
    def shares(self) -> bool:
        """Whether a step attends to documents that several rows share."""
        return bool(self._shared)

    def size(self, columns: int, queries: int, *, masked: bool = False) -> StepSize:
        """Of a step with so many columns and queries, as the rows that there are need it.

        A step that is `masked` has no drafts, and ends with `choose`.
        """
        draws = self._draws
        return StepSize(
            columns,
            queries,
            shares=bool(self._shared),
            numbers=draws.numbers,
            sorts=draws.sorts,
            floors=draws.floors,
            penalises=self._penalties.penalises,
            masked=masked,
        )

    @torch.inference_mode()
    def join(
        self, seats: Sequence[Seat], tokens: Sequence[int], draws: Sequence[RowDraws | None] = ()
    ) -> None:
        """Add rows behind those that are there, each with its newest token, and what it draws by, if any."""
        first = self.rows
        self._sit([replace(seat, prompt=None) for seat in seats], list(tokens))
        draws = draws or [None] * len(seats)
        self._draws.join(draws)
        self._penalties.join(draws, [seat.prompt for seat in seats], tokens)
        if self._texts is not None:
            for column, (seat, token) in enumerate(zip(seats, tokens, strict=True), first):
                assert seat.prompt is not None
                self._texts.join(column, torch.from_numpy(seat.prompt), token)

    @on_every_rank
    def _sit(self, seats: Sequence[Seat], tokens: Sequence[int]) -> None:
        """Add rows to what a step reads."""
        first, last = self.rows, self.rows + len(seats)
        assert last <= self.capacity, "more rows than the batch has columns"
        columns = [
            (
                *seat.starts,
                *(used + 1 for used in seat.used),
                token,
                seat.position,
                seat.reach,
                1,
                self._new_tokens if seat.new_tokens is None else seat.new_tokens,
                seat.line,
                1,
            )
            for seat, token in zip(seats, tokens, strict=True)
        ]
        to_device(self._state_XC[:, first:last], np.array(columns, np.int32).T)
        self._shared.extents += [seat.shared for seat in seats]
        self.rows = last
        self._shared.tell_device()

    @torch.inference_mode()
    def keep(self, columns: Sequence[int], starts: Sequence[Sequence[int]] | None = None) -> None:
        """Go on with the rows in these columns, in this order; `starts` where they have been moved."""
        chosen = list(columns)
        if self._texts is not None and chosen != list(range(len(chosen))):
            self._texts.keep(on_device(chosen, self._state_XC.device))
        self._draws.keep(chosen)
        self._penalties.keep(chosen)
        self._stay(chosen, None if starts is None else np.array(starts, np.int32))

    @on_every_rank
    def _stay(self, chosen: Sequence[int], starts: np.ndarray | None) -> None:
        """Keep rows in what a step reads."""
        kept = len(chosen)
        if list(chosen) != list(range(kept)):
            order_B = on_device(chosen, self._state_XC.device)
            self._state_XC[:, :kept] = self._state_XC.index_select(1, order_B)
        if starts is not None and kept:
            to_device(self._starts_LC[:, :kept], starts.T)
        self._state_XC[:, kept : self.rows] = self._nobody_X1
        self._shared.extents = [self._shared.extents[column] for column in chosen]
        self.rows = kept
        self._shared.tell_device()

    @on_every_rank
    @torch.inference_mode()
    def place(self, places: Sequence[tuple[int, int, int]] | Tensor) -> None:
        """Let rows go on from other places of their answers: numbers of the host, or of the device, (N, 3).

        Of each they say the column, how many tokens of the answer there are, and the newest of them; keys and
        values must be those of the tokens before it.
        """
        places_N3 = places if isinstance(places, Tensor) else on_device(places, self._state_XC.device)
        column_N, drawn_N, token_N = places_N3.T
        behind_N = (drawn_N - self._drawn_C[column_N]).int()
        self._used_LC[:, column_N] += behind_N
        self._position_C[column_N] += behind_N
        self._drawn_C[column_N] = drawn_N.int()
        self._tokens_C[column_N] = token_N.int()

    @torch.inference_mode()
    def step(self, size: StepSize) -> None:
        """Run the newest tokens of the first columns through the model, with drafts if it has more queries.

        Reads nothing of the host that changes from step to step, if the attention `captures`. Says in
        `outcome_CX` what came of it, and goes on to the newest of these tokens; if it is masked, not before
        `choose`.
        """
        decoder, kv = self._decoder, self._kv
        drafts = self._drafts(size) if size.queries > size.columns else None
        asked = self._queries(size.columns, drafts)
        hidden_QD = decoder.embed(asked.tokens_Q)
        rope = decoder.rope(hidden_QD, asked.position_Q, asked.reach_Q)
        shared = self._shared.of_step(size, drafts and drafts.spread) if size.shares else None
        step_layer_ = decoder.step_layer_ if self.skipping is None else self.skipping.step_layer_
        normed = None  # the next layer's input, where a layer's last kernel makes it
        for layer in range(decoder.shape.layers):
            if isinstance(kv, MemoryCache):
                kv.layer_(decoder, layer, hidden_QD, (1,) * size.columns)
                continue
            target = KvTarget(*kv.buffers(layer), asked.places_LQ[layer], kv.scales(layer), asked.lines_Q)
            slots = self._slots(layer, size.columns, asked, shared)

            def attend(q_QHd: Tensor, layer: int = layer, slots: DecodeSlots = slots) -> Tensor:
                kv.ready(layer)
                sinks_H = decoder.sinks(layer)
                attended_QHd = self._attention.decode(q_QHd, *kv.buffers(layer), slots, sinks_H)
                kv.observe(layer, q_QHd)
                return attended_QHd

            normed = step_layer_(layer, hidden_QD, rope, target, attend, normed)
        logits_QV = decoder.head(hidden_QD)
        if not size.masked:
            self._end(logits_QV, size, asked, drafts)
        elif self._decides:
            self.masks.hold(logits_QV)

    @torch.inference_mode()
    def choose(self, size: StepSize) -> None:
        """End a masked step of this size, once the masks of its columns are on the device."""
        logits_QV = self.masks.held(size.columns) if self._decides else None
        self._end(logits_QV, size, self._queries(size.columns, None), None)

    @property
    def _decides(self) -> bool:
        """Whether this rank chooses what follows, or is told."""
        return self._ranks is None or self._ranks.leads

    def _end(self, logits_QV: Tensor | None, size: StepSize, asked: Queries, drafts: Drafts | None) -> None:
        if self._ranks is None:
            assert logits_QV is not None
            next_Q = self._following(logits_QV, size, asked, drafts)
        elif self._ranks.leads:
            assert logits_QV is not None
            next_Q = self._ranks.from_first_(self._following(logits_QV, size, asked, drafts).long())
        else:
            next_Q = self._ranks.from_first_(torch.empty_like(asked.tokens_Q, dtype=torch.int64))
        self._take(next_Q, size.columns, drafts)
        if size.penalises and self._decides:
            self._penalties.take(self.outcome_CX[: size.columns, 1:], self._tokens_C[: size.columns])

    def _following(self, logits_QV: Tensor, size: StepSize, asked: Queries, drafts: Drafts | None) -> Tensor:
        """(Q,) the token that follows each query, whose scores are noted where they are asked for."""
        left_QV, newest_B = logits_QV, self._tokens_C[: size.columns]
        if size.penalises:
            ahead = (None, None) if drafts is None else (drafts.tokens_BN, drafts.spread)
            left_QV = self._penalties.applied(left_QV, newest_B, *ahead)
        if size.masked:
            left_QV = self.masks.applied(left_QV)
        next_Q = self._chosen(left_QV, self._draws.of_step(size, asked.column_Q, asked.drawn_Q))
        if self.scores_CX is not None:
            logprobs_BK = self._of_columns(logprobs_of(logits_QV, next_Q), drafts)
            scores_BX = self.scores_CX[: size.columns]
            scores_BX[:, : logprobs_BK.shape[1]] = logprobs_BK
            if size.masked:
                self.masks.asked_logits(logits_QV, scores_BX)
        return next_Q

    def _drafts(self, size: StepSize) -> Drafts:
        most = size.queries - size.columns
        if self._texts is not None:
            tokens_BN, count_B = self._texts.drafts(self._moving_C[: size.columns], most)
        else:
            tokens_BN = self._tokens_C.new_empty(size.columns, len(self._index_K) - 1)
            count_B = self._tokens_C.new_empty(size.columns)
        if self._ranks is not None:
            tokens_BN, count_B = (self._ranks.from_first_(x.int()) for x in (tokens_BN, count_B))
        return Drafts(tokens_BN, count_B, Spread.of(count_B + 1, size.queries))

    def _queries(self, columns: int, drafts: Drafts | None) -> Queries:
        """Of a step: each column's newest token, and the drafts behind it."""
        used_LB = self._used_LC[:, :columns]
        places_LB = (self._starts_LC[:, :columns] + used_LB - 1).long()
        layers = self._decoder.shape.layers
        tokens_B, position_B, reach_B, drawn_B, _, lines_B, _ = self._state_XC[2 * layers :, :columns]
        if drafts is None:
            bounds_B1 = self._queries_B1[: columns + 1]
            own = (bounds_B1[:-1], tokens_B, position_B, reach_B, drawn_B, places_LB, lines_B)
            return Queries(*own, used_LB=used_LB, bounds_B1=bounds_B1, most=1)
        _, column_Q, index_Q, spare_Q = drafts.spread
        tokens_BK = torch.cat([tokens_B[:, None], drafts.tokens_BN], 1)
        most = tokens_BK.shape[1]
        return Queries(
            column_Q=column_Q,
            tokens_Q=tokens_BK[column_Q, index_Q.clamp(max=most - 1)],
            # what pads the step is nobody's
            position_Q=(position_B[column_Q] + index_Q).masked_fill(spare_Q, 0),
            reach_Q=reach_B[column_Q],
            drawn_Q=drawn_B[column_Q] + index_Q,
            places_LQ=(places_LB[:, column_Q] + index_Q).masked_fill(spare_Q, 0),
            lines_Q=lines_B[column_Q].masked_fill(spare_Q, 0),
            used_LB=used_LB + drafts.count_B,
            bounds_B1=drafts.spread.bounds_N1,
            most=most,
        )

    def _chosen(self, logits_QV: Tensor, draws: Draws | None) -> Tensor:
        """(Q,) the token that follows each query."""
        return next_tokens(logits_QV, draws)

    def _take(self, next_Q: Tensor, columns: int, drafts: Drafts | None) -> None:
        """Go on to the newest of the tokens that a step made."""
        drawn_B, moving_B = self._drawn_C[:columns], self._moving_C[:columns]
        next_BK, verified_B = self._of_columns(next_Q, drafts), torch.zeros_like(drawn_B)
        accepted_B = verified_B
        if drafts is not None:
            verified_B = drafts.count_B
            right_BN = next_BK[:, :-1] == drafts.tokens_BN
            right_BN &= self._index_K[:-1] < verified_B[:, None]
            accepted_B = right_BN.int().cumprod(1).sum(1).int()
        made_B = (accepted_B + 1).minimum(self._most_C[:columns] - drawn_B).clamp(min=0) * moving_B
        there_BK = self._index_K[: next_BK.shape[1]] < made_B[:, None]
        self.outcome_CX[:columns] = NOTHING
        self.outcome_CX[:columns, 0] = verified_B
        self.outcome_CX[:columns, 1 : 1 + next_BK.shape[1]] = next_BK.masked_fill(~there_BK, NOTHING)
        if self._texts is not None:
            self._texts.take(next_BK, made_B, verified_B, accepted_B)
        # rows are looked up by their tokens, those that have ended too: NOT_FINITE would be no row
        newest_B = next_BK.gather(1, (made_B - 1).clamp(min=0).long()[:, None])[:, 0].clamp(min=0)
        self._tokens_C[:columns] = torch.where(made_B > 0, newest_B, self._tokens_C[:columns])
        self._used_LC[:, :columns] += made_B
        self._position_C[:columns] += made_B
        self._drawn_C[:columns] += made_B

    def _of_columns(self, values_Q: Tensor, drafts: Drafts | None) -> Tensor:
        """(B, K) values of queries by the columns that they are of."""
        if drafts is None:
            return values_Q[:, None]
        at_BK = drafts.spread.bounds_N1[:-1, None] + self._index_K
        return values_Q[at_BK.clamp(max=len(values_Q) - 1)]

    def _slots(self, layer: int, columns: int, asked: Queries, shared: SharedQueries | None) -> DecodeSlots:
        scales, starts_B1 = self._kv.scales(layer), self._starts_LC[layer, : columns + 1]
        window, used_B, host = self._decoder.shape.window(layer), asked.used_LB[layer], None
        if window is not None and asked.most > 1:
            return self._slots_of_queries(layer, asked).within(window)
        if asked.most == 1 and not self._by_device:
            host = HostSlots(tuple(starts_B1[:-1].tolist()), used_B.tolist(), (1,) * columns)
        slots = DecodeSlots(
            longest=self._longest,
            used_B=used_B,
            bounds_B1=starts_B1,
            queries_B1=asked.bounds_B1,
            most_queries=asked.most,
            host=host,
            shared=None if shared is None else self._shared.ranges(layer, shared, self._longest, scales),
            scales=scales,
            lines_B=None if scales is None else self._lines_C[:columns],
        )
        return slots.within(window)

    def _slots_of_queries(self, layer: int, asked: Queries) -> DecodeSlots:
        """Of each query its own, as of a document of one: in a window those of a row differ by a slot."""
        scales, starts_Q = self._kv.scales(layer), self._starts_LC[layer][asked.column_Q]
        queries = len(starts_Q)
        places_Q = asked.places_LQ[layer].int()
        return DecodeSlots(
            longest=self._longest,
            used_B=(places_Q + 1 - starts_Q).clamp(min=0),  # what pads the step has none
            bounds_B1=torch.cat([starts_Q, starts_Q[:1]]),
            queries_B1=torch.arange(queries + 1, dtype=torch.int32, device=starts_Q.device),
            most_queries=1,
            host=None,
            scales=scales,
            lines_B=None if scales is None else asked.lines_Q,
        )


@on_every_rank
def batch_for(decoder: Decoder, attention: AttentionBackend, kv: KeysValues, **options: Any) -> DecodeBatch:
    """A `DecodeBatch` of these, and of the others of its arguments."""
    return DecodeBatch(decoder, attention, kv, **options)
