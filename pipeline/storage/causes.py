"""What reading a damaged or unreachable file can raise, and how it is told to the user in one line."""

from __future__ import annotations

import errno
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice

import pyarrow as pa

from pipeline.errors import ConfigError, MarsError, StorageError
from pipeline.texts.redaction import without_secrets

# Arrow's own errors derive from built-in ones unevenly (some only from RuntimeError), hence the long list.
READ_ERRORS = (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error, pa.ArrowException)

LONGEST_CAUSE = 200

_OUT_OF_REACH = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
        *("ENOTCONN", "ESHUTDOWN", "EREMOTEIO", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED"),
        *("EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
)

_OUT_OF_REACH_TYPES = (PermissionError, TimeoutError, FileNotFoundError, NotADirectoryError)

# Arrow repeats the path and tells the system's reason last.
_SYSTEM_CAUSE = re.compile(r"Detail: \[errno \d+\] (.+)")

# what libraries of storage raise where nobody has said who asks
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
)
_MEANT_FOR_CALLERS = (FileNotFoundError, FileExistsError, PermissionError)
REPLACED = "FileExpired"  # what s3fs raises where a part is of another version than the part before
CHANGED = "it was changed during the run"


class NetworkError(OSError):
    """Storage elsewhere failed, which says nothing about the file."""


class CredentialsError(NetworkError):
    """Nobody has said who asks: no fault of the storage, but something to set up."""


@contextmanager
def storage_errors() -> Iterator[None]:
    """Whatever a storage library raises becomes an `OSError`: which classes they use is theirs to change."""
    try:
        yield
    except MarsError:
        raise
    except _MEANT_FOR_CALLERS as error:
        if _is_other_failure(error.__cause__):
            raise network_error(error.__cause__) from error
        raise
    except Exception as error:
        raise network_error(error) from error


def _is_other_failure(reason: BaseException | None) -> bool:
    """Of web servers, fsspec calls whatever went wrong a file that is not there."""
    return type(reason).__module__.startswith("aiohttp") and getattr(reason, "status", None) not in (404, 410)


def network_error(error: BaseException | None) -> NetworkError:
    """What stands for an error of a library of storage."""
    if type(error).__name__ == REPLACED:
        return NetworkError(errno.ESTALE, CHANGED)
    kind = CredentialsError if type(error).__name__ in NO_CREDENTIALS else NetworkError
    return kind(errno.EIO, cause(error or OSError()))


@contextmanager
def told(
    what: str,
    remedy: str = "",
    kind: Callable[[str], Exception] = StorageError,
    of: type[Exception] | tuple[type[Exception], ...] = OSError,
) -> Iterator[None]:
    """Turn an error `of` some types into one of a `kind` that says what failed, why, and what helps.

    In place of a `StorageError` it is a `ConfigError` where nobody has set the storage up.
    """
    try:
        yield
    except of as error:
        if kind is StorageError and isinstance(error, CredentialsError):
            kind = ConfigError
        raise kind(f"{what}: {cause(error)}{remedy}") from error


def can_be_read(read: Callable[[], object]) -> bool:
    """Whether this raises none of `READ_ERRORS`."""
    try:
        read()
    except READ_ERRORS:
        return False
    return True


def changed() -> OSError:
    """What to raise for a file that is another one now, in which nothing is damaged."""
    return OSError(errno.ESTALE, CHANGED)


def is_out_of_reach(error: BaseException) -> bool:
    """Whether an error says nothing of what is in a file: rights, a network, a file that is gone."""
    if isinstance(error, CredentialsError):
        return False
    return isinstance(error, NetworkError) or (
        isinstance(error, OSError)
        and (error.errno in _OUT_OF_REACH or isinstance(error, _OUT_OF_REACH_TYPES))
    )


def cause(error: BaseException) -> str:
    """The first line of an error's message, without the path that the caller names anyway."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    system = _SYSTEM_CAUSE.search(line)
    return without_secrets(system[1] if system else line)[:LONGEST_CAUSE].rstrip(".")


def some(names: Collection[object], limit: int = 20) -> str:
    """Names for a message, cut where nobody reads on."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, islice(names, limit))) + more
