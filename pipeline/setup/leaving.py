"""Rows of an output that its input no longer has: when they may leave it, and what to say of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import InputError
from pipeline.storage.causes import some
from pipeline.texts.words import counted

if TYPE_CHECKING:
    from pipeline.inputs.reading import Reading
    from pipeline.inputs.source import Source
    from pipeline.outputs.finished import FinishedRows

REMEDY = "--drop-missing lets them go"
MOST_TOLD = 3

Files = Sequence[tuple[str, int]]  # names, and how many rows each has; a name may come twice


def refuse_at_start(source: Source, rows: Reading, earlier: FinishedRows, *, drop_missing: bool) -> None:
    """An InputError for a file that is known to be missing or empty before anything is read.

    Where a column says the ids, its rows may stand in another file now: that is known when all is read.
    """
    if source.columns.id is None and not (rows.is_selective or drop_missing):
        refuse_missing(earlier.files, source.files_told)


def settle(source: Source, rows: Reading, earlier: FinishedRows, *, drop_missing: bool) -> int:
    """When all is read: which rows of earlier runs leave; returns how many stay though they did not come.

    Raises InputError where they are all, or some while a file is missing, and `drop_missing` does not let
    them go.
    """
    if not (rows.saw_all and earlier.can_drop):
        return earlier.stay(fleeting=rows.is_selective)
    if earlier.leaving() and not drop_missing:
        refuse_missing(earlier.files, source.files_read)
        refuse_all(earlier.leaving(), earlier.lasting_at_start)
    return 0


def refuse_missing(before: Files | None, now: Sequence[tuple[str, int | None]]) -> None:
    """An InputError where a file that the output has rows of is not there any more, or has no rows.

    `before` are the files of the output, None where it does not say; None for rows: not known yet.
    """
    pairs, missing = _paired(before or (), now)
    gone = [name for name, rows in missing if rows]
    gone += [f"{name} (empty)" for name, rows, then in pairs if rows == 0 and then]
    if gone:
        raise InputError(
            f"of the files of the last run {counted(len(gone), 'file')} {'is' if len(gone) == 1 else 'are'} "
            f"missing or empty: {some(gone, MOST_TOLD)}; the output stays as it is: bring them back, or "
            f"{REMEDY}, and their rows with them"
        )


def refuse_all(leaving: int, earlier: int) -> None:
    """An InputError where all rows of earlier runs would leave: then it is rather the input that is wrong."""
    if earlier and leaving == earlier:
        raise InputError(
            f"the input has none of the {counted(earlier, 'row')} of earlier runs: all would leave the "
            f"output, which stays as it is; is it the right input, and --id-column? If so, {REMEDY}"
        )


def files_of(before: Files | None, now: Files, *, saw_all: bool) -> list[tuple[str, int]]:
    """The files that the output has rows of, sorted by name: all that were read.

    Where not all was, those of before too, with as many rows as they had.
    """
    if saw_all:
        return sorted(now)
    pairs, missing = _paired(before or (), now)
    return sorted([*((name, max(rows or 0, then or 0)) for name, rows, then in pairs), *missing])


def _paired(
    before: Files, now: Sequence[tuple[str, int | None]]
) -> tuple[list[tuple[str, int | None, int | None]], list[tuple[str, int]]]:
    """Each file with its rows now and before, and the files that are no longer there."""
    left: dict[str, list[int]] = defaultdict(list)
    for name, rows in before:
        left[name].append(rows)
    pairs = [(name, rows, left[name].pop(0) if left[name] else None) for name, rows in now]
    return pairs, [(name, rows) for name, found in left.items() for rows in found]


def notes_of(output: str, left: int, returned: int, kept: int) -> list[str]:
    """What to say of rows that left the output, came back to it, or stay though they did not come."""
    beside, notes = f".{output.rpartition('/')[2]}.dropped.parquet", []
    if left:
        they, come, them = ("is", "it comes", "it") if left == 1 else ("are", "they come", "them")
        notes.append(
            f"{counted(left, 'row')} {they} no longer in the input and left the output; {come} back from "
            f"{beside}, without being answered again, once the input has {them}"
        )
    if returned:
        was = "was" if returned == 1 else "were"
        notes.append(f"{counted(returned, 'row')} came back from {beside}, and {was} not answered again")
    if kept:
        rows, stays = counted(kept, "row"), "stays" if kept == 1 else "stay"
        notes.append(f"{rows} of earlier runs {stays} in the output: not all of the input was read")
    return notes
