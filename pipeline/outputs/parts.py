"""The folder of a journal: its parts, what is there when it is opened, and how it goes.

Nothing that is not ours is taken with it.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs.answers import own_columns, stored_in
from pipeline.outputs.beginnings import START_OVER, Beginning, check_columns, check_settings, settings_in
from pipeline.outputs.chunks import Chunk, Damage, PartWriter, read_chunk, scan_part
from pipeline.outputs.own import has_rows
from pipeline.outputs.own_columns import INDEXED
from pipeline.outputs.published import Published
from pipeline.outputs.rowindex import DROPPED, PUBLISHED
from pipeline.outputs.sidecar import needs_sidecar, read_sidecar
from pipeline.outputs.writing import refuse_existing
from pipeline.storage.causes import READ_ERRORS, cause, told
from pipeline.storage.whole_file import folder_like, in_the_way, sync_folder
from pipeline.texts.words import counted

DAMAGED = ".damaged"
_PART = re.compile(rf"part-(\d{{4,}})(?:{re.escape(DAMAGED)})?")
# partial files lie in the folder, so that what a killed run left of them goes with the journal
# .nfs: what a network's file system keeps of a file that was removed while it was open
_OURS = re.compile(
    rf"{_PART.pattern}|settings\.json(\.partial)?|index\.sqlite(-\w+)?|(output|sidecar|dropped|copies)\.partial(\.errors)?|\.nfs\w+"
)


def journal_folder(output: str | Path) -> Path:
    """Where the journal of an output is; outputs that are links to one file share it."""
    target = Path(os.path.realpath(output))
    return target.with_name(f".{target.name}.journal")


def journal_parts(folder: Path) -> list[Path]:
    """The parts of a journal, damaged ones too, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(filter(lambda path: _PART.fullmatch(path.name), folder.iterdir()), key=part_number)


def part_number(part: Path) -> int:
    found = _PART.fullmatch(part.name)
    assert found is not None
    return int(found[1])


class Parts:
    """The parts of a journal: those of earlier runs, which stay as they are, and the one of this run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._growing: PartWriter | None = None
        self.damages: dict[str, list[Damage]] = {}  # found, by the part's name

    def scan(self, *, set_aside: bool = True) -> Iterator[tuple[int, Chunk]]:
        """All whole chunks, with their part.

        With `set_aside` parts that are found to be damaged get names that say so, and are told of no more.
        """
        for path in journal_parts(self._folder):
            damages: list[Damage] = []
            for chunk in scan_part(path, damages.append):
                yield part_number(path), chunk
            if damages and not (set_aside and path.name.endswith(DAMAGED)):
                if set_aside:
                    path.rename(path.with_name(f"{path.name}{DAMAGED}"))
                self.damages[path.name] = damages

    def read(self, number: int, offset: int) -> pa.Table:
        """The chunk of a part that begins there."""
        path = self._path(number)
        return read_chunk(path if path.exists() else path.with_name(f"{path.name}{DAMAGED}"), offset)

    def append(self, chunk: bytes) -> tuple[int, int]:
        """Write a chunk, durable on return, and say in which part and where in it."""
        if self._growing is None:
            number = max(map(part_number, journal_parts(self._folder)), default=0) + 1
            self._growing = PartWriter(self._path(number))
        try:
            return part_number(self._growing.path), self._growing.append(chunk)
        except BaseException:
            # A part that failed once is left as it is: what follows, if anything, goes to another.
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        if self._growing is not None:
            self._growing.close()
            self._growing = None

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:04}"


def damage_told(damages: Sequence[Damage]) -> str:
    """What to say of a journal in which damage was found."""
    rows = sum(damage.rows or 0 for damage in damages)
    unknown = sum(damage.end - damage.offset for damage in damages if damage.rows is None)
    lost = [counted(rows, "finished row")] if rows else []
    lost += [f"what stood in {counted(unknown, 'byte')}"] if unknown else []
    return f"the journal is damaged: {' and '.join(lost)} cannot be read"


def refuse_foreign_folder(folder: Path) -> None:
    """A `ConfigError` if what has a journal's name is a link, a file, or holds what no run puts there."""
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or not all(_OURS.fullmatch(name) for name in os.listdir(folder)):
        raise in_the_way(folder, "it is no journal of marsinfer, or holds other files too")


def clear_discarded(folder: Path) -> None:
    """Remove what a killed run left of a journal that it was removing; a `ConfigError` if it is not ours."""
    for path in (folder, discarded(folder)):
        refuse_foreign_folder(path)
    shutil.rmtree(discarded(folder), ignore_errors=True)


