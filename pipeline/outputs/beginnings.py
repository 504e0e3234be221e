"""With which settings and columns a run began, and how those of a resumed one differ."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs.answers import halves
from pipeline.outputs.chunks import scan_part
from pipeline.outputs.own_columns import CHOSEN_FROM
from pipeline.storage.remote import Place
from pipeline.storage.whole_file import open_new, sync_folder
from pipeline.values.dictionaries import settled

STATE_FILE = "settings.json"
VERSION = 1

METADATA_KEY = b"marsinfer"
SETTINGS_KEY = "settings_that_decide"
QUESTIONS_KEY = "questions"  # of these settings: the names of those that have columns
UNASKED_KEY = "asks_summary"  # of these settings: whether summaries are asked for as no question was found
FILES_KEY = "files"  # of which an output has rows, with their number

MOST_TOLD = 5
LONGEST_TOLD = 60  # characters of a value
START_OVER = "--overwrite starts over"

_ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """What a journal says of its run: it may extend the output that is there, or may only replace it."""

    settings: Any
    extends: bool = False
    replaces: bool = False
    version: int = VERSION

    def save(self, folder: Path) -> None:
        save_json(folder / STATE_FILE, asdict(self), folder / f"{STATE_FILE}.partial", like=folder)

    @classmethod
    def load(cls, folder: Path) -> Beginning:
        """As it was saved, or by the newest part that says it. A `StorageError` if all of it was damaged."""
        path = folder / STATE_FILE
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            said = _said_by_parts(folder)
            if said is None:
                raise StorageError(
                    f"{path} is damaged, and the parts beside it, of an earlier version, do not repeat what "
                    f"it said; {START_OVER}"
                ) from error
            found = said
        if found.version != VERSION:
            raise StorageError(f"{path} is of another version of marsinfer; {START_OVER}")
        return found

    def mark(self, schema: pa.Schema) -> pa.Schema:
        """The schema of chunks, each of which says with which settings it was made."""
        return schema.with_metadata({METADATA_KEY: json.dumps(asdict(self))})


def _said_by_parts(folder: Path) -> Beginning | None:
    for path in sorted(folder.glob("part-*"), reverse=True):
        for chunk in scan_part(path):
            with suppress(LookupError, TypeError, ValueError):
                return Beginning(**json.loads((chunk.table.schema.metadata or {})[METADATA_KEY]))
    return None


def save_json(path: Path, content: Any, temporary: Path, like: Path | None = None) -> None:
    """Durable and never half there; `temporary` is a name on the same file system.

    The file is given the access that `like` has.
    """
    with open_new(temporary, like) as file:
        file.write(json.dumps(content, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def plain(settings: Mapping[str, Any]) -> Any:
    """Settings as they come back from JSON, where a tuple is a list."""
    return json.loads(json.dumps(settings))


def about(schema: pa.Schema) -> dict[str, Any]:
    """What an output's metadata says of its run; nothing where it has none."""
    try:
        return dict(json.loads((schema.metadata or {})[METADATA_KEY]))
    except (LookupError, TypeError, ValueError):
        return {}


def settings_in(path: Place, schema: pa.Schema) -> Any:
    """The settings in an output's metadata; a `ConfigError` if it has none."""
    try:
        return json.loads((schema.metadata or {})[METADATA_KEY])[SETTINGS_KEY]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not say with which settings it was made; {START_OVER}") from error


def files_in(schema: pa.Schema) -> list[tuple[str, int]] | None:
    """Names and rows of the files that an output was made of; None if it does not say."""
    try:
        files = json.loads((schema.metadata or {})[METADATA_KEY])[FILES_KEY]
        return [(str(file["name"]), int(file["rows"])) for file in files]
    except (LookupError, TypeError, ValueError):
        return None


def bounds_in(schema: pa.Schema) -> dict[str, int]:
    """The settings by which a run took some rows alone, of its shard if it had one; none if it took all."""
    config = about(schema).get("config", {})
    return {name: config[name] for name in ("sample", "limit") if config.get(name) is not None}


def with_files(schema: pa.Schema, files: Iterable[tuple[str, int]]) -> pa.Schema:
    """The schema, whose metadata says of which files the output is made."""
    metadata = dict(schema.metadata or {})
    content = json.loads(metadata.get(METADATA_KEY, b"{}"))
    content[FILES_KEY] = [{"name": name, "rows": rows} for name, rows in files]
    return schema.with_metadata({**metadata, METADATA_KEY: json.dumps(content)})


def check_settings(path: Path, then: Any, now: Any, remedy: str = START_OVER) -> None:
    """A `ConfigError` that names the settings that differ; both are as from JSON.

    Questions with names may come, but none may go.
    """
    if QUESTIONS_KEY in then and QUESTIONS_KEY in now:
        gone = [name for name in then[QUESTIONS_KEY] if name not in now[QUESTIONS_KEY]]
        if gone:
            raise ConfigError(
                f"{path} answers the question {gone[0]!r}, which --questions asks no more: put it back; "
                f"{remedy}"
            )
        then = {**then, QUESTIONS_KEY: now[QUESTIONS_KEY]}
    differ = settings_differ(then, now)
    if differ:
        raise ConfigError(f"{path} was begun with other settings: {differ}; {remedy}")


def settings_differ(then: Any, now: Any, words: tuple[str, str] = ("was", "and is now")) -> str:
    """The settings that differ, with `words` before the two values; empty if none does.

    Both are as from JSON. Whether a summary was asked for, or is for want of a question, changes no answer.
    """
    before, after = dict(_flat(then)), dict(_flat(now))
    values = {name: (before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in {**before, **after}}
    return _first(
        [
            f"{name} {words[0]} {_told(one)} {words[1]} {_told(other)}"
            for name, (one, other) in values.items()
            if one != other and name != UNASKED_KEY
        ]
    )


def check_columns(path: Path, then: pa.Schema, now: pa.Schema) -> None:
    """A `ConfigError` that names the answer's own columns that differ; the copied ones are free to change."""
    own = [_types(halves(schema)[0]) for schema in (then, now)]
    if own[0] == own[1]:
        return
    before, after = map(dict, own)
    told = [f"{name!r} is gone" for name in before if name not in after]
    told += [f"{name!r} is new" for name in after if name not in before]
    told += [
        f"{name!r} was {before[name]} and is now {after[name]}"
        for name in before
        if name in after and before[name] != after[name]
    ]
    changed = before.keys() ^ after.keys()
    again = "--columns as it was then goes on, " if changed and changed.issubset(CHOSEN_FROM) else ""
    raise ConfigError(
        f"{path} was begun with other columns: {_first(told) or 'their order changed'}; {again}{START_OVER}"
    )


def copies_alike(then: pa.Schema, now: pa.Schema) -> bool:
    """Whether two outputs have the same copied columns; layouts that are copied in the same way are one."""
    return _types(halves(then)[1]) == _types(halves(now)[1])


def _types(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return [(field.name, settled(field.type)) for field in schema]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _told(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_TOLD else text[: LONGEST_TOLD - 3] + "..."


def _first(told: list[str]) -> str:
    more = f", and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    return ", ".join(told[:MOST_TOLD]) + more
