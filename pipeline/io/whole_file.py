"""Files that are there whole or not at all, and failing storage told in one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.io.causes import cause


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes `path` if all goes well, and else is gone. Raises StorageError."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with failures_told(path):
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def failures_told(path: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {cause(error)}; check the disk and run again"
        ) from error


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
