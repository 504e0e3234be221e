"""Generating answers, all rows of a batch together, a token a step; rows come and go between steps.

On a GPU the host does not wait for a step before it queues the next one: it sees the tokens of a step while
the next one runs, so that a row that stops takes part in one step more, whose token is thrown away. A row
that has all its tokens is known to end without looking, and takes part in none.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend
from pipeline.model.cache import KeysValues
from pipeline.model.decode_batch import NOTHING, DecodeBatch, Seat
from pipeline.model.graphs import DecodeStats, StepRunner, StepSize, recorder_for
from pipeline.model.lookup import DraftPace, Lookup, drafts_of
from pipeline.model.prefill import Prefilled
from pipeline.model.reasoning import answer_start
from pipeline.model.sampling import NOT_FINITE, Draws, RowDraws, Sampling, next_tokens, with_penalties
from pipeline.model.stopping import StopTexts
from pipeline.model.store import rows_in
from pipeline.records import Reasoning, RowError

NOT_FINITE_MESSAGE = "the model's output is not finite; try another --dtype or --attention"
LATE = {"cpu": 0, "cuda": 1}  # steps that are queued before the tokens of one are looked at


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When an answer ends."""

    max_new_tokens: int
    token_ids: frozenset[int] = frozenset()  # never part of the answer
    texts: StopTexts | None = None

    def reason(self, tokens: Sequence[int], start: int | None = 0) -> str | None:
        """Why the answer ends with its newest token: `stop`, `stop_text`, `length`, or None.

        `start` is its first token, behind the model's reasoning; None while the model reasons.
        """
        if tokens[-1] in self.token_ids:
            return "stop"
        if self.texts is not None and self.texts.found(tokens, start):
            return "stop_text"
        return "length" if len(tokens) >= self.max_new_tokens else None


@dataclass(kw_only=True, eq=False)
class Generated:
    """One row's answer in tokens, without the stop token, while it grows and when it is done."""

    rules: StopRules
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # as `StopRules.reason` says it, or `not_finite`
    finished_at: float = 0.0  # time.perf_counter()
    queued: int = 1  # tokens that are there or will be at least: that of the prefill, and one a step
    drafts: int | None = None  # that were verified, where any are looked up
    accepted: int = 0  # of them, which are part of the answer
    reasoning: Reasoning | None = None  # what its prompt says of it
    start: int | None = field(init=False)  # the token from which stop texts count; None: from none so far

    def __post_init__(self) -> None:
        self.start = None if self.reasoning is Reasoning.BEGUN else 0

    @property
    def unqueued(self) -> int:
        """How many more tokens than are there, or queued, the answer may have."""
        return self.rules.max_new_tokens - self.queued

    def take(self, token: int) -> None:
        """Add a token, and end the answer where it ends."""
        if token == NOT_FINITE:
            self.finish_reason, self.finished_at = "not_finite", time.perf_counter()
            return
        self.tokens.append(token)
        rules = self.rules
        if self.reasoning is not None and rules.texts is not None:
            self.start = answer_start(self.tokens, self.start, self.reasoning, rules.texts.tokenizer)
        self.finish_reason = rules.reason(self.tokens, self.start)
        if self.finish_reason is None:
            return
        self.finished_at = time.perf_counter()
        if self.finish_reason == "stop":
            self.tokens.pop()

    def take_step(self, drafts: int, tokens: Sequence[int]) -> int:
        """Add what a step made, up to where the answer ends; returns how many drafts are among it."""
        before = len(self.tokens)
        for token in tokens:
            if token == NOTHING or self.finish_reason is not None:
                break
            self.take(token)
        accepted = min(drafts, max(0, len(self.tokens) - before - 1))
        if self.drafts is not None:
            self.drafts, self.accepted = self.drafts + drafts, self.accepted + accepted
        return accepted


class _Queued(NamedTuple):
    """A step on its way: whose tokens it makes, and where what came of it will be on the host."""

    rows: list[Generated]
    outcome: Tensor
    done: torch.cuda.Event | None
    verifies: bool  # drafts


