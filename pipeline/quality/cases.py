"""The cases of a calibration: some to search on, others, of other documents, to verify on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.model.decode import StopRules
from pipeline.model.loading import LoadedModel
from pipeline.pruning.dense import Dense
from pipeline.quality.bounds import NEEDLES
from pipeline.quality.check_rows import CheckRow
from pipeline.quality.evaluate import Case
from pipeline.quality.generate import generate
from pipeline.quality.samples import in_turn, searched_keys


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Rows of documents to search on and of those held out; no document is in both, nor in both's needles."""

    search: tuple[CheckRow, ...]
    held_out: tuple[CheckRow, ...]


def split(rows: Sequence[CheckRow], salt: str = "") -> Sides:
    """Part rows by the hash of their documents; needles are on the side whose documents they are hidden in.

    Raises InputError for rows of a single document, none of which could be held out.
    """
    keys = searched_keys((row.sample.document_key for row in rows if row.sample.side is None), salt)
    search: list[CheckRow] = []
    held_out: list[CheckRow] = []
    for row in rows:
        side = row.sample.side or ("search" if row.sample.document_key in keys else "held-out")
        (search if side == "search" else held_out).append(row)
    if not any(row.sample.side is None for row in held_out):
        raise InputError("calibrate needs rows of at least two documents: one to search on, one to verify on")
    return Sides(search=tuple(search), held_out=tuple(held_out))


def thin(rows: Sequence[CheckRow], count: int, seed: int = 0) -> list[CheckRow]:
    """About `count` of the rows, in their order: tasks in turn, half for needles where there are any."""
    groups: dict[bool, dict[str, list[CheckRow]]] = {False: {}, True: {}}
    for row in sorted(rows, key=lambda row: _hash(f"{seed}\0{row.sample.id}")):
        task = row.sample.task
        groups[task.startswith(NEEDLES)].setdefault(task, []).append(row)
    for_needles = count // 2 if groups[True] else 0
    taken = {id(row) for row in in_turn(groups[False], max(1, count - for_needles))}
    taken |= {id(row) for row in in_turn(groups[True], max(len(groups[True]), for_needles))}
    return [row for row in rows if id(row) in taken]


def by_length(cases: Sequence[Case], count: int) -> list[int]:
    """Places of so many of the cases that are no needles, from short ones to long ones."""
    rows = [place for place, case in enumerate(cases) if not case.task.startswith(NEEDLES)]
    rows.sort(key=lambda place: cases[place].document.prompt_tokens)
    count = min(count, len(rows))
    return [rows[(2 * n + 1) * len(rows) // (2 * count)] for n in range(count)]


def longest_in_turn(cases: Sequence[Case], least: float, count: int) -> list[int]:
    """Places of up to so many of the cases of at least so many tokens, tasks in turn, the longest first."""
    tasks: dict[str, list[int]] = {}
    for place in sorted(range(len(cases)), key=lambda place: -cases[place].document.prompt_tokens):
        if cases[place].document.prompt_tokens >= least:
            tasks.setdefault(cases[place].task, []).append(place)
    return in_turn(tasks, count)


def make_cases(
    model: LoadedModel,
    rows: Sequence[CheckRow],
    rules: StopRules,
    check: Callable[[], None] = lambda: None,
    within: Callable[[], bool] = lambda: True,
) -> list[Case]:
    """Rows with their right answers; one without has dense's own greedy answer, which is generated here
    and ends by `rules`.

    Rows whose answer would have to be generated when there is no more time are left out.
    """
    cases: list[Case] = []
    for row in rows:
        answer = row.reference
        if not answer:
            if cases and not within():
                continue
            (greedy,) = generate(model, Dense(), [row.document], rules, check)
            answer = tuple(greedy.not_empty)
        cases.append(
            Case(
                id=row.sample.id,
                task=row.sample.task,
                document_key=row.sample.document_key,
                document=row.document,
                answer=answer,
                parts=row.parts,
            )
        )
    return cases


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
