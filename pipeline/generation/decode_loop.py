"""Generating answers, all rows of a batch together, a token a step; rows come and go between steps.

On a GPU the host does not wait for a step before it queues the next one: it sees the tokens of a step while
the next one runs, so that a row that stops takes part in one step more, whose token is thrown away. A row
that has all its tokens is known to end without looking, and takes part in none, unless the last of them may
be refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.families.step_skipping import StepSkipping
from pipeline.generation.decode_batch import batch_for
from pipeline.generation.generated import Generated
from pipeline.generation.lookup import DraftPace, Lookup, drafts_of
from pipeline.generation.sampling import RowDraws, Sampling
from pipeline.generation.step_tables import Seat, to_host
from pipeline.kernels.attention import AttentionBackend
from pipeline.model.cache import KeysValues
from pipeline.model.graphs import DecodeStats, StepSize, runner_for
from pipeline.pruning.capabilities import StepSkips
from pipeline.structured.matchers import Visit

LATE = {"cpu": 0, "cuda": 1}  # steps that are queued before the tokens of one are looked at


class _Queued(NamedTuple):
    """A step on its way: whose tokens it makes, and where what came of it will be on the host."""

    rows: list[Generated | None]  # None: one that is taken back, whose token here is nobody's
    outcome: Tensor
    scores: Tensor | None  # see `DecodeBatch.scores_CX`
    done: torch.cuda.Event | None
    verifies: bool  # drafts
    visits: Sequence[Visit | None]  # of each row, if it did not go on but weighed choices


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
        mask_words: int | None = None,
        scored: int | None = None,
        graphs: bool = True,
        stats: DecodeStats | None = None,
        late: int | None = None,
        skips: StepSkips | None = None,
    ) -> None:
        """Up to `capacity` rows of at most `longest` tokens in a layer; `late` as in `LATE`.

        Most answers have up to `new_tokens` tokens and are drawn by `sampling`, with `mask_words` under a
        form with masks of so many words: for those a step is captured before it is needed.
        With `lookup` drafts are verified, for which each row needs `room` behind its prompt. `scored` is as
        `DecodeBatch` takes it. With `skips` there is one row at a time, and steps are not captured.
        """
        assert lookup is None or kv.has_spare_slot, "steps with drafts are padded"
        self.stats, self._sampling = stats or DecodeStats(), sampling
        self._numbers = 0 if sampling.is_greedy else new_tokens
        self._kv, self._lookup = kv, lookup
        self._pace = None if lookup is None else DraftPace(lookup)
        self._device = decoder.device
        self._batch = batch_for(
            decoder,
            attention,
            kv,
            capacity=capacity,
            longest=longest,
            new_tokens=new_tokens,
            numbers=self._numbers,
            penalises=sampling.penalises,
            lookup=lookup,
            scored=scored,
        )
        if skips is not None:
            assert capacity == 1, "rows that leave networks out are decoded alone"
            self._batch.skipping = StepSkipping(decoder, skips)
        captured = graphs and kv.on_device_alone and skips is None
        self._runner, self._chooser = (
            runner_for(decoder, attention, half, stats, captured=captured)
            # a step that is masked is counted once
            for half, stats in ((self._batch.step, self.stats), (self._batch.choose, DecodeStats()))
        )
        self._masked = mask_words is not None
        if mask_words is not None:
            self._batch.masks.make(mask_words)
        self._pads = kv.has_spare_slot
        self._late = LATE[decoder.device.type] if late is None else late
        self.rows: list[Generated] = []  # those that take part in the next step, by their columns
        self._refused: list[Generated] = []  # whose newest token may not follow: they are taken back
        self._pending: deque[_Queued] = deque()

    def prepare(self) -> int:
        """Capture the steps of all sizes; returns how many there are."""
        columns = {self._runner.columns(rows, self.capacity) for rows in range(1, self.capacity + 1)}
        pairs = {(count, count) for count in columns}
        if self._lookup is not None and not self._masked:
            pairs |= {(count, self._lookup.queries(count, self._device)) for count in columns}
        own = self._sampling
        size = StepSize(0, 0, False, self._numbers, own.sorts, own.has_floor, own.penalises, self._masked)
        sizes = [size._replace(columns=columns, queries=queries) for columns, queries in pairs]
        if self._masked:
            self._chooser.prepare(sizes)
        return self._runner.prepare(sizes)

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
        for row, drawn in zip(rows, draws or [None] * len(rows), strict=True):
            if row.guide is not None:
                row.guide.can_go_back = drawn is None and self._kv.on_device_alone
                self._batch.masks.make(len(row.guide.stops_W))
        self._batch.join(seats, [row.tokens[-1] for row in rows], draws)
        self.rows += rows
        if self._batch.skipping is not None:
            self._batch.skipping.begin()
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
        goes_on = any(row.unqueued > 0 for row in self.rows)
        ended = self._queue() if goes_on else []
        if len(self._pending) > (self._late if goes_on and self.rows else 0):
            ended += self._look()
        return ended

    def drain(self) -> list[Generated]:
        """Look at all steps that are on their way; returns the rows that ended."""
        ended: list[Generated] = []
        while self._pending:
            ended += self._look()
        return ended

    def _queue(self) -> list[Generated]:
        """Queue a step; returns the rows that ended by steps before it, if it had to wait for them."""
        batch, count = self._batch, len(self.rows)
        columns = self._runner.columns(count, batch.capacity) if self._pads else count
        masked = any(row.guide is not None for row in self.rows)
        size = batch.size(columns, columns if masked else self._queries(columns), masked=masked)
        steps_left = max(row.unqueued for row in self.rows)
        visits, back = self._visited(), self._taken_back()
        self._runner.run(size, steps_left)
        ended = self._choose(size, steps_left, visits, back) if masked else []
        self._kv.stepped()
        if batch.skipping is not None:
            self.rows[0].skipped_ffns.append(batch.skipping.skipped)
        outcome = to_host(batch.outcome_CX[:count], batch.scores_CX)
        rows = [None if row in self._refused else row for row in self.rows]
        self._pending.append(_Queued(rows, *outcome, size.queries > columns, visits))
        for row in filter(None, rows):
            row.queued += 1
        self.leave([row for row in self.rows if row.is_queued or row.finish_reason is not None])
        return ended

    def _visited(self) -> list[Visit | None]:
        """Let rows whose answers are there go on to the next place at which choices are to be weighed."""
        visits = [
            row.guide.visits.pop(0) if row.weighs is not None and row.guide is not None else None
            for row in self.rows
        ]
        places = [(column, each.length, each.token) for column, each in enumerate(visits) if each is not None]
        if places:
            self._batch.place(places)
        return visits

    def _taken_back(self) -> list[Generated]:
        """Let rows whose newest token may not follow go on from the one before it; returns them."""
        back = [(column, row) for column, row in enumerate(self.rows) if row in self._refused]
        self._refused.clear()
        if back:
            self._batch.place([(column, len(row.tokens), row.tokens[-1]) for column, row in back])
        return [row for _, row in back]

    def _choose(
        self, size: StepSize, steps_left: int, visits: Sequence[Visit | None], back: Sequence[Generated]
    ) -> list[Generated]:
        """Let rows with a form go on, for which the tokens before must be known.

        Where nearly anything may follow a row has no mask: its likeliest token is asked about once it is
        read, unless the row comes `back` from one that was refused. Returns the rows that the tokens before
        end. They are in this step still, and may take any token, as those may that these tokens take back.
        """
        ended: list[Generated] = []
        while self._pending:
            ended += self._read()
        guides = [row.guide if row.grows and row not in self._refused else None for row in self.rows]
        for guide, row in zip(guides, self.rows, strict=True):
            if guide is not None:
                guide.guesses = guide.can_go_back and row not in back and guide.is_open
        asked = [[] if guide is None else guide.asked for guide in guides]
        for column, (row, visit) in enumerate(zip(self.rows, visits, strict=True)):
            if visit is not None and row.guide is not None:
                asked[column] = row.guide.asked_at(visit)
        masked = [None if guide is None or guide.guesses else guide for guide in guides]
        self._batch.masks.fill(masked, asked, size.columns)
        self._chooser.run(size, steps_left)
        return ended

    def _queries(self, columns: int) -> int:
        """Of the next step."""
        if self._lookup is None or self._pace is None:
            return columns
        queries = self._lookup.queries(columns, self._device)
        if queries > columns and self._pace.drafts(self._lookup.cost(columns, self._device)):
            return queries
        return columns

    def _look(self) -> list[Generated]:
        ended = self._read()
        self.leave(ended)
        return ended

    def _read(self) -> list[Generated]:
        """Take in what the oldest step made; returns the rows that ended, which are still there."""
        queued = self._pending.popleft()
        if queued.done is not None:
            queued.done.synchronize()
        going = [row for row in queued.rows if row is not None and row.finish_reason is None]
        scores = [()] * len(queued.rows) if queued.scores is None else queued.scores.tolist()
        accepted = 0
        made = zip(queued.rows, queued.outcome.tolist(), scores, queued.visits, strict=True)
        for row, (drafts, *tokens), of_row, visit in made:
            if row is None:
                continue
            if visit is not None and row.finish_reason is None:
                row.take_visit(visit, of_row[len(tokens) :])
            elif row.refuses(tokens[0]):
                self._refused.append(row)
                row.queued -= 1
            elif row.grows:
                accepted += row.take_step(drafts, tokens, of_row)
                if row.weighs is not None and not self._can_visit(row):
                    row.end_visits()
        if self._pace is not None and queued.verifies and going:
            self._pace.made(len(going), accepted)
        return [row for row in going if row.finish_reason is not None]

    def _can_visit(self, row: Generated) -> bool:
        """Not with offloaded keys and values, which go forward alone, nor once it had all tokens and left."""
        return self._kv.on_device_alone and any(row is each for each in self.rows)

    def close(self) -> None:
        """Free the graphs."""
        self._runner.close()
        self._chooser.close()