class DecodeLoop:
    """A batch of growing answers over one `kv`, which holds the keys and values of its rows."""

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        kv: KeysValues,
        *,
        new_tokens: int,
        sampling: Sampling,
        capacity: int,
        longest: int,
        lookup: Lookup | None = None,
        graphs: bool = True,
        stats: DecodeStats | None = None,
        late: int | None = None,
    ) -> None:
        """Up to `capacity` rows of at most `longest` tokens in a layer; `late` as in `LATE`.

        Most answers have up to `new_tokens` tokens and are drawn by `sampling`: for those a step is captured
        before it is needed.
        With `lookup` drafts are verified, for which each row needs `room` behind its prompt.
        """
        assert lookup is None or kv.has_spare_slot, "steps with drafts are padded"
        self.stats, self._sampling = stats or DecodeStats(), sampling
        self._numbers = 0 if sampling.is_greedy else new_tokens
        self._kv, self._lookup = kv, lookup
        self._pace = None if lookup is None else DraftPace(lookup)
        self._device = decoder.device
        self._batch = DecodeBatch(
            decoder,
            attention,
            kv,
            capacity=capacity,
            longest=longest,
            new_tokens=new_tokens,
            numbers=self._numbers,
            penalises=sampling.penalises,
            lookup=lookup,
        )
        captured = graphs and kv.on_device_alone
        self._runner = StepRunner(
            self._batch.step,
            recorder_for(decoder.device, decoder.dtype, attention) if captured else None,
            attention,
            self.stats,
        )
        self._pads = kv.has_spare_slot
        self._late = LATE[decoder.device.type] if late is None else late
        self.rows: list[Generated] = []  # those that take part in the next step, by their columns
        self._pending: deque[_Queued] = deque()

    def prepare(self) -> int:
        """Capture the steps of all sizes; returns how many there are."""
        columns = {self._runner.columns(rows, self.capacity) for rows in range(1, self.capacity + 1)}
        pairs = {(count, count) for count in columns}
        if self._lookup is not None:
            pairs |= {(count, self._lookup.queries(count, self._device)) for count in columns}
        sampling = self._sampling
        return self._runner.prepare(
            StepSize(
                *pair,
                numbers=self._numbers,
                sorts=sampling.sorts,
                floors=sampling.has_floor,
                penalises=sampling.penalises,
            )
            for pair in pairs
        )

    @property
    def capacity(self) -> int:
        return self._batch.capacity

    def room(self, row: Generated) -> int:
        """Slots that a row needs in each layer behind its prompt."""
        return row.rules.max_new_tokens + drafts_of(self._lookup)

    @property
    def is_busy(self) -> bool:
        """Whether answers grow, or tokens are on their way."""
        return bool(self.rows or self._pending)

    def join(
        self, rows: Sequence[Generated], seats: Sequence[Seat], draws: Sequence[RowDraws | None] = ()
    ) -> None:
        """Add rows that have their first token, and are to have more, with what each draws by, if any."""
        self._batch.join(seats, [row.tokens[-1] for row in rows], draws)
        self.rows += rows
        if self._pace is not None:
            self._pace.joined()
            for row in rows:
                row.drafts = 0

    def leave(self, gone: Sequence[Generated]) -> None:
        """Go on without these rows."""
        out = {id(row) for row in gone}
        columns = [column for column, row in enumerate(self.rows) if id(row) not in out]
        if len(columns) < len(self.rows):
            self._batch.keep(columns)
            self.rows = [self.rows[column] for column in columns]

    def moved(self, starts: Sequence[Sequence[int]]) -> None:
        """Learn where the tokens of the rows lie now, each by layer."""
        self._batch.keep(range(len(self.rows)), starts)

    def step(self) -> list[Generated]:
        """Queue a step for the rows that there are, and look at the oldest one on its way if it is time.

        Returns the rows that ended, which have left.
        """
        if self.rows:
            self._queue()
        if len(self._pending) > (self._late if self.rows else 0):
            return self._look()
        return []

    def drain(self) -> list[Generated]:
        """Look at all steps that are on their way; returns the rows that ended."""
        ended: list[Generated] = []
        while self._pending:
            ended += self._look()
        return ended

    def _queue(self) -> None:
        batch, count = self._batch, len(self.rows)
        columns = self._runner.columns(count, batch.capacity) if self._pads else count
        size = batch.size(columns, self._queries(columns))
        self._runner.run(size, max(row.unqueued for row in self.rows))
        self._kv.stepped()
        outcome = _to_host(batch.outcome_CX[:count])
        self._pending.append(_Queued(self.rows.copy(), *outcome, size.queries > columns))
        for row in self.rows:
            row.queued += 1
        self.leave([row for row in self.rows if row.unqueued <= 0])

    def _queries(self, columns: int) -> int:
        """Of the next step."""
        if self._lookup is None or self._pace is None:
            return columns
        queries = self._lookup.queries(columns, self._device)
        if queries > columns and self._pace.drafts(self._lookup.cost(columns, self._device)):
            return queries
        return columns

    def _look(self) -> list[Generated]:
        queued = self._pending.popleft()
        if queued.done is not None:
            queued.done.synchronize()
        going = [row for row in queued.rows if row.finish_reason is None]
        accepted = 0
        for row, (drafts, *tokens) in zip(queued.rows, queued.outcome.tolist(), strict=True):
            if row.finish_reason is None:
                accepted += row.take_step(drafts, tokens)
        if self._pace is not None and queued.verifies and going:
            self._pace.made(len(going), accepted)
        ended = [row for row in going if row.finish_reason is not None]
        self.leave(ended)
        return ended

    def close(self) -> None:
        """Free the graphs."""
        self._runner.close()


