"""From what the user named (files, globs, folders, URLs, standard input) to the files to read, in order."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa

from pipeline.errors import InputError, StorageError
from pipeline.inputs.columns import Partitions, partitions_of
from pipeline.inputs.listing import files_below, has_magic, matches, refuse_broken_link
from pipeline.outputs.own import is_own_lines, is_own_table, table_schema
from pipeline.outputs.sidecar import SIDECAR
from pipeline.storage import stdin
from pipeline.storage.causes import READ_ERRORS, cause, is_out_of_reach, some
from pipeline.storage.remote import WEB, Place, RemotePath, place_of, relative
from pipeline.storage.sniff import HEAD_BYTES, misnamed
from pipeline.storage.stdin import Once, Stdin
from pipeline.storage.version import Version
from pipeline.texts.redaction import bare

LINES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv"}
PACKED = {"": None, ".gz": "gzip", ".zst": "zstd"}
# Suffix -> (format, compression).
FORMATS: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys((".parquet", ".pq"), ("parquet", None)),
    **{
        f"{suffix}{packed}": (format, compression)
        for suffix, format in LINES.items()
        for packed, compression in PACKED.items()
    },
    **dict.fromkeys((".arrow", ".arrows", ".feather", ".ipc"), ("arrow", None)),
    **dict.fromkeys((".txt", ".md"), ("text", None)),
    **{".pdf": ("pdf", None), ".docx": ("docx", None), ".html": ("html", None), ".htm": ("html", None)},
}
DOCUMENTS = ("text", "pdf", "docx", "html")  # formats of which a file is one row
Origin = Literal["named", "folder", "pattern"]
JSON = tuple(f".json{packed}" for packed in PACKED)
_PLAIN = ", ".join(suffix for suffix in FORMATS if not suffix.endswith((".gz", ".zst")))
KNOWN = f"{_PLAIN}; JSON lines and CSV also with .gz or .zst"
MOST_TOLD = 3


class NothingReadable(InputError):
    """A folder has files, of which none can be read."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read; `label` names it in ids and messages and is unique in the input.

    `name` is the label that it has where no other file has the same. `origin` says what the user named: the
    file itself, a folder, or a pattern. `partitions` are the columns that the names of its folders say, with
    a null for those that other files have. `out_of_reach` says why nothing of it can be had now. `version` is
    the one that was opened first: a file that is changed after that is out of reach too.
    """

    path: Place | Once
    name: str
    format: str
    compression: str | None
    size: int
    label: str = ""
    origin: Origin = "named"
    partitions: Partitions = field(default_factory=dict)
    out_of_reach: str | None = None
    version: Version = field(default_factory=Version, compare=False, repr=False)

    @property
    def is_document(self) -> bool:
        """Whether it is one row itself."""
        return self.format in DOCUMENTS

    @property
    def is_empty(self) -> bool:
        """Whether it has no bytes: what is not known of a pipe and of a web server."""
        if self.out_of_reach or (isinstance(self.path, RemotePath) and self.path.scheme in WEB):
            return False
        return self.size == 0 and self.path.is_file()

    def open(self) -> BinaryIO:
        """Open the file for reading, as it is; each call begins anew. Raises an OSError if it was changed."""
        if isinstance(self.path, RemotePath):
            return self.path.open(version=self.version)
        self.check()
        return self.path.open("rb")

    def check(self) -> None:
        """Raise an OSError if a local file was changed; of others each part is checked as it comes."""
        if isinstance(self.path, Path):
            self.version.check_local(self.path)

    def native(self, *, mapped: bool = False) -> pa.NativeFile:
        """Open the file for Arrow, which maps and reads local ones by itself."""
        if not isinstance(self.path, Path):
            return pa.PythonFile(self.open(), mode="r")
        self.check()
        return pa.memory_map(str(self.path)) if mapped else pa.OSFile(str(self.path))


def is_own(file: InputFile) -> bool:
    """Whether a table is an output of ours; what cannot be read is none."""
    try:
        return not isinstance(file.path, Once) and is_own_table(table_schema(file.path))
    except READ_ERRORS:
        return False


def find_files(inputs: Sequence[str | Path]) -> tuple[tuple[InputFile, ...], list[str]]:
    """The files of all inputs in the order given, each once, with notes on what was left out.

    There may be none, where a folder is empty. Raises InputError for what does not exist or cannot be read,
    StorageError for a folder or a pattern whose files cannot be had now.
    """
    if not inputs:
        raise InputError("no input was named")
    if any(given in stdin.NAMES for given in map(str, inputs)):
        return with_unique_labels((_standard_input(inputs),)), []
    notes: list[str] = []
    found: dict[str, InputFile] = {}
    for given in inputs:
        twice = []
        for file in _expand(given, notes):
            address = _address(file.path)
            first = found.setdefault(address, file)
            if first is not file:
                twice.append(str(file.path))
                if file.origin == "named":
                    found[address] = replace(first, origin="named")
        notes += _twice_notes(twice)
    return with_unique_labels(_with_all_keys(tuple(found.values()))), notes


def format_of(path: Place) -> tuple[str, str | None] | None:
    """The format and compression that a file's name tells; None if it tells nothing."""
    name = path.name.lower()
    return next((known for suffix, known in FORMATS.items() if name.endswith(suffix)), None)


