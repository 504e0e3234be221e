"""Questions with known answers over documents: what one is, reading, parting and thinning them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError, InputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question over one document, and how an answer to it is scored."""

    id: str  # unique in its suite
    task: str
    text: str  # the document
    question: str  # ends with a line on the form of the answer, which the references have
    references: tuple[str, ...]  # at least one, none empty; the first is the one to be teacher-forced
    metric: str  # a name in `pipeline.quality.metrics.METRICS`
    choices: tuple[str, ...] = ()  # all that could be answered, for the metrics that ask
    document_key: str  # SHA-256, in hex, of the document
    facets: Mapping[str, str | int | float] = field(
        default_factory=dict
    )  # what results may be grouped by, and the like


def document_key(text: str) -> str:
    """SHA-256, in hex, of a document's text."""
    return _sha256(text).hex()


def part_of(key: str, parts: int) -> int:
    """In which of so many parts, from 0, a document is: by its key, whatever other documents there are."""
    return int.from_bytes(_sha256(f"\0{key}")[:8]) * parts >> 64


def take(samples: Sequence[Sample], limit_per_task: int | None, seed: int = 0) -> list[Sample]:
    """At most `limit_per_task` samples of each task, in their order, from as many documents as can be.

    Which ones depends on their ids and `seed` alone; those of a lower limit are among those of a higher one.
    """
    if limit_per_task is None:
        return list(samples)
    if limit_per_task < 1:
        raise ConfigError(f"{limit_per_task} samples a task: must be at least 1")
    tasks: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    hashes = [_sha256(f"{seed}\0{sample.id}") for sample in samples]
    for index in sorted(range(len(samples)), key=hashes.__getitem__):
        tasks[samples[index].task][samples[index].document_key].append(index)
    chosen: list[int] = []
    for documents in tasks.values():
        turns = [(turn, hashes[index], index) for own in documents.values() for turn, index in enumerate(own)]
        chosen += [index for _, _, index in sorted(turns)[:limit_per_task]]
    return [samples[index] for index in sorted(chosen)]


def first_in_turn(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """At most `limit` samples, in their order: the first of each task, as evenly as there are any."""
    tasks: defaultdict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        tasks[sample.task].append(index)
    return [samples[index] for index in sorted(in_turn(tasks, limit))]


def in_turn(groups: Mapping[str, Sequence[T]], count: int | None) -> list[T]:
    """The first of each group, then the second of each that has one, and so on up to so many."""
    longest = max(map(len, groups.values()), default=0)
    return [own[turn] for turn in range(longest) for own in groups.values() if turn < len(own)][:count]


def jsonl_files(folder: str | Path) -> list[Path]:
    """The files `*.jsonl` in a folder, sorted; `InputError` if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is {'not a folder' if folder.exists() else 'not there'}")
    files = sorted(path for path in folder.glob("*.jsonl") if path.is_file())
    if not files:
        raise InputError(f"{folder} has no *.jsonl files")
    return files


def read_objects(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The JSON object on each line that is not blank, behind its place for messages and its number from 1."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield (place := f"{path} line {number}"), number, _object(line, place)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def texts_of(row: Mapping[str, Any], name: str, place: str) -> list[str]:
    """The field `name`, a list of texts, or of one where it is a text; `InputError` if it is neither."""
    value = row.get(name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{place}: {_unfit(row, name)} a list of texts")
    return value


def text_of(row: Mapping[str, Any], name: str, place: str, *, may_be_empty: bool = False) -> str:
    """The field `name`, a text; `InputError` if it is none, or has nothing in it but white space."""
    value = row.get(name)
    if not isinstance(value, str):
        raise InputError(f"{place}: {_unfit(row, name)} a text")
    if not may_be_empty and not value.strip():
        raise InputError(f"{place}: the field {name!r} is empty")
    return value


def _unfit(row: Mapping[str, Any], name: str) -> str:
    if name in row:
        return f"the field {name!r} is not"
    return f"there is no field {name!r}, which must be"


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not valid UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON: {str(error) or 'too deeply nested'}") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: not a JSON object")
    return row


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
