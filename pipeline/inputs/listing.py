"""What folders hold and what patterns match: links followed, names that stand for no data left out."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath

from pipeline.errors import InputError
from pipeline.outputs.sidecar import SIDECAR
from pipeline.storage.causes import some, told
from pipeline.storage.remote import WEB, Place, RemotePath, relative

Parts = tuple[str, ...]

# What Spark, Delta and Databricks leave beside the data they write: no user misses it.
_MARKS = ("_SUCCESS", "_temporary", "_metadata", "_common_metadata", "_delta_log", "_committed_", "_started_")
_STATE, _SPLITS, _CACHE = "state.json", "dataset_dict.json", ".arrow"


def files_below(folder: Place, notes: list[str]) -> list[Place]:
    """The files of a folder and of those in it, sorted by their paths.

    Names that begin with a dot or an underscore are left out, as are files that a folder saved by `datasets`
    does not name. Raises InputError for what cannot be listed, OSError where storage elsewhere fails.
    """
    found = _remote(folder, notes) if isinstance(folder, RemotePath) else _local(folder, notes)
    return _data_files(folder, {relative(path, folder).parts: path for path in found}, notes)


def is_hidden(name: str) -> bool:
    """Whether the name of a file or folder says that it is no data; `_key=value` is a folder of data."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def note_hidden(paths: Iterable[Place | str], notes: list[str]) -> None:
    """Tell of names left out for their underscore, but for marks that mean nothing to a user."""
    names = {str(path): str(path).rpartition("/")[2] for path in paths}
    told = [path for path, name in names.items() if name.startswith("_") and not name.startswith(_MARKS)]
    if told:
        notes.append(f"not read, as names that begin with _ stand for no data: {some(told, 3)}")


def refuse_broken_link(path: Path) -> None:
    """An `InputError` that names a link whose target is not there."""
    if path.is_symlink() and not os.path.exists(path):
        raise InputError(
            f"{path} is a link to {os.readlink(path)}, which cannot be reached; mend the link or remove it"
        )


def _remote(folder: RemotePath, notes: list[str]) -> list[RemotePath]:
    files: list[RemotePath] = []
    hidden: dict[str, None] = {}
    for path in folder.walk():
        parts = relative(path, folder).parts
        depth = next((i for i, name in enumerate(parts) if is_hidden(name)), None)
        if depth is None:
            files.append(path)
        else:
            hidden[f"{str(folder).rstrip('/')}/{'/'.join(parts[: depth + 1])}"] = None
    note_hidden(hidden, notes)
    return files


def _local(root: Path, notes: list[str]) -> list[Path]:
    """Linked folders come last, so that a folder is read under its own name if it has one below `root`."""
    files: list[Path] = []
    hidden: list[Path] = []
    seen: dict[str, Path] = {}
    own, linked = [root], list[Path]()
    while own or linked:
        folder = own.pop() if own else linked.pop(0)
        first = seen.setdefault(os.path.realpath(folder), folder)
        if first is not folder:
            notes.append(f"{folder} is the same folder as {first}, and is read once")
            continue
        for entry in _entries(folder):
            path = Path(entry.path)
            if is_hidden(entry.name):
                hidden.append(path)
                continue
            if entry.is_symlink():
                refuse_broken_link(path)
            if entry.is_dir():
                (linked if entry.is_symlink() else own).append(path)
            else:
                files.append(path)
    note_hidden(sorted(hidden), notes)
    return files


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with told(f"{folder} cannot be read", kind=InputError), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _data_files(folder: Place, files: Mapping[Parts, Place], notes: list[str]) -> list[Place]:
    """`files`, sorted, without those that a saved dataset among them holds but does not name."""
    left = dict(files)
    for name, key in ((_SPLITS, "splits"), (_STATE, "_data_files")):
        for parts in [parts for parts in sorted(left) if parts[-1] == name]:
            named = _names(left[parts], key) if parts in left else None
            if named is not None:
                _keep_named(folder, left, parts, named)
    left_out = [files[parts] for parts in sorted(files) if parts not in left]
    note_unnamed([path for path in left_out if path.name.endswith(_CACHE)], notes)
    return [left[parts] for parts in sorted(left)]


