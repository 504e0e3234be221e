"""The cases of a calibration: some to search on, others, of other documents, to test on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.errors import GateInconclusive
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.predicting import generate
from pipeline.generation.generated import StopRules
from pipeline.model.loading import LoadedModel
from pipeline.pruning.dense import Dense
from pipeline.suites.samples import NEEDLES, grouped, in_turn, searched_count, searched_keys, sha256


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Rows of documents to search on and of those held out; no document is in both, nor in both's needles."""

    search: tuple[CheckRow, ...]
    held_out: tuple[CheckRow, ...]


def split(rows: Sequence[CheckRow], salt: str = "") -> Sides:
    """Part rows by the hash of their documents; needles are on the side whose documents they are hidden in.

    Raises GateInconclusive for rows of a single document, none of which could be held out.
    """
    keys = searched_keys((row.sample.document_key for row in rows if row.sample.side is None), salt)
    search: list[CheckRow] = []
    held_out: list[CheckRow] = []
    for row in rows:
        side = row.sample.side or ("search" if row.sample.document_key in keys else "held-out")
        (search if side == "search" else held_out).append(row)
    if not any(row.sample.side is None for row in held_out):
        raise GateInconclusive(
            "calibrate needs rows of at least two documents: one to search on, one to test on"
        )
    return Sides(search=tuple(search), held_out=tuple(held_out))


def in_all(needed: int) -> int:
    """How many documents to give, so that as many are held out as a pass takes."""
    return next(given for given in itertools.count(needed) if given - searched_count(given) >= needed)


def thin(rows: Sequence[CheckRow], count: int, seed: int = 0) -> list[CheckRow]:
    """So many of the rows, in their order: a row of each document before the second of any.

    Documents of rows and needles alternate, each in the order of their hash.
    """
    shuffled = sorted(rows, key=lambda row: sha256(f"{seed}\0{row.sample.document_key}\0{row.sample.id}"))
    documents = grouped(shuffled, lambda row: row.sample.document_key)
    kinds: dict[str, list[str]] = {"rows": [], "needles": []}
    for key in sorted(documents, key=lambda key: sha256(f"{seed}\0{key}")):
        kinds["needles" if documents[key][0].sample.task.startswith(NEEDLES) else "rows"].append(key)
    ordered = {key: documents[key] for key in in_turn(kinds, None)}
    taken = {id(row) for row in in_turn(ordered, count)}
    return [row for row in rows if id(row) in taken]


def longest_in_turn(cases: Sequence[CheckRow], least: float, count: int) -> list[int]:
    """Places of up to so many of the cases of at least so many tokens, tasks in turn, the longest first."""
    long = [place for place, case in enumerate(cases) if case.document.prompt_tokens >= least]
    long.sort(key=lambda place: -cases[place].document.prompt_tokens)
    return in_turn(grouped(long, lambda place: cases[place].task), count)


def make_cases(
    model: LoadedModel,
    rows: Sequence[CheckRow],
    rules: StopRules,
    check: Callable[[], None] = lambda: None,
    within: Callable[[], bool] = lambda: True,
) -> list[CheckRow]:
    """Rows with their right answers; one without has dense's own greedy answer, which is generated here
    and ends by `rules`.

    Rows whose answer would have to be generated when there is no more time are left out.
    """
    cases: list[CheckRow] = []
    for row in rows:
        answer = row.reference
        if not answer:
            if cases and not within():
                continue
            answer = tuple(generate(model, Dense(), row.document, rules, check).not_empty)
        cases.append(replace(row, reference=answer))
    return cases
