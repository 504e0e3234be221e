"""From what the user named (files, globs, folders, URLs, standard input) to the files to read, in order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.io import stdin
from pipeline.io.causes import cause, some
from pipeline.io.remote import Place, RemotePath, has_magic, place_of, relative
from pipeline.io.stdin import Stdin

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

    path: Place | Stdin
    label: str
    format: str
    compression: str | None
    size: int

    def open(self) -> BinaryIO:
        """Open the file for reading, as it is; each call begins anew."""
        return self.path.open("rb")

    def native(self, *, mapped: bool = False) -> pa.NativeFile:
        """Open the file for Arrow, which maps and reads local ones by itself."""
        if not isinstance(self.path, Path):
            return pa.PythonFile(self.open(), mode="r")
        return pa.memory_map(str(self.path)) if mapped else pa.OSFile(str(self.path))


def find_files(inputs: Sequence[str | Path]) -> tuple[tuple[InputFile, ...], list[str]]:
    """The files of all inputs in the order given, each once, with notes on what was left out."""
    if not inputs:
        raise InputError("no input was named")
    if any(given in stdin.NAMES for given in map(str, inputs)):
        return (_standard_input(inputs),), []
    notes: list[str] = []
    found: dict[str, InputFile] = {}
    for given in inputs:
        for file in _expand(given, notes):
            first = found.setdefault(_address(file.path), file)
            if first is not file:
                notes.append(f"{file.path} is named more than once and is read once")
    return _with_unique_labels(tuple(found.values())), notes


def format_of(path: Place) -> tuple[str, str | None] | None:
    """The format and compression that a file's name tells; None if it tells nothing."""
    name = path.name.lower()
    return next((known for suffix, known in FORMATS.items() if name.endswith(suffix)), None)


def _standard_input(inputs: Sequence[str | Path]) -> InputFile:
    if len(inputs) > 1:
        raise InputError("standard input (-) cannot be mixed with other inputs; pipe them all, or name files")
    path = Stdin()
    path.check()
    return InputFile(path=path, label=path.name, format="jsonl", compression=None, size=0)


def _address(path: Place | Stdin) -> str:
    """What tells a file from any other."""
    return os.path.realpath(path) if isinstance(path, Path) else path.address


def _expand(given: str | Path, notes: list[str]) -> list[InputFile]:
    path = place_of(given)
    if isinstance(path, RemotePath):
        return _expand_remote(path, notes)
    if path.is_dir():
        files = sorted(_walk(path), key=lambda file: relative(file, path).parts)
        return _choose(given, files, notes, root=path)
    if path.exists():
        return [_named(path)]
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        return _choose(
            given, [path for path in matches if path.is_file() or format_of(path)], notes, root=None
        )
    raise InputError(f"{given} does not exist")


def _expand_remote(path: RemotePath, notes: list[str]) -> list[InputFile]:
    try:
        kind = path.kind()
        if kind == "file":
            return [_named(path)]
        if kind == "directory":
            return _choose(path, path.walk(), notes, root=path)
        if has_magic(path):
            return _choose(path, path.glob(), notes, root=None)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {cause(error)}") from error
    raise InputError(f"{path} does not exist")


def _named(path: Place) -> InputFile:
    if format_of(path) is None:
        raise InputError(f"{path} has an extension that is not known; known are {KNOWN}")
    return _input_file(path, path.name)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {cause(error)}") from error


def _choose(
    given: str | Place, paths: Sequence[Place], notes: list[str], *, root: Place | None
) -> list[InputFile]:
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


def _refuse_mixture(folder: Place, files: list[InputFile]) -> None:
    texts = [file for file in files if file.format == "text"]
    tables = [file for file in files if file.format != "text"]
    if texts and tables:
        raise InputError(
            f"{folder} holds both tables ({tables[0].label}) and text documents ({texts[0].label}); "
            f"choose with a glob, such as '{folder}/**/*{tables[0].path.suffix}'"
        )


def _label(path: Place, root: Place | None) -> str:
    known = format_of(path)
    if root is not None and known is not None and known[0] == "text":
        return relative(path, root).as_posix()
    return path.name


def _input_file(path: Place, label: str) -> InputFile:
    known = format_of(path)
    assert known is not None
    try:
        if isinstance(path, RemotePath):
            size = path.size()
        else:
            size = _local_size(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {cause(error)}") from error
    return InputFile(path=path, label=label, format=known[0], compression=known[1], size=size)


def _local_size(path: Path) -> int:
    if path.is_file():  # a named pipe can be opened only once
        path.open("rb").close()
    return path.stat().st_size


def _with_unique_labels(files: tuple[InputFile, ...]) -> tuple[InputFile, ...]:
    """Labels as they are if no two are equal, else every file's path below the common parent."""
    if len({file.label for file in files}) == len(files):
        return files
    whole = [_absolute(file.path).split("/") for file in files]
    folders = [parts[:-1] for parts in whole]
    parting = (i for i, names in enumerate(zip(*folders, strict=False)) if len(set(names)) > 1)
    shared = next(parting, min(map(len, folders)))
    return tuple(
        replace(file, label="/".join(parts[shared:])) for file, parts in zip(files, whole, strict=True)
    )


def _absolute(path: Place | Stdin) -> str:
    return os.path.abspath(path) if isinstance(path, Path) else str(path)
