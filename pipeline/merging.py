"""Outputs of shards, or of other runs with the same settings and different rows, made into one."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.outputs.answers import halves
from pipeline.outputs.beginnings import (
    METADATA_KEY,
    bounds_in,
    files_in,
    settings_differ,
    settings_in,
    with_files,
)
from pipeline.outputs.dropped import dropped_path
from pipeline.outputs.formats import sink_type
from pipeline.outputs.lock import lock_output, refuse_locked
from pipeline.outputs.merge import merge, refuse_misfit
from pipeline.outputs.own import OUTPUT
from pipeline.outputs.parts import has_answers, journal_folder, refuse_leftovers, remove_journal
from pipeline.outputs.published import Published
from pipeline.outputs.rowindex import DUPLICATE, INDEXED, RowIndex, scratch_index
from pipeline.outputs.sidecar import Written, needs_sidecar, read_sidecar, sidecar_path, write_sidecar
from pipeline.outputs.writing import check_output, output_writer
from pipeline.settings.parse import parse_shard
from pipeline.storage.causes import READ_ERRORS, some, told
from pipeline.storage.remote import RemotePath, output_place
from pipeline.storage.whole_file import partial_path, remove_partials
from pipeline.texts.words import counted
from pipeline.values.dictionaries import settled

MOST_TOLD = 5


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A published output that becomes a part of another."""

    path: Path
    rows: Published = field(repr=False)
    about: dict[str, Any] = field(repr=False)  # what its metadata says

    @property
    def number(self) -> tuple[int, int] | None:
        """Which of how many shards it is, if it is one."""
        text = self.about.get("config", {}).get("shard")
        return None if text is None else parse_shard(text)

    @property
    def schemas(self) -> tuple[pa.Schema, pa.Schema]:
        """Its columns of answers, and the copied ones."""
        return halves(self.rows.schema)


