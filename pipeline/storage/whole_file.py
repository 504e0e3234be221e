"""Files that are there whole or not at all, that only we have made, and failing storage told in one line."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ConfigError
from pipeline.storage.causes import told

_GROUP = 0o070


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` if all goes well, and else is gone.

    It has the mode, and where that may be the group, of the file that it replaces. Raises StorageError.
    """
    target = Path(os.path.realpath(path))
    temporary = partial_path(target)
    with failures_told(path), open_new(temporary, like=target) as file:
        try:
            yield file
            file.flush()
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def partial_path(target: Path) -> Path:
    """The name beside a file under which this process writes what is to replace it."""
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def remove_partials(path: Path) -> None:
    """Remove what processes that were killed have left of a file; no other may be writing it meanwhile."""
    target = Path(os.path.realpath(path))
    name = re.compile(rf"{re.escape(f'.{target.name}.partial-')}\d+(\.\w+)?")
    for left in filter(name.fullmatch, os.listdir(target.parent)):
        with suppress(OSError):
            target.with_name(left).unlink()


def open_new(path: Path, like: Path | None = None) -> BinaryIO:
    """As `create_new`, as a file."""
    return os.fdopen(create_new(path, like), "wb")


def create_new(path: Path, like: Path | None = None) -> int:
    """The descriptor of a new file to write to, with the access to `like`, if that is there.

    What a killed run left under the name is removed. Whatever else stands there, above all a link, whose
    target would be written to, is a `ConfigError`.
    """
    try:
        return _created(path, like)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise in_the_way(path) from None
    path.unlink(missing_ok=True)
    return _created(path, like)


def in_the_way(path: Path, what: str = "marsinfer did not make it") -> ConfigError:
    """The refusal of something that has the name of a file or folder of ours."""
    reason = "it is a link, which is not followed" if path.is_symlink() else what
    return ConfigError(f"{path} is in the way, and {reason}: move it away and run again")


def _created(path: Path, like: Path | None) -> int:
    model = None
    if like is not None:
        with suppress(FileNotFoundError):
            model = like.stat()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666 if model is None else 0o600)
    if model is not None:
        give_access(descriptor, model, stat.S_IMODE(model.st_mode) & 0o666)
    return descriptor


def give_access(file: int | Path, model: os.stat_result, mode: int) -> None:
    """Set a mode and the group of `model`; where that is not allowed, no other group gets what it had."""
    if os.stat(file).st_gid != model.st_gid:
        try:
            os.chown(file, -1, model.st_gid)
        except OSError:
            mode &= ~_GROUP
    with suppress(OSError):  # of a file system that has no modes
        os.chmod(file, mode)


def folder_like(folder: Path, output: Path) -> None:
    """Open a folder of ours to those alone who may read or write the file that it is for, if it is there."""
    with suppress(FileNotFoundError):
        model = output.stat()
        mode = stat.S_IMODE(model.st_mode) & 0o666
        inherits = folder.stat().st_mode & stat.S_ISGID
        give_access(folder, model, mode | (mode & 0o444) >> 2 | 0o700 | inherits)


def failures_told(path: Path) -> AbstractContextManager[None]:
    """Turn an OSError into a StorageError that names the file."""
    return told(f"{path} cannot be written", "; check the disk and run again")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, which syncing its files alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)
