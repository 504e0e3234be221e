"""What JSON lines cannot say of themselves, in a file beside them: how they were made, and their types."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.io.beginnings import METADATA_KEY, START_OVER, save_json
from pipeline.io.causes import READ_ERRORS

VERSION = 1

_SCALARS = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
_STRINGS = (pa.string(), pa.large_string(), pa.string_view())


def needs_sidecar(output: Path) -> bool:
    return output.suffix.lower() == ".jsonl"


def sidecar_path(output: Path) -> Path:
    """Beside the file itself, if the output is a link."""
    target = Path(os.path.realpath(output))
    return target.with_name(f"{target.name}.run.json")


def refuse_foreign(output: Path) -> None:
    """A `ConfigError` if a file that is no sidecar has the sidecar's name."""
    if needs_sidecar(output) and sidecar_path(output).exists():
        _load(sidecar_path(output))


def write_sidecar(output: Path, schema: pa.Schema, sizes: Sequence[int], temporary: Path) -> None:
    """Durable, and to be written before the output is.

    `sizes` are those in bytes that the output may have: that of the new one, and of the one it extends, as
    the run may be killed before the one replaces the other. Both have the same schema and settings.
    """
    content = {
        "version": VERSION,
        "bytes": list(sizes),
        "columns": {field.name: str(field.type) for field in schema},
        "arrow_schema": base64.b64encode(schema.remove_metadata().serialize()).decode(),
        METADATA_KEY.decode(): json.loads((schema.metadata or {}).get(METADATA_KEY, b"null")),
    }
    save_json(sidecar_path(output), content, temporary, like=output)


def read_sidecar(output: Path) -> pa.Schema:
    """The schema that the output was written with, its metadata included.

    A `ConfigError` if it is not known, not that of this output, or has a type that JSON does not give back.
    """
    path, size = sidecar_path(output), output.stat().st_size
    if not path.exists():
        raise ConfigError(f"{output} is complete, and no {path.name} says how it was made; {START_OVER}")
    schema, sizes = _load(path)
    if size not in sizes:
        raise ConfigError(
            f"{output} has {size:,} bytes, and by {path.name} it had {sizes[0]:,}: "
            f"one of them was changed; {START_OVER}"
        )
    for field in schema:
        if not _comes_back(field.type):
            raise ConfigError(
                f"{output} holds {field.name!r} as {field.type}, which JSON does not give back; {START_OVER}"
            )
    return schema


def _load(path: Path) -> tuple[pa.Schema, list[int]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ConfigError(f"{path} is of another version of marsinfer; {START_OVER}")
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["arrow_schema"])))
        metadata = json.dumps(content[METADATA_KEY.decode()])
        return schema.with_metadata({METADATA_KEY: metadata}), list(content["bytes"])
    except (*READ_ERRORS, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is damaged, or not of marsinfer; move it away and run again") from error


def _comes_back(kind: pa.DataType) -> bool:
    """Whether a value that was written as JSON is read back as it was."""
    if isinstance(kind, pa.BaseExtensionType):
        return False
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        return len(set(names)) == len(names) and all(_comes_back(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _comes_back(kind.value_type)
    return kind in _STRINGS or any(is_kind(kind) for is_kind in _SCALARS)
