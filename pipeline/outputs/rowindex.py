"""Which rows are finished and where their answers are: on disk, as there may be more than fit in memory."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa

from pipeline.outputs.answers import without_lone_surrogates
from pipeline.outputs.own_columns import INDEXED
from pipeline.records import Row, RowError
from pipeline.storage.causes import told

Order = Literal["input", "completion"]

DUPLICATE: Final = "duplicate_id"
# errors that are worth nothing once the input has the row no more: of rows of which nothing is known but that
# they could not be read, and of those that refer to another one
FLEETING = (DUPLICATE, "unreadable", "bad_json", "not_an_object")

PUBLISHED = 0  # stands for the output itself where the parts of the journal are numbered from 1
DROPPED = -1  # for the rows that have left it
COPIES = -2  # for copied columns as the input has them now

COMMIT_EVERY = 1_000
FETCHED = 1_000

# `part` is null while a row is only known to be in the input, `row_hash` where it must be answered anew.
_SETUP = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -8192;
CREATE TABLE rows (
    key BLOB PRIMARY KEY, row INTEGER, question INTEGER, row_hash TEXT, status TEXT,
    part INTEGER, chunk INTEGER, place INTEGER, bytes INTEGER, seen INTEGER, fleeting INTEGER,
    copied_chunk INTEGER, copied_place INTEGER
) WITHOUT ROWID;
CREATE TABLE ids (key BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID;
"""
_LEAVES = "NOT seen AND part >= 0 AND NOT fleeting"
_ORDERS = {"input": "row, question", "completion": "part, chunk, place"}
_LOCATION = "row, bytes, part, chunk, place, copied_chunk, copied_place"

ChunkKey = tuple[int, int]  # part, and where in it
Place = tuple[ChunkKey, int]  # chunk, and which of its rows


class Copied(NamedTuple):
    """Where the copied columns of a row are as the input has them now, and about how many bytes they take."""

    chunk: int
    place: int
    bytes: int


Copy = Callable[[pa.RecordBatch | None], Copied | None]


def beside(row: pa.RecordBatch | None) -> Copied | None:
    """Take no copy of a row's columns: those that stand beside its answer are the ones to publish."""
    return None


class Location(NamedTuple):
    """Where the answer to a row is, and where its copied columns are; about how many bytes it takes."""

    row: int
    bytes: int
    own: Place
    copied: Place


def _location(found: tuple[Any, ...]) -> Location:
    """From the columns `_LOCATION`; without a copy, the copied columns are those beside the answer."""
    row, size, part, chunk, place, copied_chunk, copied_place = found
    own = (part, chunk), place
    return Location(row, size, own, own if copied_chunk is None else ((COPIES, copied_chunk), copied_place))


