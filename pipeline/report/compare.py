"""Two runs row by row: joined on disk, so that memory does not grow with the answers."""

from __future__ import annotations

import heapq
import sqlite3
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.report.output_reading import Run
from pipeline.suites.similarity import edit_similarity

MOST_SHOWN = 100
COLUMNS = (
    *("id", "row", "row_hash", "status", "answer", "error_type", "error_message"),
    *("document_tokens", "ttft_ms", "kept_ratio", "ffn_ratio"),
)
PAIRED = ("document_tokens", "first_ms", "second_ms", "similarity")

_TABLE = f"CREATE TABLE first ({', '.join(COLUMNS)}, seen INTEGER DEFAULT 0)"
_COLUMN_LIST = ", ".join(COLUMNS)

RowPair = tuple[dict[str, Any] | None, dict[str, Any]]  # of the first run, if it has the row, and the second


@dataclass(frozen=True, kw_only=True)
class AnswerPair:
    """One row in both runs; `similarity` is None where one of them has no answer, or does not say it."""

    first: dict[str, Any]
    second: dict[str, Any]
    similarity: float | None

    @property
    def other_input(self) -> bool:
        """Whether text or question differ under the same id."""
        hashes = self.first["row_hash"], self.second["row_hash"]
        return None not in hashes and hashes[0] != hashes[1]

    @property
    def ttft_ratio(self) -> float | None:
        """The first run's TTFT over the second's: how many times as fast the second was."""
        first, second = self.first["ttft_ms"], self.second["ttft_ms"]
        return first / second if first and second else None


@dataclass(kw_only=True)
class Comparison:
    """What two runs have in common, and where they disagree most."""

    joined_by: str
    measure: str
    joined: int = 0
    only_first: int = 0
    only_second: int = 0
    one_failed: int = 0
    both_failed: int = 0
    same_answers: int = 0
    other_input: int = 0
    most: list[AnswerPair] = field(default_factory=list)  # the greatest disagreement first
    _pairs: dict[str, array] = field(default_factory=lambda: {name: array("f") for name in PAIRED})

    def pairs(self, name: str) -> np.ndarray:
        """(n,) of the rows that both runs answered: similarity, document tokens, TTFT of each in ms."""
        return np.frombuffer(self._pairs[name], np.float32)

    @property
    def both_answered(self) -> int:
        return len(self._pairs["similarity"])

    def speed_ratios(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) document tokens, and the first run's TTFT over the second's, where both answered and timed."""
        first, second = self.pairs("first_ms"), self.pairs("second_ms")
        known = (first > 0) & (second > 0)
        return self.pairs("document_tokens")[known], first[known] / second[known]

    def count(self, pair: AnswerPair) -> None:
        self.joined += 1
        self.other_input += pair.other_input
        if pair.similarity is None:
            failed = [side["status"] != "ok" for side in (pair.first, pair.second)]
            self.both_failed += all(failed)
            self.one_failed += any(failed) and not all(failed)
            return
        self.same_answers += pair.first["answer"] == pair.second["answer"]
        values = pair.first["document_tokens"], pair.first["ttft_ms"], pair.second["ttft_ms"], pair.similarity
        for name, value in zip(PAIRED, values, strict=True):
            self._pairs[name].append(np.nan if value is None else value)


def compare(first: Run, second: Run, most: int = MOST_SHOWN) -> Comparison:
    """Join two runs by id or, if they have no id in common, by row number, and sort by disagreement."""
    measure, measure_name = likeness()
    with (
        tempfile.TemporaryDirectory(prefix="marsinfer-report-") as scratch,
        closing(sqlite3.connect(Path(scratch) / "rows.sqlite")) as database,
    ):
        database.row_factory = sqlite3.Row
        _load(database, first)
        joined_by = "id" if _shares_ids(database, second) else "row"
        comparison = Comparison(joined_by=joined_by, measure=measure_name)
        pairs = _counted(comparison, _joined(database, second, joined_by), measure)
        comparison.most = heapq.nlargest(most, pairs, key=_disagreement)
        (comparison.only_first,) = database.execute("SELECT count(*) FROM first WHERE NOT seen").fetchone()
    return comparison


def _counted(
    comparison: Comparison, rows: Iterable[RowPair], measure: Callable[[str, str], float]
) -> Iterator[AnswerPair]:
    """The rows that are in both runs; all are counted."""
    for ours, theirs in rows:
        if ours is None:
            comparison.only_second += 1
            continue
        pair = AnswerPair(first=ours, second=theirs, similarity=_similarity(measure, ours, theirs))
        comparison.count(pair)
        yield pair


def _similarity(measure: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> float | None:
    if ours["status"] != "ok" or theirs["status"] != "ok":
        return None
    first, second = ours["answer"], theirs["answer"]
    if first is None or second is None:  # of an output without that column
        return None
    return 1.0 if first == second else float(measure(first, second))


def _disagreement(pair: AnswerPair) -> tuple[float, ...]:
    """Answers against errors first, then the least alike, then the greatest difference in time."""
    states = pair.first["status"] != pair.second["status"]
    unlike = 0.0 if pair.similarity is None else 1 - pair.similarity
    ratio = pair.ttft_ratio
    return float(states), unlike, 0.0 if ratio is None else abs(float(np.log(ratio)))


def _rows(run: Run) -> Iterator[tuple]:
    for table in run.tables(COLUMNS):
        yield from zip(*(column.to_pylist() for column in table.columns), strict=True)


def _load(database: sqlite3.Connection, run: Run) -> None:
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute(_TABLE)
    marks = ", ".join("?" * len(COLUMNS))
    database.executemany(f"INSERT INTO first ({_COLUMN_LIST}) VALUES ({marks})", _rows(run))
    for name in ("id", "row"):
        database.execute(f"CREATE INDEX by_{name} ON first ({name})")


def _shares_ids(database: sqlite3.Connection, run: Run) -> bool:
    query = "SELECT 1 FROM first WHERE id = ? LIMIT 1"
    return any(database.execute(query, (id,)).fetchone() for (id, *_) in _rows(run))


def _joined(database: sqlite3.Connection, run: Run, joined_by: str) -> Iterator[RowPair]:
    """Each row of the second run with that of the first; of rows that share an id, the one of its number."""
    query = (
        f"SELECT rowid AS place, {_COLUMN_LIST} FROM first WHERE {joined_by} = ? "
        "ORDER BY seen, row != ?, status != 'ok' LIMIT 1"
    )
    for values in _rows(run):
        theirs = dict(zip(COLUMNS, values, strict=True))
        found = database.execute(query, (theirs[joined_by], theirs["row"])).fetchone()
        if found is None:
            yield None, theirs
            continue
        database.execute("UPDATE first SET seen = 1 WHERE rowid = ?", (found["place"],))
        yield dict(found), theirs


def likeness() -> tuple[Callable[[str, str], float], str]:
    """A measure of two texts, 1 for equal ones, and what it is called."""
    try:
        edit_similarity("", "")
    except ConfigError:
        return by_words, "share of matching words (difflib)"
    return edit_similarity, "edit similarity of characters (rapidfuzz)"


def by_words(first: str, second: str) -> float:
    """Twice the matching words over the words of both: characters would take too long without a package."""
    return SequenceMatcher(None, first.split(), second.split(), autojunk=False).ratio()