def discarded(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-discarded")


def begin_journal(
    output: Path, written: pa.Schema, now: Any, resume: bool, overwrite: bool
) -> tuple[Beginning, Published | None]:
    """Refuse what must not be replaced or mixed, and set up the folder."""
    folder = journal_folder(output)
    clear_discarded(folder)
    if not resume:
        refuse_leftovers(output, overwrite)
        remove_journal(folder)
        return _start(output, Beginning(settings=now, replaces=overwrite)), None
    beginning, base = begun(output, written, now)
    if beginning is not None:
        folder_like(folder, output)
        if beginning.settings != now:  # which asks more
            beginning = replace(beginning, settings=now)
            beginning.save(folder)
        return beginning, base
    return _start(output, Beginning(settings=now, extends=base is not None, replaces=output.exists())), base


def begun(output: Path, written: pa.Schema, now: Any) -> tuple[Beginning | None, Published | None]:
    """What a resumed run goes on from: a journal that has answers, and an output. Nothing is changed.

    A ConfigError if one of them was made with other settings than `now`, or has other columns of its own.
    """
    folder = journal_folder(output)
    if not has_answers(folder):
        return None, _open_base(output, written, now) if output.exists() else None
    beginning = Beginning.load(folder)
    check_settings(output, beginning.settings, now)
    extends = beginning.extends and output.exists()
    return beginning, _open_base(output, written, now) if extends else None


def finished_tables(
    output: Path,
    schema: pa.Schema,
    dropped: Published | None,
    base: Published | None,
    chunks: Iterable[tuple[int, Chunk]],
    columns: Sequence[str] = INDEXED,
) -> Iterator[tuple[pa.Table, int, int, int]]:
    """The rows that earlier runs finished: tables, with the part and chunk of each and about a row's bytes.

    The tables have these `columns`, null where the output lacks one.
    Of a row that comes twice the later one counts: those that left the output come first, and answers of a
    run that was not published last. A ConfigError for chunks whose own columns are not those of `schema`.
    """
    with output_failures_told(output):
        for part, rows in ((DROPPED, dropped), (PUBLISHED, base)):
            if rows is not None:
                for group in rows:
                    table = rows.read(group, stored_in(rows.schema, columns))
                    yield own_columns(table, columns), part, group, rows.row_bytes(group)
    for number, chunk in chunks:
        check_columns(output, chunk.table.schema, schema)
        row_bytes = (chunk.end - chunk.offset) // max(chunk.table.num_rows, 1)
        table = chunk.table.select(stored_in(chunk.table.schema, columns))
        yield own_columns(table, columns), number, chunk.offset, row_bytes


def refuse_leftovers(output: Path, overwrite: bool) -> None:
    """A ConfigError if an output or an unfinished run is there that may not be replaced."""
    folder = journal_folder(output)
    if not overwrite and has_answers(folder):
        raise ConfigError(f"an unfinished run left {folder.name}; --resume continues it, {START_OVER}")
    refuse_existing(output, overwrite)


def _start(output: Path, beginning: Beginning) -> Beginning:
    folder = journal_folder(output)
    with told(f"{folder} cannot be made", "; choose a folder that is writable"):
        folder.mkdir(exist_ok=True)
        folder_like(folder, output)
    beginning.save(folder)
    sync_folder(folder.parent)
    return beginning


def _open_base(output: Path, written: pa.Schema, now: Any) -> Published | None:
    """The output that a run goes on from; None for one without rows that has other settings or columns."""
    with output_failures_told(output):
        base = Published(output, lines_schema=read_sidecar(output) if needs_sidecar(output) else None)
        try:
            check_settings(output, settings_in(output, base.schema), now)
            check_columns(output, base.schema, written)
        except ConfigError:
            if has_rows(output):
                raise
            return None
    return base


def has_answers(folder: Path) -> bool:
    """Whether a journal has anything that is worth going on with."""
    return any(part.stat().st_size > 0 for part in journal_parts(folder))


def remove_journal(folder: Path) -> None:
    """Remove a journal, if it is there.

    It is renamed first, as one that is half removed would look like one that is damaged. What somebody else
    has put into it meanwhile stays, in the folder of its new name.
    """
    if not folder.is_dir():
        return
    with journal_failures_told(folder):
        left = discarded(folder)
        refuse_foreign_folder(left)
        shutil.rmtree(left, ignore_errors=True)
        folder.rename(left)
        for name in filter(_OURS.fullmatch, os.listdir(left)):
            (left / name).unlink(missing_ok=True)
        if not os.listdir(left):
            left.rmdir()


def output_failures_told(output: Path) -> AbstractContextManager[None]:
    """Turn what reading an output raises into a `ConfigError`."""
    return told(f"{output} cannot be read", f"; {START_OVER}", ConfigError, READ_ERRORS)


@contextmanager
def journal_failures_told(folder: Path) -> Iterator[None]:
    """Turn what working with a journal raises into a `StorageError`."""
    try:
        yield
    except (OSError, sqlite3.Error, pa.ArrowException) as error:
        if not folder.is_dir():
            raise StorageError(f"{folder} is gone, and the answers in it; run again") from error
        raise StorageError(
            f"{folder} cannot be used: {cause(error)}; the journal is intact, and --resume continues "
            "once that is put right"
        ) from error
