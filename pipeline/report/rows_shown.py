"""The rows that a page shows: question, reference and answers, and by what they can be sorted."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pipeline.report.compare import MOST_SHOWN, SCORE, AnswerPair, Comparison
from pipeline.report.figures import Figures, milliseconds
from pipeline.report.output_reading import Run
from pipeline.report.page import cut
from pipeline.report.references import REFERENCE
from pipeline.report.word_marks import Marked, marked
from pipeline.suites.metrics import score

LONGEST_ANSWER, LONGEST_MESSAGE, LONGEST_QUESTION = 1_500, 400, 600  # characters that are shown
MOST_BYTES = 1_200_000  # of all rows of a page
MARKUP = 1_500  # bytes of a row beside its texts
MARK = 15  # and of a mark
COLUMNS = (
    *("id", "row", "status", "question", "answer", "document_tokens", "ttft_ms", "kept_ratio", "ffn_ratio"),
    REFERENCE,
)


@dataclass(frozen=True, kw_only=True)
class RunAnswer:
    """What one run has of a row: an answer in pieces, of which some differ, or else why there is none."""

    run: Run = field(repr=False)
    id: str
    row: int
    pieces: Marked = field(default_factory=list)
    failure: str | None = None
    note: str = ""  # on what is not shown


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A row of the page. `keys` are numbers by which the page can sort; of those that are known."""

    id: str
    question: str
    reference: str
    facts: str
    sides: list[RunAnswer]
    keys: Mapping[str, float]

    @property
    def size(self) -> int:
        """About how many bytes the row takes in the page."""
        pieces = [piece for side in self.sides for piece in side.pieces]
        marks = sum(differs for _, differs in pieces)
        texts = [self.question, self.reference, *(side.failure or "" for side in self.sides)]
        texts += [text for text, _ in pieces]
        return MARKUP + MARK * marks + sum(len(escape(text).encode(errors="replace")) for text in texts)


@dataclass(frozen=True, kw_only=True)
class ShownRows:
    """The rows of a page, in the order in which they stand there at first."""

    title: str
    about: str  # which they are, and which are left out
    orders: list[tuple[str, str, int]]  # name of a key, what the page calls the order, and 1 to ascend or -1
    rows: list[ShownRow]


NO_ROWS = ShownRows(title="Rows", about="", orders=[], rows=[])


def of_pair(runs: tuple[Run, Run], comparison: Comparison) -> ShownRows:
    """The rows in which two runs differ most."""
    rows = _fitting(_of_pair(runs, pair, place) for place, pair in enumerate(comparison.most))
    differing = comparison.differing
    same = comparison.joined - differing
    about = [f"{_share(len(rows), differing)} of the rows that differ, the least alike first."]
    about.append(f"Likeness is the {comparison.measure}.")
    if same:
        about.append(f"Left out: {same:,} with the same answer in both, or with an error in both.")
    return ShownRows(
        title="Rows that disagree most",
        about=" ".join(about),
        orders=[
            ("place", "least alike first", 1),
            ("row", "in the order of the input", 1),
            ("tokens", "longest document first", -1),
            ("ratio", "largest speed-up first", -1),
        ],
        rows=rows,
    )


def _of_pair(runs: tuple[Run, Run], pair: AnswerPair, place: int) -> ShownRow:
    first, second = pair.first, pair.second
    answered = [side["answer"] if side["status"] == "ok" else None for side in (first, second)]
    whole = None not in answered
    texts = [_shown(answer or "") for answer in answered]
    pieces = marked(*texts) if whole else [[(text, False)] for text in texts]
    beyond = whole and not any(differs for side in pieces for _, differs in side)
    return ShownRow(
        id=first["id"],
        question=_shown(pair.question, LONGEST_QUESTION),
        reference=_joined(pair.references),
        facts=pair_facts(pair),
        sides=[
            _side(run, facts, own, "they differ behind what is shown" if beyond else "")
            for run, facts, own in zip(runs, (first, second), pieces, strict=True)
        ],
        keys=_keys(place=place, row=first["row"], tokens=first["document_tokens"], ratio=pair.ttft_ratio),
    )


def of_run(figures: Figures, most: int = MOST_SHOWN) -> ShownRows:
    """The answered rows that agree least with their references; without references the first ones."""
    run = figures.run
    least = heapq.nlargest(most, _scored(run), key=lambda row: -1.0 if row[1] is None else 1 - row[1])
    scored = any(found is not None for _, found in least)
    rows = _fitting(_of_run(run, row, found, place) for place, (row, found) in enumerate(least))
    which = "those least like their references first (token F1)" if scored else "the first of them"
    orders = [("row", "in the order of the input", 1), ("tokens", "longest document first", -1)]
    orders += [("ttft", "slowest first", -1), ("kept", "fewest tokens kept first", 1)]
    return ShownRows(
        title="Rows",
        about=f"{_share(len(rows), figures.answered)} of the answered rows, {which}.",
        orders=[("place", "least like the reference first", 1), *orders] if scored else orders,
        rows=rows,
    )