def with_unique_labels(files: tuple[InputFile, ...]) -> tuple[InputFile, ...]:
    """The files with their names as labels if no two are equal, else with paths below the common parent."""
    if len({file.name for file in files}) == len(files):
        return tuple(replace(file, label=file.name) for file in files)
    whole = [_absolute(file.path).split("/") for file in files]
    if len(set(map(tuple, whole))) < len(whole):  # addresses that differ in what is not shown
        whole = [[*parts[:-1], f"{parts[-1]}#{n}"] for n, parts in enumerate(whole, start=1)]
    folders = [parts[:-1] for parts in whole]
    parting = (i for i, names in enumerate(zip(*folders, strict=False)) if len(set(names)) > 1)
    shared = next(parting, min(map(len, folders)))
    return tuple(
        replace(file, label="/".join(parts[shared:])) for file, parts in zip(files, whole, strict=True)
    )


def own_note(paths: Sequence[Place | Once]) -> str:
    """What to say of outputs that were found and left out."""
    return f"not read, as marsinfer wrote it: {some(paths, 3)}; to read one, name it"


def only_own(paths: Sequence[Place | Once]) -> str:
    """The refusal of a pattern that matches nothing else."""
    return f"nothing matches but what marsinfer wrote: {some(paths, 3)}; to read one, name it"


def _with_all_keys(files: tuple[InputFile, ...]) -> tuple[InputFile, ...]:
    keys = dict.fromkeys(key for file in files for key in file.partitions)
    if not keys:
        return files
    return tuple(replace(file, partitions={key: file.partitions.get(key) for key in keys}) for file in files)


def _standard_input(inputs: Sequence[str | Path]) -> InputFile:
    if len(inputs) > 1:
        raise InputError("standard input (-) cannot be mixed with other inputs; pipe them all, or name files")
    path = Stdin()
    path.check()
    return InputFile(path=path, name=path.name, format="jsonl", compression=None, size=0)


def _address(path: Place | Once) -> str:
    """What tells a file from any other."""
    return os.path.realpath(path) if isinstance(path, Path) else path.address


def _twice_notes(paths: list[str]) -> list[str]:
    if len(paths) > MOST_TOLD:
        return [f"named more than once, and read once: {some(paths, MOST_TOLD)}"]
    return [f"{path} is named more than once and is read once" for path in paths]


def _expand(given: str | Path, notes: list[str]) -> list[InputFile]:
    path = place_of(given)
    shown = path if isinstance(path, RemotePath) else given
    try:
        kind = _kind(path)
        if kind == "file":
            return [_named(path)]
        if kind == "directory":
            return _of_folder(path, path, notes)
        if has_magic(path):
            return _of_pattern(shown, path, notes)
    except OSError as error:
        out_of_reach = is_out_of_reach(error)
        if out_of_reach and format_of(path) is not None and not has_magic(path):
            return [_input_file(path, path.name, out_of_reach=cause(error))]
        raise (StorageError if out_of_reach else InputError)(
            f"{shown} cannot be read: {cause(error)}"
        ) from error
    if isinstance(path, Path):
        refuse_broken_link(path)
    raise InputError(f"{shown} does not exist")


def _kind(path: Place) -> str | None:
    if isinstance(path, RemotePath):
        return path.kind()
    return "directory" if path.is_dir() else "file" if path.exists() else None


def _named(path: Place) -> InputFile:
    if format_of(path) is None:
        raise InputError(f"{path} has an extension that is not known; known are {KNOWN}")
    return _input_file(path, path.name)


def _of_folder(folder: Place, base: Place, notes: list[str]) -> list[InputFile]:
    """The files of a folder; of their folders those below `base` may say columns."""
    paths = files_below(folder, notes)
    if not paths:
        notes.append(f"{folder} holds no files: no rows come from it")
        return []
    listed = {str(path) for path in paths if path.name.endswith(SIDECAR)}
    files, own = _choose(paths, listed, notes)
    if not files and not own:
        raise NothingReadable(f"{folder} holds no file that can be read; known extensions are {KNOWN}")
    found = [_input_file(path, _label(path, folder), "folder", base) for path in files]
    return _of_one_kind(folder, found, notes)


