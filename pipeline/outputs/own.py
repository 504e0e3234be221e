"""Tables that marsinfer wrote, known by what it writes into them or beside them."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.outputs.batch_lines import errors_path, output_of
from pipeline.outputs.beginnings import METADATA_KEY, SETTINGS_KEY
from pipeline.outputs.layout import rows_schema
from pipeline.outputs.own_columns import INDEXED
from pipeline.outputs.sidecar import ERRORS_KEY, SIDECAR, needs_sidecar, sidecar_path
from pipeline.storage.causes import READ_ERRORS, is_out_of_reach
from pipeline.storage.remote import Place
from pipeline.storage.sniff import ARROW_FILE

BASELINE_KEY = b"marsinfer_baseline"


@dataclass(frozen=True)
class TableKind:
    """What a table is for, known by a key of its metadata and by columns.

    Metadata outlives a change of columns, so a table that was made of one of ours may have it too.
    """

    key: bytes
    columns: frozenset[str]

    def has(self, schema: pa.Schema) -> bool:
        """Whether a table of this schema is of the kind."""
        return self.columns.issubset(rows_schema(schema).names) and _says(schema, self.key)


OUTPUT = TableKind(METADATA_KEY, frozenset(INDEXED))
BASELINE = TableKind(BASELINE_KEY, frozenset({"id", "row_hash", "generated"}))  # of a check


def is_own_table(schema: pa.Schema) -> bool:
    """Whether a Parquet or Arrow file of this schema is of any kind of ours."""
    return OUTPUT.has(schema) or BASELINE.has(schema)


def may_be_replaced(path: Place) -> bool:
    """Whether nothing is lost with what has an output's name: a batch wrote it, or it has no bytes.

    Raises OSError where that cannot be found out now.
    """
    if not path.is_file():
        return True  # a pipe, which holds nothing
    if _bytes(path) == 0:
        return True
    if needs_sidecar(path):
        return _bytes(path) in _sizes_told(sidecar_path(path))
    try:
        return OUTPUT.has(table_schema(path))
    except READ_ERRORS as error:
        _raise_unknown(error)
        return False


def was_ours(path: Place) -> bool:
    """Whether a run wrote something under this name, by what lies beside it, whatever is there now."""
    return needs_sidecar(path) and bool(_sizes_told(sidecar_path(path)))


def foreign_sidecar(path: Place) -> Place | None:
    """What has the name of the file that says how an output was made, if no run wrote it."""
    if not needs_sidecar(path):
        return None
    sidecar = sidecar_path(path)
    if not sidecar.exists() or _bytes(sidecar) == 0 or _sizes_told(sidecar):
        return None
    return sidecar


def foreign_errors(path: Place) -> Place | None:
    """What has the name of the file of rows without an answer, if no run wrote it."""
    errors = errors_path(path)
    is_free = not errors.exists() or _bytes(errors) == 0 or has_errors(path)
    return None if is_free else errors


def has_errors(path: Place) -> bool:
    """Whether there are rows without an answer beside an output that a run wrote."""
    if not needs_sidecar(path) or not errors_path(path).exists():
        return False
    return _bytes(errors_path(path)) in _sizes_told(sidecar_path(path), of_errors=True)


def _bytes(path: Place) -> int:
    return path.stat().st_size if isinstance(path, Path) else path.size()


def table_schema(path: Place) -> pa.Schema:
    """The schema of a table, whose format its first bytes tell; reads no rows."""
    with path.open("rb") as opened, pa.PythonFile(opened, "r") as file:
        magic = file.read(len(ARROW_FILE))
        file.seek(0)
        if magic.startswith(b"PAR1"):
            return pq.read_schema(file)
        return (pa.ipc.open_file if magic == ARROW_FILE else pa.ipc.open_stream)(file).schema


def has_rows(path: Place) -> bool:
    """Whether an output has rows, or has those without an answer beside it; reads at most one batch."""
    if needs_sidecar(path):
        return _bytes(path) > 0 or has_errors(path)
    with path.open("rb") as opened, pa.PythonFile(opened, "r") as file:
        magic = file.read(len(ARROW_FILE))
        file.seek(0)
        if magic.startswith(b"PAR1"):
            return bool(pq.read_metadata(file).num_rows)
        if magic == ARROW_FILE:
            return bool(pa.ipc.open_file(file).num_record_batches)
        return any(batch.num_rows for batch in pa.ipc.open_stream(file))


def _says(schema: pa.Schema, key: bytes) -> bool:
    try:
        return SETTINGS_KEY in json.loads((schema.metadata or {})[key])
    except (LookupError, TypeError, ValueError):
        return False


def is_own_lines(path: Place, listed: Collection[str]) -> bool:
    """Whether JSON lines are of an output: whether the file that says how they were made is beside them.

    `listed` are the names, as shown, that were found in remote folders: for no others storage is asked.
    """
    if not needs_sidecar(path):
        return False
    if _holds_errors(path, listed):
        return True
    if isinstance(path, Path):
        # the links of its folders lead to the same place
        sidecar: Place = sidecar_path(path) if path.is_symlink() else path.with_name(f"{path.name}{SIDECAR}")
    else:
        sidecar = sidecar_path(path)
        if str(sidecar) not in listed:
            return False
    return bool(_sizes_told(sidecar))


def _holds_errors(path: Place, listed: Collection[str]) -> bool:
    """Whether JSON lines are the rows without an answer of an output beside them."""
    name = output_of(path.name)
    if name is None:
        return False
    if isinstance(path, Path):
        return has_errors(path.with_name(name))
    output = path.beside(name)
    return str(sidecar_path(output)) in listed and has_errors(output)


def _sizes_told(sidecar: Place, *, of_errors: bool = False) -> list[int]:
    """How many bytes the lines beside a sidecar may have, or its rows without an answer.

    None if no run wrote it. Raises OSError where that cannot be found out now.
    """
    if not sidecar.exists():
        return []
    try:
        content = json.loads(sidecar.read_bytes())
        if "arrow_schema" not in content or METADATA_KEY.decode() not in content:
            return []
        written = (content, *content.get("before", []))
        if of_errors:
            return [told[ERRORS_KEY] for told in written if ERRORS_KEY in told]
        return [size for told in written for size in told["bytes"]]
    except (*READ_ERRORS, LookupError, TypeError) as error:
        _raise_unknown(error)
        return []


def _raise_unknown(error: BaseException) -> None:
    """Raise an error that says nothing of what is in a file which is there."""
    if is_out_of_reach(error) and not isinstance(error, FileNotFoundError):
        raise error
