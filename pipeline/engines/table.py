"""The rows that are being decoded: their part of the store, and their place in the batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from pipeline.engines.jobs import Job
from pipeline.engines.memory import Packer
from pipeline.engines.prefilling import PrefilledPack
from pipeline.engines.row_rules import RowRules
from pipeline.model.cache import RaggedCache
from pipeline.model.decode import DecodeLoop
from pipeline.model.decode_batch import Seat
from pipeline.model.generated import Generated
from pipeline.model.graphs import DecodeStats
from pipeline.model.loading import LoadedModel
from pipeline.model.lookup import Lookup
from pipeline.model.store import Extent, KvStore, slots_needed
from pipeline.records import Answer

SMALLER = 0.9  # what is tried next where the memory for the store is not there
SMALLEST = 0.5


@dataclass(kw_only=True, eq=False)
class Running(Generated):
    """A row that is being answered."""

    job: Job
    answer: Answer
    began: float  # time.perf_counter() when its prefill began, that of what it shares included
    first_at: float  # the same when its first token was known
    joined_s: float  # what the clock of decoding said then
    extent: Extent | None = None  # of the store
    document: StoredDocument | None = None  # that it shares with other rows


def begun(pack: PrefilledPack, row_rules: RowRules, decoded_s: float) -> list[Running]:
    """The rows of a pack, none of which has its first token yet; `decoded_s` is the clock of decoding."""
    return [
        Running(
            rules=row_rules.of(job.document.source),
            job=job,
            answer=row,
            began=pack.began,
            first_at=pack.first_at,
            joined_s=decoded_s,
            reasoning=job.document.reasoning,
            guide=guide,
        )
        for job, row, guide in zip(pack.jobs, pack.rows, pack.guides, strict=True)
    ]


@dataclass(kw_only=True, eq=False)
class StoredDocument:
    """A document's part of the store, which several rows read; it is free again with the last of them."""

    extent: Extent
    readers: int = 0  # rows that are being decoded, and whoever may bring more


class Table:
    """A store and the batch of its rows."""

    def __init__(self, store: KvStore, loop: DecodeLoop, device: torch.device) -> None:
        self.loop = loop
        self._store, self._device = store, device
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
        )
        return cls(store, loop, model.device)

    @property
    def rows(self) -> Sequence[Running]:
        return list(self._rows.values())

    @property
    def free(self) -> int:
        """Slots of the store."""
        return self._store.free

    def join(self, rows: Sequence[Running], places: Sequence[int], pack: PrefilledPack) -> None:
        """Take in the `rows` of a prefilled pack that have these `places` among them."""
        moves, cache = self._store.moves, pack.prefilled.cache
        extents = self._store.adopt(cache, [self.loop.room(row) for row in rows])
        self._follow(moves)
        for b, extent in enumerate(extents):
            if b not in places:  # its prefill may have made NaN
                self._store.release(extent, wipe=True)
        positions, documents = pack.prefilled.next_positions, self._shared_by(cache)
        seats = [
            Seat(
                starts=extents[b].starts,
                used=extents[b].stored,
                position=positions[b],
                reach=cache.reaches[b],
                line=extents[b].line,
                shared=documents[b].extent if documents else None,
                prompt=pack.jobs[b].document.input_ids,
                new_tokens=rows[b].rules.max_new_tokens,
            )
            for b in places
        ]
        self.loop.join([rows[b] for b in places], seats, [pack.draws[b] for b in places])
        for b in places:
            row = rows[b]
            row.extent = extents[b]
            self._rows[id(row)] = row
            if documents:
                row.document = documents[b]
                row.document.readers += 1

    def hold(self, cache: RaggedCache) -> bool:
        """Keep documents that rows will share, until `let_go`; False where there is no room for them."""
        stored = list(zip(*cache.own_tokens(), strict=True))
        slots = sum(slots_needed(layers, 0, self._device) for layers in stored)
        if slots > self._store.free or self._held + len(stored) > self.loop.capacity + 1:
            return False
        moves = self._store.moves
        extents = self._store.adopt(cache)
        self._follow(moves)
        self._documents[id(cache)] = [StoredDocument(extent=extent, readers=1) for extent in extents]
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
            self._held -= 1

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
        """Rows whose prefill and steps took over `most` seconds; `decoding_s` is the clock of decoding."""
        late = [
            row
            for row in self.rows
            if row.finish_reason is None and row.first_at - row.began + decoding_s - row.joined_s > most
        ]
        for row in late:
            row.finish_reason, row.finished_at = "timeout", time.perf_counter()
        self.loop.leave(late)
        return late

    def leave(self, row: Running) -> None:
        """Give back what a row has of the store."""
        assert row.extent is not None
        self._store.release(row.extent, wipe=row.finish_reason == "not_finite")
        row.extent = None
        del self._rows[id(row)]
        if row.document is not None:
            self._stop_reading(row.document)
            row.document = None

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
    share, shape = 1.0, model.decoder.shape
    extents = 2 * packer.in_flight + 1  # each row's, and as many documents' and one more, see `Table.hold`
    while True:
        try:
            slots = int(packer.store_slots * share)
            return KvStore(slots, shape, dtype=dtype, device=model.device, extents=extents)
        except torch.OutOfMemoryError:
            share *= SMALLER
            if share < SMALLEST:
                raise
        torch.cuda.empty_cache()
