"""Two runs row by row: joined on disk, so that memory does not grow with the answers."""

from __future__ import annotations

import heapq
import json
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
from pipeline.report.references import REFERENCE
from pipeline.storage.causes import told
from pipeline.suites.metrics import score, token_f1
from pipeline.suites.similarity import edit_similarity

MOST_SHOWN = 300
SCORE = token_f1.__name__
COLUMNS = (
    *("id", "row", "question_index", "row_hash", "status", "question", "answer"),
    *("error_type", "error_message"),
    *("document_tokens", "ttft_ms", "kept_ratio", "ffn_ratio", REFERENCE),
)
PAIRED = (
    *("row", "document_tokens", "same_input", "similarity"),
    *("first_ms", "second_ms", "first_score", "second_score"),
)

_TABLE = f"CREATE TABLE first ({', '.join(COLUMNS)}, seen INTEGER DEFAULT 0)"
_COLUMN_LIST = ", ".join(COLUMNS)

RowPair = tuple[dict[str, Any] | None, dict[str, Any]]  # of the first run, if it has the row, and the second


@dataclass(frozen=True, kw_only=True)
class AnswerPair:
    """One row in both runs.

    `similarity` is None where one of them has no answer, or does not say it; `scores` then too, and where
    there is no reference or text and question are not the same.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    references: list[str]  # what is right, as either run has copied it
    other_input: bool  # whether text or question differ under the same id
    similarity: float | None
    scores: tuple[float | None, float | None]  # of both against the references, from 0 to 1

    @property
    def question(self) -> str:
        return self.first["question"] or self.second["question"] or ""

    @property
    def differs(self) -> bool:
        """Whether one alone was answered, or the answers differ."""
        if self.first["status"] != self.second["status"]:
            return True
        return self.similarity is not None and self.first["answer"] != self.second["answer"]

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
    first_failed: int = 0  # of those: rows that the second run alone answered
    both_failed: int = 0
    same_answers: int = 0
    other_input: int = 0
    differing: int = 0  # rows that one run alone answered, or both in other words
    most: list[AnswerPair] = field(default_factory=list)  # of those, the greatest disagreement first
    _pairs: dict[str, array] = field(
        default_factory=lambda: {name: array("d" if name == "row" else "f") for name in PAIRED}
    )

    def pairs(self, name: str) -> np.ndarray:
        """(n,) of the rows that both runs answered, NaN where unknown.

        Names are `PAIRED`: row number, document tokens, 1 where both have the same text and question or else
        0, the similarity of the answers, and of each TTFT in ms and the score from 0 to 1.
        """
        values = self._pairs[name]
        return np.frombuffer(values, np.dtype(values.typecode))

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
        self.differing += pair.differs
        if pair.similarity is None:
            failed = [side["status"] != "ok" for side in (pair.first, pair.second)]
            self.both_failed += all(failed)
            self.one_failed += any(failed) and not all(failed)
            self.first_failed += failed == [True, False]
            return
        self.same_answers += pair.first["answer"] == pair.second["answer"]
        about = pair.first["row"], pair.first["document_tokens"], not pair.other_input, pair.similarity
        values = *about, pair.first["ttft_ms"], pair.second["ttft_ms"], *pair.scores
        for name, value in zip(PAIRED, values, strict=True):
            self._pairs[name].append(np.nan if value is None else value)


def compare(first: Run, second: Run, most: int = MOST_SHOWN) -> Comparison:
    """Join two runs by id or, if they have no id in common, by row number, and sort by disagreement."""
    measure, measure_name = likeness()
    with (
        tempfile.TemporaryDirectory(prefix="marsinfer-report-") as scratch,
        told("the outputs cannot be compared", "; let TMPDIR name a folder with room", of=sqlite3.Error),
        closing(sqlite3.connect(Path(scratch) / "rows.sqlite")) as database,
    ):
        database.row_factory = sqlite3.Row
        _load(database, first)
        joined_by = "id" if _shares_ids(database, second) else "row"
        comparison = Comparison(joined_by=joined_by, measure=measure_name)
        pairs = _counted(comparison, _joined(database, second, joined_by), measure)
        differing = (pair for pair in pairs if pair.differs)
        comparison.most = heapq.nlargest(most, differing, key=_disagreement)
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
        pair = _pair(ours, theirs, measure)
        comparison.count(pair)
        yield pair


def _pair(ours: dict[str, Any], theirs: dict[str, Any], measure: Callable[[str, str], float]) -> AnswerPair:
    similarity = _similarity(measure, ours, theirs)
    references = json.loads(ours[REFERENCE] or theirs[REFERENCE] or "[]")
    hashes = ours["row_hash"], theirs["row_hash"]
    other_input = None not in hashes and hashes[0] != hashes[1]
    comparable = bool(references) and similarity is not None and not other_input
    return AnswerPair(
        first=ours,
        second=theirs,
        references=references,
        other_input=other_input,
        similarity=similarity,
        scores=_scores(ours["answer"], theirs["answer"], references) if comparable else (None, None),
    )


def _scores(first: str, second: str, references: list[str]) -> tuple[float, float]:
    found = score(SCORE, first, references)
    return found, found if first == second else score(SCORE, second, references)


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
        *own, references = (column.to_pylist() for column in table.columns)
        yield from zip(*own, (each and json.dumps(each) for each in references), strict=True)


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
    ids = (id for table in run.tables(["id"]) for id in table["id"].to_pylist())
    return any(database.execute(query, (id,)).fetchone() for id in ids)


def _joined(database: sqlite3.Connection, run: Run, joined_by: str) -> Iterator[RowPair]:
    """Each row of the second run with that of the first; of rows that share an id, the one of its number.

    A row that failed as a whole may have the id of another row's question: each finds its own.
    """
    query = (
        f"SELECT rowid AS place, {_COLUMN_LIST} FROM first WHERE {joined_by} = ? "
        "ORDER BY seen, question_index IS NOT ?, row != ?, status != 'ok' LIMIT 1"
    )
    for values in _rows(run):
        theirs = dict(zip(COLUMNS, values, strict=True))
        sought = theirs[joined_by], theirs["question_index"], theirs["row"]
        found = database.execute(query, sought).fetchone()
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
