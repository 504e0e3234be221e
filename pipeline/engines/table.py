"""Rows that are being decoded: their part of the store and their place in the batch; or one row alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from pipeline.engines.attempts import Check
from pipeline.engines.jobs import Job
from pipeline.engines.memory import Packer
from pipeline.engines.prefilling import PrefilledPack
from pipeline.engines.row_rules import RowRules
from pipeline.generation.decode import decode
from pipeline.generation.decode_loop import DecodeLoop
from pipeline.generation.generated import Generated, StopRules
from pipeline.generation.lookup import Lookup
from pipeline.generation.sampling import RowDraws
from pipeline.generation.step_tables import Seat
from pipeline.model.cache import RaggedCache
from pipeline.model.graphs import DecodeStats
from pipeline.model.loading import LoadedModel
from pipeline.model.store import Extent, KvStore, slots_needed, store_for
from pipeline.records import Answer

SMALLER = 0.9  # what is tried next where the memory for the store is not there
SMALLEST = 0.5
FAILURES = ("not_finite", "timeout")  # reasons to finish that are none of an answer


@dataclass(kw_only=True, eq=False)
class RunningRow:
    """A row that is being answered."""

    job: Job
    answer: Answer
    began: float  # time.perf_counter() when its prefill began, that of what it shares included
    first_at: float  # the same when its first tokens were known
    joined_s: float  # what the clock of decoding said then
    answers: list[Running] = field(default_factory=list)
    is_over: bool = False  # its output row is made, or about to be

    @property
    def failure(self) -> str | None:
        """Why it has failed, if one of its answers has: `not_finite` or `timeout`."""
        return next((each.finish_reason for each in self.answers if each.finish_reason in FAILURES), None)

    @property
    def going(self) -> list[Running]:
        """The answers that have not ended."""
        return [each for each in self.answers if each.finish_reason is None]

    def tell_times(self, decoded_s: float) -> None:
        """Write what its answers took into the output row; `decoded_s` is the clock of decoding."""
        wall_s = max(each.finished_at for each in self.answers) - self.first_at
        decoding_s = min(decoded_s - self.joined_s, wall_s)
        self.answer.decode_ms = decoding_s * 1e3
        # and then it waited while others were prefilled
        self.answer.queue_ms = (self.answer.queue_ms or 0.0) + (wall_s - decoding_s) * 1e3


@dataclass(kw_only=True, eq=False)
class Running(Generated):
    """An answer that grows, one of its row's."""

    row: RunningRow
    draws: RowDraws | None  # what its tokens are chosen by; None: the largest logits
    extent: Extent | None = None  # of the store
    document: StoredDocument | None = None  # that it shares with others


def begun(pack: PrefilledPack, row_rules: RowRules, decoded_s: float) -> list[RunningRow]:
    """The rows of a pack, whose answers have no tokens yet; `decoded_s` is the clock of decoding."""
    rows = []
    for job, answer, draws, guides in zip(pack.jobs, pack.rows, pack.draws, pack.guides, strict=True):
        row = RunningRow(job=job, answer=answer, began=pack.began, first_at=pack.first_at, joined_s=decoded_s)
        rules, reasoning = row_rules.of(job.document.source), job.document.reasoning
        row.answers = [
            Running(rules=rules, row=row, reasoning=reasoning, draws=own, guide=guide)
            for own, guide in zip(draws, guides, strict=True)
        ]
        rows.append(row)
    return rows


@dataclass(kw_only=True, eq=False)
class StoredDocument:
    """A part of the store that several answers read; it is free again with the last of them."""

    extent: Extent
    readers: int = 0  # answers that are being decoded, and whoever may bring more
    is_held: bool = False  # of a group, and not the prompt of one row


