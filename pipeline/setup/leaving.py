"""Rows of an output that its input no longer has: when they may leave it, and what to say of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.inputs.reading import Reading
from pipeline.inputs.source import Source
from pipeline.outputs.finished import FinishedRows
from pipeline.settings.run_settings import BatchConfig
from pipeline.storage.causes import some
from pipeline.texts.words import counted

REMEDY = "--drop-missing lets them go"
MOST_TOLD = 3


@dataclass(frozen=True)
class Leaving:
    """The rows of earlier runs, beside those that are read now."""

    config: BatchConfig
    source: Source
    rows: Reading
    earlier: FinishedRows

    def refuse_at_start(self) -> None:
        """An InputError for a file that is known to be missing or empty before anything is read.

        Where a column says the ids, its rows may stand in another file now: that is known when all is read.
        """
        if self.source.columns.id is None and not (self.rows.is_selective or self.config.drop_missing):
            self._refuse_missing(self.source.files_told)

    def settle(self) -> list[str]:
        """When all is read: decide which rows of earlier runs leave, and give what to say of it.

        Raises InputError where they are all, or some while a file is missing, and `drop_missing` does not let
        them go.
        """
        kept, earlier = 0, self.earlier
        if not (self.rows.saw_all and earlier.can_drop):
            kept = earlier.stay(fleeting=self.rows.is_selective)
        elif earlier.leaving() and not self.config.drop_missing:
            self._refuse_missing(self.source.files_read)
            self._refuse_all()
        return _notes(self.config.output, earlier.leaving(), earlier.returned, kept)

    def files(self) -> list[tuple[str, int]]:
        """The files that the output has rows of, sorted by name: all that were read.

        Where not all was, those of before too, with as many rows as they had.
        """
        if self.rows.saw_all:
            return sorted(self.source.files_read)
        pairs, missing = _paired(self.earlier.files or (), self.source.files_read)
        return sorted([*((name, max(rows or 0, then or 0)) for name, rows, then in pairs), *missing])

    def _refuse_missing(self, now: Sequence[tuple[str, int | None]]) -> None:
        """An InputError where a file that the output has rows of is not there any more, or has no rows.

        Of the rows of a file that is there, None: not known yet.
        """
        pairs, missing = _paired(self.earlier.files or (), now)
        gone = [name for name, rows in missing if rows]
        gone += [f"{name} (empty)" for name, rows, then in pairs if rows == 0 and then]
        if gone:
            raise InputError(
                f"of the files of the last run {counted(len(gone), 'file')} "
                f"{'is' if len(gone) == 1 else 'are'} missing or empty: {some(gone, MOST_TOLD)}; the output "
                f"stays as it is: bring them back, or {REMEDY}, and their rows with them"
            )

    def _refuse_all(self) -> None:
        """An InputError where all rows of earlier runs would leave: then the input is rather wrong."""
        earlier = self.earlier.lasting_at_start
        if earlier and self.earlier.lasting_leaving() == earlier:
            raise InputError(
                f"the input has none of the {counted(earlier, 'row')} of earlier runs: all would leave the "
                f"output, which stays as it is; is it the right input, and --id-column? If so, {REMEDY}"
            )


def _paired(
    before: Sequence[tuple[str, int]], now: Sequence[tuple[str, int | None]]
) -> tuple[list[tuple[str, int | None, int | None]], list[tuple[str, int]]]:
    """Each file with its rows now and before, and the files that are gone; a name may come twice."""
    left: dict[str, list[int]] = defaultdict(list)
    for name, rows in before:
        left[name].append(rows)
    pairs = [(name, rows, left[name].pop(0) if left[name] else None) for name, rows in now]
    return pairs, [(name, rows) for name, found in left.items() for rows in found]


def _notes(output: str, left: int, returned: int, kept: int) -> list[str]:
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
