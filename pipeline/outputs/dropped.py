"""Rows that left an output, in a file beside it, from which they come back if the input has them again.

It is written before the output that lacks them, and rid of rows that came back after the one that has them:
at any moment a row is in one of the two, or in both, where the output's counts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.outputs.beginnings import check_columns, check_settings, settings_in
from pipeline.outputs.own_columns import INDEXED
from pipeline.outputs.published import Published
from pipeline.outputs.rowindex import RowIndex
from pipeline.outputs.sidecar import Written
from pipeline.outputs.writing import output_writer, schema_as_written
from pipeline.storage.causes import READ_ERRORS
from pipeline.storage.whole_file import sync_folder

Tables = Callable[[pa.Schema], Iterable[pa.Table]]  # of the schema that they are to have


def dropped_path(output: str | Path) -> Path:
    """Beside the file itself, if the output is a link."""
    target = Path(os.path.realpath(output))
    return target.with_name(f".{target.name}.dropped.parquet")


class DroppedRows:
    """The file, as far as a run can use it: with the run's settings and columns."""

    def __init__(self, output: Path, schema: pa.Schema, settings: Any, *, resume: bool) -> None:
        """Opens the file if a run resumes; one that begins afresh has no use for it."""
        self.path = dropped_path(output)
        self._output, self._schema = output, schema
        self._later = self.path.with_stem(f"{self.path.stem}-later")
        self._last_step: Callable[[], object] | None = None  # once the output is durable
        written = self._written()
        self.can_hold = written is not None
        self.rows = None if written is None or not resume else self._opened(written, settings)

    def end_if_all_are_elsewhere(self, index: RowIndex) -> None:
        """Remove the file where a run was killed before it did, all its rows being in output or journal."""
        if any(True for _ in self.rows or ()) and not index.has_left():
            self.rows = None
            self.path.unlink()
            sync_folder(self.path.parent)

    def write(self, tables: Tables, temporary: Path) -> None:
        """Make these its rows, durable on return; `temporary` is a name on the same file system."""
        if self.rows is None and self.path.exists():
            self._move_away()
        self._write(self.path, tables, temporary)

    def write_later(self, tables: Tables | None) -> None:
        """Make ready what `tidy` makes its rows; None: it will have none."""
        if tables is None:
            self._last_step = partial(self.path.unlink, missing_ok=True)
        else:
            self._write(self._later, tables, self._later.with_name(f"{self._later.name}.partial"))
            self._last_step = partial(os.replace, self._later, self.path)

    def tidy(self) -> bool:
        """Let rows go that are in the output again, once that is durable; returns whether there are any."""
        if self._last_step is None:
            return False
        self._last_step()
        sync_folder(self.path.parent)
        return True

    def _written(self) -> pa.Schema | None:
        """The schema of the file; None where Parquet has no room for a type of the output."""
        try:
            return schema_as_written(self.path, self._schema)
        except ConfigError:
            return None

    def _opened(self, written: pa.Schema, settings: Any) -> Published | None:
        if not self.path.exists():
            return None
        try:
            rows = Published(self.path)
            check_settings(self.path, settings_in(self.path, rows.schema), settings)
            check_columns(self.path, rows.schema, written)
            for group in rows:
                rows.read(group, INDEXED)
        except (*READ_ERRORS, ConfigError):
            return None
        return rows

    def _move_away(self) -> None:
        """What cannot be used is another's, or damaged: it is not for us to destroy."""
        names = (self.path.with_name(f"{self.path.name}.{number}") for number in count(1))
        os.replace(self.path, next(name for name in names if not name.exists()))

    def _write(self, path: Path, tables: Tables, temporary: Path) -> None:
        def as_private_as_the_output(written: Written) -> None:
            if self._output.exists():
                shutil.copymode(self._output, temporary)

        with output_writer(path, self._schema, True, temporary, as_private_as_the_output) as writer:
            for table in tables(writer.schema):
                writer.write_table(table)
