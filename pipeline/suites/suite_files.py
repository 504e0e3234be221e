"""A suite's folder of JSON lines: each row becomes samples, or is left out with a reason."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError
from pipeline.suites.samples import Sample, is_unicode, parted

_ENDINGS = (".jsonl", ".jsonl.gz")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Place(NamedTuple):
    """Where a row stands."""

    path: Path
    line: int  # from 1

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return self.path.name.removesuffix(".gz").removesuffix(".jsonl")

    def __str__(self) -> str:
        return f"{self.path} line {self.line}"


class Loaded(NamedTuple):
    """What a suite's folder holds."""

    samples: list[Sample]
    left_out: list[str]  # a reason, with file and line, for each row or question that cannot be used


SamplesOf = Callable[[dict[str, Any], Place], Iterable[Sample | str]]


def load_files(folder: str | Path, samples_of: SamplesOf) -> Loaded:
    """All rows of the files `*.jsonl` and `*.jsonl.gz` of `folder`, in the order of names and lines.

    `samples_of` makes the samples of one row. It yields a text, the reason, for a question that it leaves
    out, and raises `InputError` for a row of which it can use nothing.

    Raises `InputError` for a folder without rows, for a file of which nothing can be used, and if more is
    left out than can be used.
    """
    loaded = Loaded([], [])
    for path in _files(folder):
        samples, left_out = parted(_found_in(path, samples_of))
        if left_out and not samples:
            raise InputError(f"nothing in {path.name} can be used: {left_out[0]}")
        loaded.samples.extend(samples)
        loaded.left_out.extend(left_out)
    if not loaded.samples:
        raise InputError(f"{folder}: no rows in its *.jsonl files")
    left_out, count = loaded.left_out, len(loaded.left_out) + len(loaded.samples)
    if 2 * len(left_out) > count:
        raise InputError(f"{folder}: {len(left_out):,} of {count:,} rows cannot be used: {left_out[0]}")
    return loaded


def texts_of(row: Mapping[str, Any], name: str) -> list[str]:
    """The field `name` as a list of texts without white space around them; those that are empty are dropped.

    The field is a text or a number, or a list of them. Raises `InputError` if it is anything else.
    """
    value = row.get(name)
    values = value if isinstance(value, list) else [value]
    if not all(
        isinstance(each, str | int) or (isinstance(each, float) and math.isfinite(each)) for each in values
    ):
        raise InputError(f"{_unfit(row, name)} a list of texts")
    texts = (str(each).strip() for each in values)
    return [text for text in texts if text]


def text_of(row: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    """The field `name`, a text; `InputError` if it is none, or has nothing in it but white space."""
    value = row.get(name)
    if not isinstance(value, str):
        raise InputError(f"{_unfit(row, name)} a text")
    if not may_be_empty and not value.strip():
        raise InputError(f"the field {name!r} is empty")
    return value


def _files(folder: str | Path) -> list[Path]:
    """Sorted by name; `InputError` if there are none, or if one is there both as it is and compressed."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is {'not a folder' if folder.exists() else 'not there'}")
    files = sorted(path for path in folder.iterdir() if path.name.endswith(_ENDINGS) and path.is_file())
    if not files:
        raise InputError(f"{folder} has no *.jsonl files")
    stems: dict[str, Path] = {}
    for path in files:
        twin = stems.setdefault(Place(path, 1).stem, path)
        if twin is not path:
            raise InputError(f"{folder} has both {twin.name} and {path.name}; keep one of them")
    return files


def _found_in(path: Path, samples_of: SamplesOf) -> Iterator[Sample | str]:
    """The samples of a file's rows, and in place of others why there are none."""
    line = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for line, content in enumerate(lines, start=1):
                if content.strip():
                    yield from _of_row(content, Place(path, line), samples_of)
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        yield f"{Place(path, line + 1)}: cannot be read from here on: {reason}"


def _of_row(content: bytes, place: Place, samples_of: SamplesOf) -> Iterator[Sample | str]:
    try:
        for found in samples_of(_object(content), place):
            yield f"{place}: {found}" if isinstance(found, str) else found
    except InputError as error:
        yield f"{place}: {error}"


def _object(content: bytes) -> dict[str, Any]:
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {str(error) or 'too deeply nested'}") from error
    if not isinstance(row, dict):
        raise InputError("not a JSON object")
    if _SURROGATE.search(content) and not is_unicode(json.dumps(row, ensure_ascii=False)):
        raise InputError("an escape such as \\ud83d stands alone, and is no character")
    return row


def _unfit(row: Mapping[str, Any], name: str) -> str:
    if name in row:
        return f"the field {name!r} is not"
    return f"there is no field {name!r}, which must be"
