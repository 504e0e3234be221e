"""Which rows are finished and where their answers are: on disk, as there may be more than fit in memory."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.io.answers import without_lone_surrogates
from pipeline.records import Answer, Row

Order = Literal["input", "completion"]

INDEXED = (
    "id",
    "row",
    "question_index",
    "status",
    "error_type",
    "row_hash",
)  # the columns that the index is built from
DUPLICATE = "duplicate_id"

COMMIT_EVERY = 1_000
FETCHED = 1_000

# `part` is null while a row is only known to be in the input.
_SETUP = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -8192;
CREATE TABLE rows (
    key BLOB PRIMARY KEY, row INTEGER, question INTEGER, row_hash TEXT, status TEXT,
    part INTEGER, chunk INTEGER, place INTEGER, bytes INTEGER, seen INTEGER
) WITHOUT ROWID;
"""
_ORDERS = {"input": "row, question", "completion": "part, chunk, place"}


@dataclass(frozen=True, slots=True)
class Location:
    """Where the answer to a row is: chunk of a part, place in the chunk; about how many bytes it takes."""

    row: int
    part: int
    chunk: int
    place: int
    bytes: int


class RowIndex:
    """Derived from the parts, so nothing of it need survive a crash; threads may share it."""

    passed_over: int  # rows seen whose answer was known
    unmoved: int  # of them, those that were at the same place

    def __init__(self, path: Path) -> None:
        self.passed_over = self.unmoved = 0
        path.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False)
        self._database.executescript(_SETUP)
        self._changes = 0

    def replay(self, table: pa.Table, part: int, chunk: int, row_bytes: int) -> None:
        """Enter answers of earlier runs; a later answer to an id replaces an earlier one.

        Rows that cannot be known again are left out: those without a hash, and those refused because of
        another row, which may be gone or come later this time.
        """
        columns = (table.column(name).to_pylist() for name in INDEXED)
        entries = [
            (_key(id), row, question, row_hash, status, part, chunk, place, row_bytes)
            for place, (id, row, question, status, kind, row_hash) in enumerate(zip(*columns, strict=True))
            if row_hash is not None and kind != DUPLICATE
        ]
        with self._lock:
            self._database.executemany("REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)", entries)
            self._changed(len(entries))

    def forget_errors(self) -> None:
        """Make rows that failed count as not done."""
        with self._lock:
            self._database.execute("DELETE FROM rows WHERE status = 'error'")

    def counts(self, *, seen: bool = False) -> Counter[str]:
        """How many rows are finished, by status; with `seen`, of those that the input has."""
        query = "SELECT status, count(*) FROM rows WHERE part IS NOT NULL AND seen >= ? GROUP BY status"
        with self._lock:
            return Counter(dict(self._database.execute(query, (int(seen),))))

    def first_failure(self) -> Location | None:
        """The first row that the input has and that is finished without an answer."""
        query = (
            "SELECT row, part, chunk, place, bytes FROM rows "
            "WHERE seen AND part IS NOT NULL AND status != 'ok' ORDER BY row, question LIMIT 1"
        )
        with self._lock:
            found = self._database.execute(query).fetchone()
        return None if found is None else Location(*found)

    def see(self, source: Row, row_hash: str) -> bool:
        """Note that the input has this row, and say whether its answer is known."""
        key = _key(source.id)
        with self._lock:
            self._changed(1)
            place = (key, source.row, source.question_index)
            new = self._database.execute(
                "INSERT OR IGNORE INTO rows (key, row, question, seen) VALUES (?, ?, ?, 1)", place
            )
            if new.rowcount:
                return False
            found = self._find(key)
            if found is not None and found[2]:
                raise RowError(DUPLICATE, f"has the id {source.id!r} of row {found[0]}; ids must be unique")
            done = found is not None and found[1] == row_hash
            if done:
                self.passed_over += 1
                self.unmoved += found is not None and found[0] == source.row
                self._database.execute("UPDATE rows SET row = ?, seen = 1 WHERE key = ?", (source.row, key))
            else:
                self._database.execute(
                    "REPLACE INTO rows (key, row, question, seen) VALUES (?, ?, ?, 1)", place
                )
        return done

    def record(self, answers: Sequence[Answer], part: int, chunk: int, row_bytes: int) -> None:
        """Enter answers of this run."""
        with self._lock:
            entries = [
                (
                    self._key_of(a),
                    a.row,
                    a.question_index,
                    a.row_hash,
                    a.status,
                    part,
                    chunk,
                    place,
                    row_bytes,
                )
                for place, a in enumerate(answers)
            ]
            self._database.executemany("REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1)", entries)
            self._changed(len(answers))

    def locations(self, order: Order) -> Iterator[Location]:
        """Answers to the rows that the input has, sorted outside of memory."""
        query = (
            "SELECT row, part, chunk, place, bytes FROM rows "
            f"WHERE seen AND part IS NOT NULL ORDER BY {_ORDERS[order]}"
        )
        with self._lock:
            cursor = self._database.execute(query)
        while True:
            with self._lock:
                found = cursor.fetchmany(FETCHED)
            if not found:
                return
            yield from (Location(*values) for values in found)

    def close(self) -> None:
        """Let go of the file; what it holds is worth nothing from here on."""
        with self._lock, suppress(sqlite3.Error):
            self._database.close()

    def _key_of(self, answer: Answer) -> bytes:
        """A row refused for another's id stands beside that one, and must not take its place."""
        key = _key(answer.id)
        if answer.error_type != DUPLICATE:
            return key
        found = self._find(key)
        taken = found is not None and found[2] and found[0] != answer.row
        return _key(answer.id, answer.row + 1) if taken else key

    def _find(self, key: bytes) -> tuple[int, str | None, int] | None:
        return self._database.execute("SELECT row, row_hash, seen FROM rows WHERE key = ?", (key,)).fetchone()

    def _changed(self, count: int) -> None:
        self._changes += count
        if self._changes >= COMMIT_EVERY:
            self._database.commit()
            self._changes = 0


def _key(id: str, salt: int = 0) -> bytes:
    text = without_lone_surrogates(id) or ""  # as it comes back from an output
    return blake2b(text.encode(), digest_size=16, salt=salt.to_bytes(16, "little")).digest()
