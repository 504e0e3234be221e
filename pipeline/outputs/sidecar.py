"""What JSON lines cannot say of themselves, in a file beside them: how they were made, and their types."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.outputs.batch_lines import OWN, TOLD_THERE, errors_path, is_of_requests
from pipeline.outputs.beginnings import METADATA_KEY, START_OVER, save_json
from pipeline.storage.causes import READ_ERRORS
from pipeline.storage.remote import Place, RemotePath
from pipeline.values.dictionaries import STRINGS
from pipeline.values.jsonvalues import holds_keys

SIDECAR = ".run.json"
ERRORS_KEY = "errors_bytes"
VERSION = 1

_SCALARS = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)

AnyPlace = TypeVar("AnyPlace", Path, RemotePath, Place)


class Written(NamedTuple):
    """JSON lines as a run wrote them: their bytes, and the schema of their rows."""

    size: int
    schema: pa.Schema
    errors: int | None = None  # bytes of the file of rows without an answer, of an output that has one


def needs_sidecar(output: Place) -> bool:
    return output.suffix.lower() == ".jsonl"


def sidecar_path(output: AnyPlace) -> AnyPlace:
    """Beside the file itself, if the output is a link."""
    if isinstance(output, RemotePath):
        return output.beside(f"{output.name}{SIDECAR}")
    target = Path(os.path.realpath(output))
    return target.with_name(f"{target.name}{SIDECAR}")


def refuse_foreign(output: Path) -> None:
    """A `ConfigError` if a file that is no sidecar has the sidecar's name."""
    if needs_sidecar(output) and sidecar_path(output).exists():
        _load(sidecar_path(output))


def write_sidecar(output: Path, written: Written, temporary: Path) -> None:
    """Durable, and to be written before the output is.

    It tells of the output that is there too, as the run may be killed before the new one replaces it.
    """
    content = {"version": VERSION, **_described(written)}
    if before := _standing(output):
        content["before"] = [_described(each) for each in before]
    save_json(sidecar_path(output), content, temporary, like=output)


def _standing(output: Path) -> list[Written]:
    """What the output may be that is there, as the file beside it tells; nothing if that tells of another."""
    try:
        size = output.stat().st_size
        return [written for written in _load(sidecar_path(output)) if written.size == size]
    except (OSError, ConfigError):
        return []


def _described(written: Written) -> dict[str, Any]:
    size, schema, errors = written
    return {
        "bytes": [size],
        **({} if errors is None else {ERRORS_KEY: errors}),
        "columns": {field.name: str(field.type) for field in schema},
        "arrow_schema": base64.b64encode(schema.remove_metadata().serialize()).decode(),
        METADATA_KEY.decode(): json.loads((schema.metadata or {}).get(METADATA_KEY, b"null")),
    }


def read_sidecar(output: Path) -> pa.Schema:
    """The schema that the output was written with, its metadata included.

    A `ConfigError` if it is not known, not that of this output, or has a type that JSON does not give back.
    """
    path, size = sidecar_path(output), output.stat().st_size
    if not path.exists():
        raise ConfigError(f"{output} is complete, and no {path.name} says how it was made; {START_OVER}")
    told = _load(path)
    fitting = [written.schema for written in told if written.size == size]
    if not fitting:
        raise _changed(output, size, path, told[0].size)
    if is_of_requests(fitting[0]):
        _check_errors(errors_path(output), path, told)
    schema = next((schema for schema in fitting if _has_columns(output, schema)), fitting[0])
    for field in schema:
        if not _comes_back(field.type):
            raise ConfigError(
                f"{output} holds {field.name!r} as {field.type}, which JSON does not give back; {START_OVER}"
            )
    return schema


def _changed(file: Path, size: int, sidecar: Path, told: int) -> ConfigError:
    return ConfigError(
        f"{file} has {size:,} bytes, and by {sidecar.name} it had {told:,}: "
        "one of them was changed; move it away to start over"
    )


def _check_errors(errors: Path, sidecar: Path, told: Sequence[Written]) -> None:
    """A `ConfigError` for rows without an answer that are not those written; without any, all is well."""
    sizes = [written.errors for written in told if written.errors is not None]
    if errors.exists() and errors.stat().st_size not in sizes:
        raise _changed(errors, errors.stat().st_size, sidecar, max(sizes, default=0))


def _has_columns(output: Path, schema: pa.Schema) -> bool:
    """Whether the first line has the columns of a schema, of two that the output may have by its size."""
    with output.open("rb") as lines:
        line = lines.readline()
    of_requests = is_of_requests(schema)
    elsewhere = TOLD_THERE if of_requests else ()
    names = [field.name for field in schema if not (holds_keys(field) or field.name in elsewhere)]
    try:
        found = json.loads(line)
        return list(found[OWN] if of_requests else found)[: len(names)] == names
    except (ValueError, TypeError, LookupError):
        return False


def _load(path: Path) -> list[Written]:
    """What the output may be, the newest first."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ConfigError(f"{path} is of another version of marsinfer; {START_OVER}")
        told = [content, *content.get("before", [])]
        return [
            Written(size, _schema_of(each), each.get(ERRORS_KEY))
            for each in told
            for size in list(each["bytes"])
        ]
    except (*READ_ERRORS, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is damaged, or not of marsinfer; move it away and run again") from error


def _schema_of(described: dict[str, Any]) -> pa.Schema:
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(described["arrow_schema"])))
    return schema.with_metadata({METADATA_KEY: json.dumps(described[METADATA_KEY.decode()])})


def _comes_back(kind: pa.DataType) -> bool:
    """Whether a value that was written as JSON is read back as it was."""
    if isinstance(kind, pa.BaseExtensionType):
        return False
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        return len(set(names)) == len(names) and all(_comes_back(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _comes_back(kind.value_type)
    return kind in STRINGS or any(is_kind(kind) for is_kind in _SCALARS)
