"""From what the user named (files, globs, folders) to the files to read, in order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import InputError
from pipeline.io.causes import cause, some

# Suffix -> (format, compression).
FORMATS: dict[str, tuple[str, str | None]] = {
    ".parquet": ("parquet", None),
    ".pq": ("parquet", None),
    ".jsonl": ("jsonl", None),
    ".jsonl.gz": ("jsonl", "gzip"),
    ".jsonl.zst": ("jsonl", "zstd"),
    ".ndjson": ("jsonl", None),
    ".ndjson.gz": ("jsonl", "gzip"),
    ".ndjson.zst": ("jsonl", "zstd"),
    ".arrow": ("arrow", None),
    ".arrows": ("arrow", None),
    ".feather": ("arrow", None),
    ".ipc": ("arrow", None),
    ".txt": ("text", None),
    ".md": ("text", None),
}
KNOWN = ", ".join(FORMATS)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read; `label` names it in ids and messages and is unique in the input."""

    path: Path
    label: str
    format: str
    compression: str | None
    size: int


def find_files(inputs: Sequence[str | Path]) -> tuple[tuple[InputFile, ...], list[str]]:
    """The files of all inputs in the order given, each once, with notes on what was left out."""
    if not inputs:
        raise InputError("no input was named")
    notes: list[str] = []
    found: dict[str, InputFile] = {}
    for given in inputs:
        for file in _expand(given, notes):
            first = found.setdefault(os.path.realpath(file.path), file)
            if first is not file:
                notes.append(f"{file.path} is named more than once and is read once")
    return _with_unique_labels(tuple(found.values())), notes


def format_of(path: Path) -> tuple[str, str | None] | None:
    """The format and compression that a file's name tells; None if it tells nothing."""
    name = path.name.lower()
    return next((known for suffix, known in FORMATS.items() if name.endswith(suffix)), None)


def _expand(given: str | Path, notes: list[str]) -> list[InputFile]:
    path = Path(given)
    if path.is_dir():
        return _choose(
            given, sorted(_walk(path), key=lambda file: file.relative_to(path).parts), notes, root=path
        )
    if path.exists():
        if format_of(path) is None:
            raise InputError(f"{given} has an extension that is not known; known are {KNOWN}")
        return [_input_file(path, path.name)]
    if glob.has_magic(str(given)):
        matches = [Path(match) for match in sorted(glob.glob(str(given), recursive=True))]
        return _choose(
            given, [path for path in matches if path.is_file() or format_of(path)], notes, root=None
        )
    raise InputError(f"{given} does not exist")


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {cause(error)}") from error


def _choose(given: str | Path, paths: list[Path], notes: list[str], *, root: Path | None) -> list[InputFile]:
    """The readable ones of a folder (`root`) or of a glob's matches; anything left out is noted."""
    files = [_input_file(path, _label(path, root)) for path in paths if format_of(path) and path.is_file()]
    if not files:
        raise InputError(f"{given} holds no file that can be read; known extensions are {KNOWN}")
    if root is not None:
        _refuse_mixture(root, files)
    chosen = {file.path for file in files}
    ignored = [str(path) for path in paths if path not in chosen]
    if ignored:
        notes.append(f"not read, of a kind that is not known: {some(ignored, 3)}")
    return files


def _refuse_mixture(folder: Path, files: list[InputFile]) -> None:
    texts = [file for file in files if file.format == "text"]
    tables = [file for file in files if file.format != "text"]
    if texts and tables:
        raise InputError(
            f"{folder} holds both tables ({tables[0].label}) and text documents ({texts[0].label}); "
            f"choose with a glob, such as '{folder}/**/*{tables[0].path.suffix}'"
        )


def _label(path: Path, root: Path | None) -> str:
    known = format_of(path)
    if root is not None and known is not None and known[0] == "text":
        return path.relative_to(root).as_posix()
    return path.name


def _input_file(path: Path, label: str) -> InputFile:
    known = format_of(path)
    assert known is not None
    try:
        if path.is_file():  # a named pipe can be opened only once
            path.open("rb").close()
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read: {cause(error)}") from error
    return InputFile(path=path, label=label, format=known[0], compression=known[1], size=size)


def _with_unique_labels(files: tuple[InputFile, ...]) -> tuple[InputFile, ...]:
    """Labels as they are if no two are equal, else every file's path below the common parent."""
    if len({file.label for file in files}) == len(files):
        return files
    whole = [os.path.abspath(file.path) for file in files]
    parent = os.path.commonpath([os.path.dirname(path) for path in whole])
    return tuple(
        replace(file, label=Path(path).relative_to(parent).as_posix())
        for file, path in zip(files, whole, strict=True)
    )