def _of_pattern(given: str | Place, pattern: Place, notes: list[str]) -> list[InputFile]:
    """The files that match, and those of folders that match."""
    base, matching, sidecars = matches(pattern, notes)
    files, own = _choose([path for path in matching if not matching[path]], sidecars, notes)
    chosen = set(map(str, files))
    found: list[InputFile] = []
    unreadable = not any(matching.values())
    for path, is_folder in matching.items():
        if is_folder:
            try:
                found += _of_folder(path, base, notes)
            except NothingReadable:
                unreadable = True
        elif str(path) in chosen:
            found.append(_input_file(path, path.name, "pattern", base))
    if not found and own:
        raise InputError(only_own(own))
    if not found and unreadable:
        raise InputError(f"{given} holds no file that can be read; known extensions are {KNOWN}")
    return found


def _choose(
    paths: Sequence[Place], listed: Collection[str], notes: list[str]
) -> tuple[list[Place], list[Place]]:
    """The readable ones, and outputs of ours, which are left out; anything left out is noted."""
    readable = [path for path in paths if format_of(path) and path.is_file()]
    known = _without_settings(readable, notes)
    own = [path for path in known if is_own_lines(path, listed)]
    if own:
        notes.append(own_note(own))
    left_out = {*map(str, own), *(f"{path}{SIDECAR}" for path in own)}
    taken = set(map(str, readable)) | left_out
    ignored = [str(path) for path in paths if str(path) not in taken]
    if ignored:
        notes.append(f"not read, of a kind that is not known: {some(ignored, 3)}")
    return [path for path in known if str(path) not in left_out], own


def _without_settings(paths: Sequence[Place], notes: list[str]) -> list[Place]:
    """Without .json files where there are others: there they rather say something of these than hold rows."""
    found = [path for path in paths if not path.name.endswith(SIDECAR)]
    others = [path for path in found if not path.name.lower().endswith(JSON)]
    left = [str(path) for path in found if path not in others]
    if not others or not left:
        return found
    notes.append(
        f"not read, as .json beside other files need not be rows: {some(left, 3)}; to read one, name it"
    )
    return others


def _of_one_kind(folder: Place, files: list[InputFile], notes: list[str]) -> list[InputFile]:
    """The files, if they are all tables or all texts; tables that are outputs of ours count for nothing."""
    texts = [file for file in files if file.is_document]
    tables = [file for file in files if not file.is_document]
    if not texts or not tables:
        return files
    own = [file for file in tables if is_own(file)]
    left = [file for file in tables if file not in own]
    if left:
        raise InputError(
            f"{folder} holds both tables ({left[0].name}) and text documents ({texts[0].name}); "
            f"choose with a glob, such as '{folder}/**/*{left[0].path.suffix}'"
        )
    notes.append(own_note([file.path for file in own]))
    return texts


def _label(path: Place, root: Place) -> str:
    known = format_of(path)
    if known is not None and known[0] in DOCUMENTS:
        return relative(path, root).as_posix()
    return path.name


def _input_file(
    path: Place,
    name: str,
    origin: Origin = "named",
    base: Place | None = None,
    out_of_reach: str | None = None,
) -> InputFile:
    """Folders below `base` may say columns."""
    known = format_of(path)
    assert known is not None
    size = 0
    try:
        if out_of_reach is None:
            size = path.size() if isinstance(path, RemotePath) else _local_size(path, *known)
    except OSError as error:
        if not is_out_of_reach(error):
            raise InputError(f"{path} cannot be read: {cause(error)}") from error
        out_of_reach = cause(error)
    return InputFile(
        path=path,
        name=name,
        format=known[0],
        compression=known[1],
        size=size,
        origin=origin,
        partitions={} if base is None else partitions_of(relative(path, base).parts[:-1]),
        out_of_reach=out_of_reach,
    )


def _local_size(path: Path, format: str, compression: str | None) -> int:
    if path.is_file():  # a named pipe can be opened only once
        with path.open("rb") as file:
            wrong = misnamed(file.read(HEAD_BYTES), format, compression)
        if wrong is not None:
            raise InputError(f"{path} {wrong}")
    return path.stat().st_size


def _absolute(path: Place | Once) -> str:
    return os.path.abspath(path) if isinstance(path, Path) else bare(str(path))