def _keep_named(folder: Place, left: dict[Parts, Place], list_of_names: Parts, named: Sequence[str]) -> None:
    """Take from `left` what is beside a list of parts, or of splits, and not on it."""
    *saved, name = list_of_names
    depth = len(saved)
    within = [parts for parts in left if list(parts[:depth]) == saved]
    for missing in sorted({*named} - {parts[depth] for parts in within}):
        shown = "/".join((str(folder).rstrip("/"), *saved))
        raise InputError(f"{shown} is a saved dataset and lacks its part {missing}; save it again")
    for parts in within:
        if parts[depth] not in named and (name == _SPLITS or len(parts) == depth + 1):
            del left[parts]


def note_unnamed(paths: Sequence[Place], notes: list[str]) -> None:
    """Tell of files that a saved dataset does not name."""
    if paths:
        notes.append(f"not read, as the saved dataset around it does not name it: {some(paths, 3)}")


def is_cache(path: Place) -> bool:
    """Whether a file is what `datasets` keeps beside the parts of a dataset that it saved."""
    if not (path.name.startswith("cache-") and path.name.endswith(_CACHE)):
        return False
    state = path.beside(_STATE) if isinstance(path, RemotePath) else path.with_name(_STATE)
    named = _names(state, "_data_files") if state.exists() else None
    return named is not None and path.name not in named


def _names(path: Place, key: str) -> list[str] | None:
    """The names that a dataset's file lists; None if it is a file of another kind."""
    try:
        listed = json.loads(path.read_bytes())[key]
        return [each if isinstance(each, str) else each["filename"] for each in listed]
    except (ValueError, LookupError, TypeError):
        return None


def has_magic(path: Place) -> bool:
    """Whether a path is a pattern."""
    return _is_magic(path.bare if isinstance(path, RemotePath) else str(path), path)


def matches(pattern: Place, notes: list[str]) -> tuple[Place, dict[Place, bool], Collection[str]]:
    """The folder that a pattern begins in, what matches and whether it is a folder, and sidecars.

    Wildcards stand for no names that say that they are no data, and no match lies in a folder that matches.
    The sidecars are the names, as shown, of remote files that say how a run made the file beside them.
    Raises InputError for a link that leads nowhere, OSError where storage elsewhere fails.
    """
    names = pattern.key.split("/") if isinstance(pattern, RemotePath) else list(pattern.parts)
    fixed = next(i for i, name in enumerate(names) if _is_magic(name, pattern))
    if isinstance(pattern, RemotePath):
        base: Place = pattern.above(fixed)
        found: dict[Place, bool] = dict(pattern.glob())
    else:
        base = Path(*names[:fixed])
        found = dict(_matching(pattern))
    written = {name[0] for name in names[fixed:] if name}
    hidden = [path for path in found if _is_left_out(path, base, written)]
    note_hidden(hidden, notes)
    caches = [path for path in found if is_cache(path)]
    note_unnamed(caches, notes)
    without = {*hidden, *caches}
    left = {path: found[path] for path in found if path not in without}
    above = {parent for path in left for parent in _pure(path).parents}
    outermost = {path: left[path] for path in left if not left[path] or _pure(path) not in above}
    return base, outermost, _sidecars(pattern, outermost)


def _pure(path: Place) -> PurePath:
    return path if isinstance(path, Path) else PurePosixPath(path.key)


def _is_magic(name: str, path: Place) -> bool:
    """Whether a part of a path has a wildcard; in a web address a question mark is none."""
    is_web = isinstance(path, RemotePath) and path.scheme in WEB
    return re.search(r"[*\[]" if is_web else r"[*?\[]", name) is not None


def _matching(pattern: Path) -> list[tuple[Path, bool]]:
    found = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    for path in found:
        refuse_broken_link(path)
    return [(path, path.is_dir()) for path in found]


def _is_left_out(path: Place, base: Place, written: Collection[str]) -> bool:
    """`written` are the first characters of the pattern's names, which may ask for such names."""
    return any(is_hidden(name) and name[0] not in written for name in relative(path, base).parts)


def _sidecars(pattern: Place, paths: Collection[Place]) -> set[str]:
    """One more listing, not a question for each file."""
    if isinstance(pattern, Path) or not any(path.suffix.lower() == ".jsonl" for path in paths):
        return set()
    return {str(path) for path, _ in pattern.glob(SIDECAR)}