class RowIndex:
    """Derived from the parts, so nothing of it need survive a crash; threads may share it."""

    passed_over: int  # rows seen whose answer was known
    unmoved: int  # of them, those that were at the same place
    returned: int  # of them, those that had left the output
    replaced: Counter[str]  # finished rows by status, of which the input has another version

    def __init__(self, path: Path) -> None:
        self.passed_over = self.unmoved = self.returned = 0
        self.replaced = Counter()
        path.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False)
        self._database.executescript(_SETUP)
        self._changes = 0

    def enter(self, table: pa.Table, part: int, chunk: int, row_bytes: int, *, seen: bool = False) -> None:
        """Enter answers; `seen` are those of this run. A later answer to an id replaces an earlier one.

        A row that was refused because of another stands beside that one. It is not known again by a later
        run: that other one may be gone, or come later.
        """
        columns = (table.column(name).to_pylist() for name in INDEXED)
        entries = []
        for place, (id, row, question, status, kind, row_hash) in enumerate(zip(*columns, strict=True)):
            twice = kind == DUPLICATE
            key = row_key(id, question, row if twice else None)
            known = None if twice else row_hash
            fleeting = kind in FLEETING or row_hash is None
            entries.append((key, row, question, known, status, part, chunk, place, row_bytes, seen, fleeting))
        with self._lock:
            self._database.executemany(
                "REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)", entries
            )
            self._changed(len(entries))

    def forget_errors(self) -> None:
        """Make rows that failed count as not done."""
        with self._lock:
            self._database.execute("UPDATE rows SET row_hash = NULL WHERE status = 'error'")

    def counts(self, *, seen: bool = False) -> Counter[str]:
        """How many rows are finished, by status; with `seen`, of those that the output will have."""
        which = "seen AND part IS NOT NULL" if seen else "part >= 0 AND row_hash IS NOT NULL"
        with self._lock:
            rows = self._database.execute(f"SELECT status, count(*) FROM rows WHERE {which} GROUP BY status")
            return Counter(dict(rows))

    def leaving(self, *, published: bool = False) -> int:
        """How many rows have not come, though output (`published`: it alone) or journal have them."""
        return self._count(f"{_LEAVES} AND part = {PUBLISHED}" if published else _LEAVES)

    def stay(self, *, fleeting: bool) -> int:
        """Count rows that have not come as if they had, with `fleeting` all; returns how many leave else."""
        which = "NOT seen AND part >= 0" if fleeting else _LEAVES
        leaving = self.leaving()
        self.unmoved += self._count(f"{which} AND part = {PUBLISHED}")
        with self._lock:
            self._database.execute(f"UPDATE rows SET seen = 1 WHERE {which}")
        return leaving

    def has_left(self) -> bool:
        """Whether there are rows that are in neither the output nor the journal."""
        return bool(self._count(f"part = {DROPPED}"))

    def has_dropped(self, *, after: bool) -> bool:
        """Whether there are `dropped` rows."""
        return bool(self._count(_dropped(after)))

    def dropped(self, *, after: bool) -> Iterator[Location]:
        """The rows that are to be beside the output; those that came back go `after` it is written."""
        return self._locations(_dropped(after), _ORDERS["completion"])

    def first_twice(self) -> tuple[int, int, int] | None:
        """The first row that stands in two parts, with its number in the input, and these two."""
        query = (
            "SELECT row, min(part), max(part) FROM rows GROUP BY row, question "
            "HAVING min(part) < max(part) ORDER BY row LIMIT 1"
        )
        with self._lock:
            found = self._database.execute(query).fetchone()
        return None if found is None else (found[0], found[1], found[2])

    def part_of(self, id: str, question: int | None) -> int | None:
        """The part in which the answer to a row of this id, to this question of it, is, if it has one."""
        with self._lock:
            found = self._find(row_key(id, question))
        return None if found is None else found[4]

    def first_failure(self) -> Location | None:
        """The first row that the input has and that is finished without an answer."""
        query = (
            f"SELECT {_LOCATION} FROM rows "
            "WHERE seen AND part IS NOT NULL AND status != 'ok' ORDER BY row, question LIMIT 1"
        )
        with self._lock:
            found = self._database.execute(query).fetchone()
        return None if found is None else _location(found)

    def see(self, source: Row, row_hash: str, *, is_fault: bool = False, copy: Copy = beside) -> bool:
        """Note that the input has this row, and say whether its answer is known.

        If it is, `copy` takes the row's copied columns. A RowError for an id that came before, or, of what is
        a fault, that has an answer.
        """
        key = row_key(source.id, source.question_index)
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
            if is_fault and found is not None and found[3] == "ok":
                raise RowError("unreadable", f"has the id {source.id!r} of a row that is answered")
            if found is not None:
                self._meet(found, source.row, done)
            if done:
                chunk, position, size = copy(source.passthrough) or (None, None, 0)
                self._database.execute(
                    "UPDATE rows SET row = ?, seen = 1, bytes = bytes + ?, copied_chunk = ?, "
                    "copied_place = ? WHERE key = ?",
                    (source.row, size, chunk, position, key),
                )
            else:
                self._database.execute(
                    "REPLACE INTO rows (key, row, question, seen) VALUES (?, ?, ?, 1)", place
                )
        return done

    def first_with(self, id: str, row: int) -> int:
        """The row of the input that has this id: the first that was asked about, `row` itself or another."""
        key = row_key(id)
        with self._lock:
            self._changed(1)
            if self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (key, row)).rowcount:
                return row
            return int(self._database.execute("SELECT row FROM ids WHERE key = ?", (key,)).fetchone()[0])

    def locations(self, order: Order) -> Iterator[Location]:
        """Answers to the rows that the output will have, sorted outside of memory."""
        return self._locations("seen AND part IS NOT NULL", _ORDERS[order])

    def _locations(self, which: str, order: str) -> Iterator[Location]:
        query = f"SELECT {_LOCATION} FROM rows WHERE {which} ORDER BY {order}"
        with self._lock:
            cursor = self._database.execute(query)
        while True:
            with self._lock:
                found = cursor.fetchmany(FETCHED)
            if not found:
                return
            yield from map(_location, found)

    def close(self) -> None:
        """Let go of the file; what it holds is worth nothing from here on."""
        with self._lock, suppress(sqlite3.Error):
            self._database.close()

    def _meet(self, found: tuple[Any, ...], row: int, done: bool) -> None:
        """Count a row that earlier runs knew."""
        before, known, _, status, part = found
        if done:
            self.passed_over += 1
            self.returned += part == DROPPED
            self.unmoved += before == row and part != DROPPED
        elif known is not None and part != DROPPED:
            self.replaced[status] += 1

    def _count(self, which: str) -> int:
        with self._lock:
            return int(self._database.execute(f"SELECT count(*) FROM rows WHERE {which}").fetchone()[0])

    def _find(self, key: bytes) -> tuple[Any, ...] | None:
        """Row, hash, whether it has come, status and part."""
        query = "SELECT row, row_hash, seen, status, part FROM rows WHERE key = ?"
        return self._database.execute(query, (key,)).fetchone()

    def _changed(self, count: int) -> None:
        self._changes += count
        if self._changes >= COMMIT_EVERY:
            self._database.commit()
            self._changes = 0


def _dropped(after: bool) -> str:
    gone = f"{_LEAVES} OR part = {DROPPED}"
    return f"NOT seen AND ({gone})" if after else f"({gone})"


def row_key(id: str, question: int | None = None, refused: int | None = None) -> bytes:
    """16 bytes that tell a row from any other.

    `question` is its question's index: `a#1` may be question 1 of the row `a`, or a row of that id that
    failed as a whole. One that was `refused` for another's id, by its number, stands beside that one.
    """
    text = without_lone_surrogates(id) or ""  # as it comes back from an output
    salt = 0 if refused is None else refused + 1
    kind = b"" if question is None else b"question"
    return blake2b(text.encode(), digest_size=16, salt=salt.to_bytes(16, "little"), person=kind).digest()


@contextmanager
def scratch_index() -> Iterator[RowIndex]:
    """An index in scratch space, with which it is gone. Raises StorageError where there is no room for it."""
    with told("there is no scratch space", "; set TMPDIR"):
        scratch = tempfile.TemporaryDirectory(prefix="marsinfer-")
    with (
        scratch as folder,
        told("scratch space cannot be used", "; let TMPDIR name a folder with room", of=sqlite3.Error),
        closing(RowIndex(Path(folder) / "index.sqlite")) as index,
    ):
        yield index