def merge_outputs(
    output: str,
    shards: Sequence[str],
    *,
    overwrite: bool = False,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Write the rows of all `shards` to one output, in the order of their input; returns how many they are.

    Memory does not grow with the rows. `check` is called often, and what it raises leaves no output. Raises
    ConfigError for outputs that are not finished, or do not belong together: of other settings or columns, of
    the same rows, or not of all shards; LockedError where a run writes one of them.
    """
    place = _local(output)
    parts = [_opened(_local(shard)) for shard in shards]
    check_output(place, [part.path for part in parts], overwrite)
    refuse_leftovers(place, overwrite)
    for part in parts[1:]:
        _refuse_unlike(parts[0], part)
    _refuse_incomplete(parts)
    with lock_output(place), _indexed(parts, check) as index:
        _write(place, parts, index, overwrite=overwrite, check=check)
        return index.counts(seen=True).total()


def _local(given: str) -> Path:
    place = output_place(given)
    if isinstance(place, RemotePath):
        raise ConfigError(f"{place} is not on this machine: merge reads and writes local files; copy it")
    sink_type(place)
    return place


def _opened(path: Path) -> Shard:
    """A ConfigError for what is no finished output."""
    folder = journal_folder(path)
    if has_answers(folder):
        raise ConfigError(f"{path} is not finished: a run left {folder.name}, and --resume goes on with it")
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    refuse_locked(path)
    if needs_sidecar(path) and not sidecar_path(path).exists():
        raise ConfigError(f"{path} has no {sidecar_path(path).name} beside it, which says how it was made")
    with told(f"{path} cannot be read", kind=ConfigError, of=READ_ERRORS):
        rows = Published(path, lines_schema=read_sidecar(path) if needs_sidecar(path) else None)
    if not OUTPUT.has(rows.schema):
        raise ConfigError(f"{path} is no output of marsinfer batch")
    return Shard(path=path, rows=rows, about=json.loads(rows.schema.metadata[METADATA_KEY]))


def _refuse_unlike(first: Shard, other: Shard) -> None:
    """A ConfigError for other settings or columns."""
    then, now = (settings_in(shard.path, shard.rows.schema) for shard in (first, other))
    differ = settings_differ(then, now, words=(f"is, in {first.path},", "and here"))
    if differ:
        raise ConfigError(f"{other.path} was made with other settings: {differ}")
    for ours, theirs, flag in zip(first.schemas, other.schemas, ("--columns", "--keep-columns"), strict=True):
        more = [name for name in theirs.names if name not in ours.names]
        gone = [name for name in ours.names if name not in theirs.names]
        if more:
            raise ConfigError(f"{other.path} has {some(more, MOST_TOLD)}, and {first.path} has not ({flag})")
        if gone:
            raise ConfigError(f"{other.path} lacks {some(gone, MOST_TOLD)} of {first.path} ({flag})")
        for name in ours.names:
            one, two = (settled(schema.field(name).type) for schema in (ours, theirs))
            if one != two and flag == "--keep-columns":
                raise ConfigError(f"{name!r} is {one} in {first.path} and {two} in {other.path} ({flag})")


def _refuse_incomplete(outputs: Sequence[Shard]) -> None:
    """A ConfigError where some of the outputs are shards, and not exactly all of them, of the same rows."""
    shards = [shard for shard in outputs if shard.number is not None]
    by_number: dict[tuple[int, int], Path] = {}
    for shard in shards:
        number = shard.number
        if number is None:
            continue
        if number in by_number:
            raise ConfigError(f"{by_number[number]} and {shard.path} are both shard {number[0]}/{number[1]}")
        by_number[number] = shard.path
    counts = {count: path for (_, count), path in by_number.items()}
    if len(counts) > 1:
        (one, first), (other, second) = list(counts.items())[:2]
        raise ConfigError(f"{first} is one of {one} shards, and {second} one of {other}")
    for count in counts:
        missing = [f"{each}/{count}" for each in range(1, count + 1) if (each, count) not in by_number]
        if missing:
            many = "shard is" if len(missing) == 1 else "shards are"
            raise ConfigError(f"{len(missing)} {many} missing: {some(missing, MOST_TOLD)}")
    for shard in shards[1:]:
        _refuse_other_rows(shards[0], shard)


def _refuse_other_rows(first: Shard, other: Shard) -> None:
    """A ConfigError where two shards are not of the same rows: some would be in none of the shards."""
    ours, theirs = (bounds_in(shard.rows.schema) for shard in (first, other))
    if ours != theirs:
        names = [name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name)]
        told_of = [_bound_told(names[0], bounds) for bounds in (ours, theirs)]
        raise ConfigError(
            f"{first.path} was made {told_of[0]}, and {other.path} {told_of[1]}; run both alike, with "
            "--resume"
        )
    one, two = (files_in(shard.rows.schema) for shard in (first, other))
    if ours or one is None or two is None:  # not all was read; or they are of an earlier version
        return
    differ = (Counter(one) - Counter(two)) + (Counter(two) - Counter(one))
    if differ:
        name = min(differ)[0]
        told_of = [_rows_told(files, name) for files in (one, two)]
        raise ConfigError(
            f"{first.path} and {other.path} are shards of different inputs: {name} {told_of[0]} for the one, "
            f"and {told_of[1]} for the other; run both on the same files, with --resume"
        )


def _bound_told(name: str, bounds: Mapping[str, int]) -> str:
    return f"with --{name} {bounds[name]}" if name in bounds else f"without --{name}"


def _rows_told(files: Sequence[tuple[str, int]], name: str) -> str:
    rows = [rows for file, rows in files if file == name]
    return f"had {counted(sum(rows), 'row')}" if rows else "was not there"


@contextmanager
def _indexed(shards: Sequence[Shard], check: Callable[[], None]) -> Iterator[RowIndex]:
    """All rows, by place; the part of a row is the number of its shard, from 1."""
    with scratch_index() as index:
        rows = 0
        for number, shard in enumerate(shards, start=1):
            for group in shard.rows:
                check()
                table = _read(shards, number, group, INDEXED)
                index.enter(table, number, group, shard.rows.row_bytes(group), seen=True)
                rows += table.num_rows
        _refuse_same_ids(shards, index, rows)
        twice = index.first_twice()
        if twice is not None:
            row, first, second = twice
            raise ConfigError(
                f"row {row} stands both in {shards[first - 1].path} and in {shards[second - 1].path}: their "
                "rows overlap, or their inputs differ"
            )
        yield index


def _refuse_same_ids(shards: Sequence[Shard], index: RowIndex, rows: int) -> None:
    """A ConfigError if the index has fewer than all rows: of one id it keeps the row that came last."""
    if index.counts(seen=True).total() == rows:
        return
    for number, shard in enumerate(shards, start=1):
        for group in shard.rows:
            table = _read(shards, number, group, ("id", "error_type", "question_index"))
            for id, kind, question in zip(*(column.to_pylist() for column in table.columns), strict=True):
                other = number if kind == DUPLICATE else index.part_of(id, question)
                if other != number:
                    there = shards[(other or number) - 1].path
                    raise ConfigError(f"the id {id!r} stands both in {shard.path} and in {there}")
    raise ConfigError("an id stands twice in one of the outputs")


def _read(shards: Sequence[Shard], number: int, group: int, columns: Sequence[str] | None = None) -> pa.Table:
    shard = shards[number - 1]
    with told(f"{shard.path} cannot be read", kind=ConfigError, of=READ_ERRORS):
        return shard.rows.read(group, columns)


def _write(
    output: Path, shards: Sequence[Shard], index: RowIndex, *, overwrite: bool, check: Callable[[], None]
) -> None:
    for file in (output, sidecar_path(output)):
        remove_partials(file)

    def beside(written: Written) -> None:
        if needs_sidecar(output):
            write_sidecar(output, written, partial_path(sidecar_path(output)))

    with output_writer(output, _schema(output, shards), overwrite, before=beside) as writer:
        locations, read = index.locations("input"), partial(_read, shards)
        for table in merge(locations, read, *halves(writer.schema), refuse_misfit):
            check()
            writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
        # what a replaced output has left of its run
        remove_journal(journal_folder(output))
        dropped_path(output).unlink(missing_ok=True)


def _schema(output: Path, shards: Sequence[Shard]) -> pa.Schema:
    """That of the first, with metadata of a run that had no shard."""
    first = shards[0]
    config = {**first.about.get("config", {}), "shard": None, "output": str(output)}
    about = {**first.about, "config": config, "merged": [str(shard.path) for shard in shards]}
    schema = first.rows.schema.with_metadata({METADATA_KEY: json.dumps(about)})
    files: dict[str, int] = defaultdict(int)
    for shard in shards:
        for name, rows in files_in(shard.rows.schema) or ():
            files[name] = max(files[name], rows)
    return with_files(schema, sorted(files.items()))
