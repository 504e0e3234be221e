"""One run at a time writes an output: a lock file beside it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from pipeline.errors import LockedError
from pipeline.outputs.lease import Holder, LeaseLock
from pipeline.storage.causes import told
from pipeline.storage.remote import RemotePath, output_place
from pipeline.storage.whole_file import in_the_way

_LONGEST_HOLDER = 4096  # bytes of the lock file worth reading
_FIRST = b'{"pid": '  # of what a holder writes


def lock_output(output: str | Path) -> OutputLock | LeaseLock:
    """The lock of an output, wherever it is."""
    place = output_place(output)
    return LeaseLock(place) if isinstance(place, RemotePath) else OutputLock(place)


def refuse_locked(output: str | Path) -> None:
    """A `LockedError` where another run is writing an output; the lock is not taken, nor a file made."""
    try:
        lock_output(output).refuse_held()
    except OSError:
        return  # whether it can be locked is for the run to find out


class OutputLock:
    """A context manager that holds `.NAME.lock` beside the output; a `LockedError` if another run does.

    The system frees the lock when its holder dies, so what a killed run left behind is no obstacle, and
    what the file says serves only the message.
    """

    def __init__(self, output: str | Path) -> None:
        self._output = Path(output)
        # Two names of one file, by a symbolic link, must share the lock.
        target = Path(os.path.realpath(self._output))
        self._path = target.with_name(f".{target.name}.lock")
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        with told(f"{self._path} cannot be locked", "; choose a writable folder on a local disk"):
            self._descriptor = self._acquire()
        with suppress(OSError):  # a full disk; the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, Holder().dump())
        return self

    def __exit__(self, *error: object) -> None:
        assert self._descriptor is not None
        # Removed while held: whoever opened the file meanwhile finds that its name is gone, and tries again.
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def check(self) -> None:
        """Raise if the lock is no longer held; the system takes it from nobody who lives."""

    def refuse_held(self) -> None:
        """A `LockedError` if a run holds the lock; an OSError where that cannot be found out."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def _acquire(self) -> int:
        while True:
            with ExitStack() as opened:
                descriptor = _opened(self._path)
                opened.callback(os.close, descriptor)
                self._lock(descriptor, fcntl.LOCK_EX)
                if _is_at(descriptor, self._path):
                    opened.pop_all()
                    return descriptor

    def _lock(self, descriptor: int, mode: int) -> None:
        """Lock an open lock file; a `LockedError` that names the run which holds it."""
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = None
            with suppress(OSError):
                holder = Holder.parse(os.pread(descriptor, _LONGEST_HOLDER, 0))
            raise LockedError(
                f"{self._output} is being written by {holder or 'another process'}; wait for it, or name "
                "another output"
            ) from None


def _opened(path: Path) -> int:
    """A lock file, made if it is not there; a `ConfigError` for what no run has made, which is left alone."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise in_the_way(path) from error
        raise
    found = os.fstat(descriptor)
    is_file = stat.S_ISREG(found.st_mode) and found.st_nlink <= 1
    # another user's too, if a run of theirs was killed; one with another name would be written to under it
    if not is_file or not _FIRST.startswith(os.pread(descriptor, len(_FIRST), 0).strip(b"\0")):
        os.close(descriptor)
        raise in_the_way(path)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