def _scored(run: Run) -> Iterator[tuple[dict[str, Any], float | None]]:
    """The answered rows, with the score of those that have a reference."""
    for table in run.tables(COLUMNS):
        for row in table.to_pylist():
            if row["status"] == "ok":
                references = row[REFERENCE]
                known = references and row["answer"] is not None
                yield row, score(SCORE, row["answer"], references) if known else None


def _of_run(run: Run, row: dict[str, Any], found: float | None, place: int) -> ShownRow:
    text = _shown(row["answer"] or "")
    return ShownRow(
        id=row["id"],
        question=_shown(row["question"] or "", LONGEST_QUESTION),
        reference=_joined(row[REFERENCE] or []),
        facts=row_facts(row, found),
        sides=[_side(run, row, [(text, False)])],
        keys=_keys(
            place=place,
            row=row["row"],
            tokens=row["document_tokens"],
            ttft=row["ttft_ms"],
            kept=row["kept_ratio"],
        ),
    )


def _side(run: Run, facts: dict[str, Any], pieces: Marked, note: str = "") -> RunAnswer:
    where: dict[str, Any] = {"run": run, "id": facts["id"], "row": facts["row"]}
    if facts["status"] != "ok":
        message = cut(facts["error_message"], LONGEST_MESSAGE)
        return RunAnswer(**where, failure=f"{facts['status']}, {facts['error_type']}: {message}")
    if facts["answer"] is None:
        return RunAnswer(**where, note="the output holds no answers")
    hidden = len(facts["answer"].strip()) - LONGEST_ANSWER
    notes = [f"{hidden:,} more characters"] if hidden > 0 else []
    notes += [note] if note else []
    notes += [] if facts["answer"].strip() else ["an empty answer"]
    return RunAnswer(**where, pieces=pieces, note="; ".join(notes))


def _fitting(rows: Iterable[ShownRow]) -> list[ShownRow]:
    """The first rows, as many as a page has room for."""
    fitting, room = [], MOST_BYTES
    for row in rows:
        room -= row.size
        if room < 0:
            break
        fitting.append(row)
    return fitting


def _joined(references: list[str]) -> str:
    return _shown(" / ".join(references), LONGEST_QUESTION)


def _keys(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _shown(text: str, longest: int = LONGEST_ANSWER) -> str:
    return cut(text.strip(), longest)


def _share(shown: int, of: int) -> str:
    return f"All {of:,}" if shown == of > 1 else f"{shown:,} of {of:,}"


def pair_facts(pair: AnswerPair) -> str:
    """One line on a row that is in both runs."""
    first, second = pair.first, pair.second
    facts = [f"row {first['row']}", f"{first['document_tokens'] or 0:,} document tokens"]
    if pair.similarity is not None:
        facts.append(f"similarity {pair.similarity:.2f}")
    if None not in pair.scores:
        facts.append("token F1 {:.2f} and {:.2f}".format(*pair.scores))
    if pair.ttft_ratio is not None:
        times = f"TTFT {milliseconds(first['ttft_ms'])} and {milliseconds(second['ttft_ms'])}"
        facts.append(f"{times}, {pair.ttft_ratio:.2f} times as fast")
    for name, label in (("kept_ratio", "kept"), ("ffn_ratio", "FFN")):
        shares = first[name], second[name]
        if None not in shares:
            facts.append(
                f"{label} {shares[0]:.1%} and {shares[1]:.1%} ({(shares[1] - shares[0]) * 100:+.1f} pt)"
            )
    return "; ".join(facts)


def row_facts(row: dict[str, Any], found: float | None) -> str:
    """One line on a row of a run, with its score if it has one."""
    facts = [f"row {row['row']}", f"{row['document_tokens'] or 0:,} document tokens"]
    if found is not None:
        facts.append(f"token F1 {found:.2f}")
    if row["ttft_ms"] is not None:
        facts.append(f"TTFT {milliseconds(row['ttft_ms'])}")
    for name, label in (("kept_ratio", "kept"), ("ffn_ratio", "FFN")):
        if row[name] is not None:
            facts.append(f"{label} {row[name]:.1%}")
    return "; ".join(facts)