class Table:
    """A store and the batch of its rows."""

    def __init__(self, store: KvStore, loop: DecodeLoop, device: torch.device, *, shares: bool) -> None:
        """With `shares` several answers to a prompt read it where it lies, else each a copy."""
        self.loop = loop
        self._store, self._device, self._shares = store, device, shares
        self._rows: dict[int, Running] = {}  # by id: also those that have all their tokens on their way
        self._documents: dict[int, list[StoredDocument]] = {}  # by the id of the cache that they came in
        self._held = 0  # documents in the store, those included of which no more rows will come

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        packer: Packer,
        row_rules: RowRules,
        stats: DecodeStats,
        kv_dtype: torch.dtype,
        lookup: Lookup | None = None,
    ) -> Self:
        """As large as planned, or as there is memory for after all; raises torch.OutOfMemoryError."""
        store = _store(model, packer, kv_dtype)
        loop = DecodeLoop(
            model.decoder,
            model.attention,
            store,
            new_tokens=row_rules.rules.max_new_tokens,
            sampling=row_rules.sampling,
            capacity=packer.in_flight,
            longest=model.decoder.shape.context + row_rules.rules.max_new_tokens,
            lookup=lookup,
            mask_words=row_rules.mask_words,
            scored=row_rules.scored,
            stats=stats,
            skips=row_rules.skips,
        )
        return cls(store, loop, model.device, shares=model.decoder.shape.shares_documents)

    @property
    def rows(self) -> Sequence[Running]:
        """Answers that are being decoded."""
        return list(self._rows.values())

    @property
    def free(self) -> int:
        """Slots of the store."""
        return self._store.free

    def join(self, rows: Sequence[RunningRow], places: Sequence[int], pack: PrefilledPack) -> None:
        """Take in the answers, as far as they go on, of the `rows` of a prefilled pack at these `places`."""
        moves, cache = self._store.moves, pack.prefilled.cache
        shares = [self._shares and cache.shared is None and len(row.going) > 1 for row in rows]
        rooms = [self.loop.room(row.answers[0]) for row in rows]
        behind = [0 if apart else room for room, apart in zip(rooms, shares, strict=True)]
        documents = self._shared_by(cache)
        extents = self._store.adopt(cache, behind, shared=[document.extent for document in documents])
        for b, (row, extent) in enumerate(zip(rows, extents, strict=True)):
            if b not in places:  # its prefill may have made NaN
                self._store.release(extent, wipe=True)
            elif shares[b]:
                parts = [self._store.behind(extent, rooms[b]) for _ in row.going]
                self._sit(row.going, parts, StoredDocument(extent=extent))
            else:
                copies = [self._store.copy_of(extent, rooms[b]) for _ in row.going[1:]]
                self._sit(row.going, [extent, *copies], documents[b] if documents else None)
        self._follow(moves)
        joining = [(b, each) for b in places for each in rows[b].going]
        seats = [self._seat(each, pack, b) for b, each in joining]
        answers = [each for _, each in joining]
        self.loop.join(answers, seats, [each.draws for each in answers])
        self._rows |= {id(each): each for each in answers}

    def _sit(
        self, answers: Sequence[Running], extents: Sequence[Extent], document: StoredDocument | None
    ) -> None:
        """Give answers to one prompt their parts of the store, and what they read before them."""
        for answer, extent in zip(answers, extents, strict=True):
            answer.extent, answer.document = extent, document
        if document is not None:
            document.readers += len(answers)

    def _seat(self, answer: Running, pack: PrefilledPack, place: int) -> Seat:
        """Of an answer to the prompt at this place of the pack."""
        assert answer.extent is not None
        return Seat(
            starts=answer.extent.starts,
            used=answer.extent.stored,
            position=pack.prefilled.next_positions[place],
            reach=pack.prefilled.cache.reaches[place],
            line=answer.extent.line,
            shared=None if answer.document is None else answer.document.extent,
            prompt=answer.row.job.document.input_ids,
            new_tokens=answer.rules.max_new_tokens,
        )

    def hold(self, cache: RaggedCache) -> bool:
        """Keep documents that rows will share, until `let_go`; False where there is no room for them."""
        stored = list(zip(*cache.own_tokens(), strict=True))
        slots = sum(slots_needed(layers, 0, self._device) for layers in stored)
        if slots > self._store.free or self._held + len(stored) > self.loop.capacity + 1:
            return False
        moves = self._store.moves
        extents = self._store.adopt(cache)
        self._follow(moves)
        self._documents[id(cache)] = [
            StoredDocument(extent=extent, readers=1, is_held=True) for extent in extents
        ]
        self._held += len(extents)
        return True

    def let_go(self, cache: RaggedCache) -> None:
        """No more rows will come that share the documents of this cache."""
        for document in self._documents.pop(id(cache), ()):
            self._stop_reading(document)

    def _stop_reading(self, document: StoredDocument) -> None:
        document.readers -= 1
        if not document.readers:
            self._store.release(document.extent, wipe=True)  # its prefill may have made NaN
            self._held -= document.is_held

    def _shared_by(self, cache: RaggedCache) -> list[StoredDocument]:
        """Of each row the document that stands before it; none where rows share nothing."""
        if cache.shared is None:
            return []
        documents = self._documents[id(cache.shared.cache)]
        return [documents[document] for document in cache.shared.of_row]

    def _follow(self, moves: int) -> None:
        """Tell the batch where its rows are, if they have been moved since so many moves."""
        if self._store.moves > moves:
            self.loop.moved([self._starts(row) for row in self.loop.rows])

    def _starts(self, row: Generated) -> list[int]:
        extent = self._rows[id(row)].extent
        assert extent is not None
        return extent.starts

    def end_late(self, most: float, decoding_s: float) -> list[Running]:
        """Those whose prefill and steps took over `most` seconds; `decoding_s` is the clock of decoding."""
        late = [
            each
            for each in self.rows
            if each.finish_reason is None
            and each.row.first_at - each.row.began + decoding_s - each.row.joined_s > most
        ]
        self.give_up(late, "timeout")
        return late

    def give_up(self, answers: Sequence[Running], reason: str) -> None:
        """End answers in the middle, whose parts of the store they then still have."""
        for answer in answers:
            answer.finish_reason, answer.finished_at = reason, time.perf_counter()
        self.loop.leave(answers)

    def leave(self, answer: Running) -> None:
        """Give back what an answer has of the store."""
        assert answer.extent is not None
        self._store.release(answer.extent, wipe=answer.finish_reason == "not_finite")
        answer.extent = None
        del self._rows[id(answer)]
        if answer.document is not None:
            self._stop_reading(answer.document)
            answer.document = None

    def leave_together(self, row: RunningRow, reason: str) -> None:
        """Let the answers of a row go that has failed with another one."""
        going = row.going
        self.give_up(going, reason)
        for each in going:
            self.leave(each)

    def prepare(self) -> str:
        """Capture the steps of all batch sizes; returns what to tell of the memory that is taken."""
        before = torch.cuda.mem_get_info(self._device)[0]
        sizes = self.loop.prepare()
        taken = before - torch.cuda.mem_get_info(self._device)[0]
        return (
            f"{self._store.nbytes / 1e9:.1f} GB for keys and values of up to {self.loop.capacity:,} rows, "
            f"{taken / 1e9:.2f} GB for graphs of {sizes} batch sizes"
        )

    def close(self) -> None:
        """Free the graphs, and forget the rows."""
        self.loop.close()
        self._rows.clear()
        self._documents.clear()
        self._held = 0


