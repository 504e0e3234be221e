"""With which settings a run began that is to be resumed, before anything is opened for writing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.outputs.beginnings import Beginning, settings_in
from pipeline.outputs.mirror import Mirror
from pipeline.outputs.own import written_schema
from pipeline.outputs.parts import journal_folder, journal_parts
from pipeline.outputs.published import Published
from pipeline.outputs.sidecar import needs_sidecar, read_sidecar
from pipeline.storage.causes import READ_ERRORS, NetworkError, cause, storage_failure
from pipeline.storage.remote import RemotePath, output_place


def begun_with(output: str) -> Any:
    """The settings that decide, of the unfinished run or the output that is there, or else None.

    An output that does not say them counts as none: opening the journal tells it. Of a table in object
    storage that no unfinished run extends, only the schema is read; else all is fetched.
    """
    place = output_place(output)
    if not isinstance(place, RemotePath):
        return _begun_with(place)
    with closing(Mirror(place, lambda: None)) as mirror:
        if not (needs_sidecar(mirror.file) or mirror.has_journal()):
            return _of_table(place)
        mirror.fetch()
        return _begun_with(mirror.file)


def _of_table(output: RemotePath) -> Any:
    try:
        if not output.exists():
            return None
        with output.open("rb") as file:
            return settings_in(Path(output.name), written_schema(pa.PythonFile(file, "r"), output.name))
    except NetworkError as error:
        raise storage_failure(f"{output} cannot be read: {cause(error)}", error) from error
    except (*READ_ERRORS, ConfigError):
        return None


def _begun_with(output: Path) -> Any:
    folder = journal_folder(output)
    if any(part.stat().st_size for part in journal_parts(folder)):
        return Beginning.load(folder).settings
    if not output.exists():
        return None
    try:
        schema = read_sidecar(output) if needs_sidecar(output) else Published(output).schema
        return settings_in(output, schema)
    except (*READ_ERRORS, ConfigError):
        return None
