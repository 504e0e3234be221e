"""What is there when a journal is opened: refused, gone on with, or set up anew."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError, MarsError, StorageError
from pipeline.outputs.beginnings import START_OVER, Beginning, check_columns, check_settings, settings_in
from pipeline.outputs.parts import clear_discarded, discard, journal_folder, parts_of
from pipeline.outputs.published import Published
from pipeline.outputs.sidecar import needs_sidecar, read_sidecar
from pipeline.outputs.writing import refuse_existing
from pipeline.storage.causes import READ_ERRORS, cause
from pipeline.storage.whole_file import folder_like, sync_folder


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
        return beginning, base
    is_there = base is not None
    return _start(output, Beginning(settings=now, extends=is_there, replaces=is_there)), base


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


def refuse_leftovers(output: Path, overwrite: bool) -> None:
    """A ConfigError if an output or an unfinished run is there that may not be replaced."""
    folder = journal_folder(output)
    if not overwrite and has_answers(folder):
        raise ConfigError(f"an unfinished run left {folder.name}; --resume continues it, {START_OVER}")
    refuse_existing(output, overwrite)


def _start(output: Path, beginning: Beginning) -> Beginning:
    folder = journal_folder(output)
    try:
        folder.mkdir(exist_ok=True)
        folder_like(folder, output)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be made: {cause(error)}; choose a folder that is writable"
        ) from error
    beginning.save(folder)
    sync_folder(folder.parent)
    return beginning


def _open_base(output: Path, written: pa.Schema, now: Any) -> Published:
    with output_failures_told(output):
        base = Published(output, lines_schema=read_sidecar(output) if needs_sidecar(output) else None)
        check_settings(output, settings_in(output, base.schema), now)
        check_columns(output, base.schema, written)
    return base


def has_answers(folder: Path) -> bool:
    """Whether a journal has anything that is worth going on with."""
    return any(part.stat().st_size > 0 for part in parts_of(folder).values())


def remove_journal(folder: Path) -> None:
    """Remove a journal, if it is there."""
    if folder.is_dir():
        with journal_failures_told(folder):
            discard(folder)


@contextmanager
def output_failures_told(output: Path) -> Iterator[None]:
    """Turn what reading an output raises into a `ConfigError`."""
    try:
        yield
    except READ_ERRORS as error:
        raise ConfigError(f"{output} cannot be read: {cause(error)}; {START_OVER}") from error


@contextmanager
def journal_failures_told(folder: Path) -> Iterator[None]:
    """Turn what working with a journal raises into a `StorageError`."""
    try:
        yield
    except MarsError:
        raise
    except (OSError, sqlite3.Error, pa.ArrowException) as error:
        if not folder.is_dir():
            raise StorageError(f"{folder} is gone, and the answers in it; run again") from error
        raise StorageError(
            f"{folder} cannot be used: {cause(error)}; the journal is intact, and --resume continues "
            "once that is put right"
        ) from error