def _store(model: LoadedModel, packer: Packer, dtype: torch.dtype) -> KvStore:
    share = 1.0
    extents = 2 * packer.in_flight + 1  # each row's, and as many documents' and one more, see `Table.hold`
    while True:
        try:
            slots = int(packer.store_slots * share)
            return store_for(model.decoder, slots, dtype=dtype, extents=extents)
        except torch.OutOfMemoryError:
            share *= SMALLER
            if share < SMALLEST:
                raise
        torch.cuda.empty_cache()


def decoded_alone(
    model: LoadedModel,
    pack: PrefilledPack,
    rules: StopRules,
    check: Check,
    *,
    row_rules: RowRules,
    stats: DecodeStats,
    kv_dtype: torch.dtype,
) -> list[Generated]:
    """The answers to a pack's only prompt, one after the other, so that they take the memory of one.

    `row_rules` are the run's, and `kv_dtype` is that of keys and values while they are decoded.
    Raises RowError where the model's output is not finite, and what `check` raises.
    """
    (job,), (draws,), (tokens,) = pack.jobs, pack.draws, pack.tokens
    (guides,), (scores,) = pack.guides, pack.scores
    answers: list[Generated] = []
    for own, token, guide, of_token in zip(draws, tokens, guides, scores, strict=True):
        answers += decode(
            model.decoder,
            model.attention,
            pack.prefilled,
            rules,
            draws=[own],
            first=[token],
            prompts=[job.document.input_ids],
            reasoning=[job.document.reasoning],
            guides=[guide],
            scores=[of_token],
            scored=row_rules.scored,
            check=check,
            stats=stats,
            kv_dtype=kv_dtype,
            again=len(answers) + 1 < len(draws),
            skips=row_rules.skips,
        )
    return answers
