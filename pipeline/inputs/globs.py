"""What a pattern matches: files, and folders, which are read whole."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from pipeline.inputs.listing import is_cache, is_hidden, note_hidden, note_unnamed, refuse_broken_link
from pipeline.outputs.sidecar import SIDECAR
from pipeline.storage.remote import WEB, Place, RemotePath, relative


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What a pattern matches: `base` is the folder that it begins in.

    `files` and `folders` are in one order, that of `paths`; no other match lies in one of the folders.
    `sidecars` are the names, as shown, of remote files that say how a run made the file beside them.
    """

    base: Place
    paths: tuple[Place, ...]
    folders: frozenset[Place]
    sidecars: Collection[str]

    @property
    def files(self) -> list[Place]:
        return [path for path in self.paths if path not in self.folders]


def has_magic(path: Place) -> bool:
    """Whether a path is a pattern."""
    return _is_magic(path.bare if isinstance(path, RemotePath) else str(path), path)


def matches(pattern: Place, notes: list[str]) -> Matches:
    """Files and folders that match; wildcards stand for no names that say that they are no data.

    Raises InputError for a link that leads nowhere, OSError where storage elsewhere fails.
    """
    names = pattern.key.split("/") if isinstance(pattern, RemotePath) else list(pattern.parts)
    fixed = next(i for i, name in enumerate(names) if _is_magic(name, pattern))
    if isinstance(pattern, RemotePath):
        base: Place = pattern.above(fixed)
        found: dict[Place, bool] = dict(pattern.glob())
    else:
        base = Path(*names[:fixed])
        found = dict(_local(pattern))
    written = {name[0] for name in names[fixed:] if name}
    hidden = [path for path in found if _is_hidden(path, base, written)]
    note_hidden(hidden, notes)
    caches = [path for path in found if is_cache(path)]
    note_unnamed(caches, notes)
    without = {*hidden, *caches}
    left = {path: found[path] for path in found if path not in without}
    above = {parent for path in left for parent in _pure(path).parents}
    paths = tuple(path for path in left if not left[path] or _pure(path) not in above)
    return Matches(
        base=base,
        paths=paths,
        folders=frozenset(path for path in paths if left[path]),
        sidecars=_sidecars(pattern, paths),
    )


def _pure(path: Place) -> PurePath:
    return path if isinstance(path, Path) else PurePosixPath(path.key)


def _is_magic(name: str, path: Place) -> bool:
    """Whether a part of a path has a wildcard; in a web address a question mark is none."""
    is_web = isinstance(path, RemotePath) and path.scheme in WEB
    return re.search(r"[*\[]" if is_web else r"[*?\[]", name) is not None


def _local(pattern: Path) -> list[tuple[Path, bool]]:
    found = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    for path in found:
        refuse_broken_link(path)
    return [(path, path.is_dir()) for path in found]


def _is_hidden(path: Place, base: Place, written: Collection[str]) -> bool:
    """`written` are the first characters of the pattern's names, which may ask for such names."""
    return any(is_hidden(name) and name[0] not in written for name in relative(path, base).parts)


def _sidecars(pattern: Place, paths: Collection[Place]) -> set[str]:
    """One more listing, not a question for each file."""
    if isinstance(pattern, Path) or not any(path.suffix.lower() == ".jsonl" for path in paths):
        return set()
    return {str(path) for path, _ in pattern.glob(SIDECAR)}