def _to_host(outcome_BX: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """What came of a step on its way to the host, behind the step."""
    if not outcome_BX.is_cuda:
        return outcome_BX.clone(), None
    host = torch.empty(outcome_BX.shape, dtype=outcome_BX.dtype, pin_memory=True)
    host.copy_(outcome_BX, non_blocking=True)
    return host, torch.cuda.current_stream(outcome_BX.device).record_event()


@torch.inference_mode()
def first_tokens(
    logits_BV: Tensor, draws: Sequence[RowDraws | None] = (), prompts: Sequence[np.ndarray] = ()
) -> list[int]:
    """The first token of each prompt, `NOT_FINITE` among them; waits for the device.

    `draws` says what each is chosen by, None for the largest logit; without it all are so. `prompts` are
    their token ids, which a penalty is for.
    """
    if not any(draws):
        return next_tokens(logits_BV, None).tolist()
    logits_BV = with_penalties(logits_BV, draws, prompts)
    return next_tokens(logits_BV, Draws.first(draws, logits_BV.device)).tolist()


@torch.inference_mode()
def decode(
    decoder: Decoder,
    attention: AttentionBackend,
    prefilled: Prefilled,
    rules: StopRules,
    *,
    sampling: Sampling | None = None,
    draws: Sequence[RowDraws | None] = (),
    first: Sequence[int] | None = None,
    prompts: Sequence[np.ndarray] = (),
    reasoning: Sequence[Reasoning | None] | None = None,
    check: Callable[[], None] = lambda: None,
    graphs: bool = True,
    stats: DecodeStats | None = None,
    late: int | None = None,
    kv_dtype: torch.dtype | None = None,
    again: bool = False,
) -> list[Generated]:
    """Answers to all prompts of one prefill, beside no others; greedy ones without `sampling`.

    Of answers that are drawn `draws` says by what, by default as rows 0, 1, ... are. `first` are the first
    tokens, if they have been chosen, `prompts` the token ids of each, which a repetition penalty is for, and
    `reasoning` is what each prompt says of it. With a `kv_dtype` of float8_e4m3fn keys and values are rounded
    to it first, and those of the prefill freed, unless it is to be decoded `again`. `check` is called before
    every step, and may raise to give the pack up. Raises RowError where the model's output is not finite.
    """
    sampling = sampling or Sampling()
    count = len(prefilled.lengths)
    draws = draws or [sampling.draws(row, rules.max_new_tokens) for row in range(count)]
    if first is None:
        first = first_tokens(prefilled.logits_BV, draws, prompts)
    answers = [Generated(rules=rules, reasoning=each) for each in reasoning or [None] * count]
    for answer, token in zip(answers, first, strict=True):
        answer.take(token)
    cache = prefilled.cache
    own = [cache.used(b) for b in range(count)]
    dtype = kv_dtype or decoder.dtype
    converts = dtype != decoder.dtype
    frees = converts and not again
    kv, extents, documents = rows_in(
        cache, decoder.shape, rules.max_new_tokens, dtype=dtype, converts=converts, frees=frees
    )
    shared = [None] * count if cache.shared is None else [documents[g] for g in cache.shared.of_row]
    loop = DecodeLoop(
        decoder,
        attention,
        kv,
        new_tokens=rules.max_new_tokens,
        sampling=sampling,
        capacity=count,
        longest=max(map(max, own)) + rules.max_new_tokens,
        graphs=graphs,
        stats=stats,
        late=late,
    )
    live = [b for b, answer in enumerate(answers) if answer.finish_reason is None]
    seats = [
        Seat(
            starts=extents[b].starts if extents else cache.starts(b),
            used=own[b],
            position=prefilled.next_positions[b],
            reach=cache.reaches[b],
            line=extents[b].line if extents else 0,
            shared=shared[b],
            prompt=prompts[b] if prompts else None,
        )
        for b in live
    ]
    try:
        if live:
            loop.join([answers[b] for b in live], seats, [draws[b] for b in live])
        while loop.is_busy and not _any_not_finite(answers):
            check()
            loop.step()
    finally:
        loop.close()
    if _any_not_finite(answers):
        raise RowError("not_finite", NOT_FINITE_MESSAGE)
    return answers


def _any_not_finite(answers: Sequence[Generated]) -> bool:
    return any(answer.finish_reason == "not_finite" for answer in answers)
