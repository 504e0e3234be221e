"""Files behind URLs, through fsspec: one class that readers and writers use as they use `pathlib.Path`."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from pipeline.errors import ConfigError, MarsError
from pipeline.storage.causes import CredentialsError, NetworkError, cause
from pipeline.texts.redaction import HIDDEN, bare, hidden

# What a reader keeps of one file: enough blocks for a few columns of Parquet side by side.
BLOCK_BYTES = 2 << 20
BLOCKS = 16
# proxies of the environment, which the libraries of S3 and of the hub use by themselves
OF_SCHEME: dict[str, dict[str, Any]] = {
    scheme: {"client_kwargs": {"trust_env": True}} for scheme in ("http", "https")
}

UPLOAD_BYTES = 16 << 20  # of one piece of an upload
UPLOADS_AT_ONCE = 4
MOST_PIECES = 10_000  # of S3

# Scheme -> our extra that brings its package.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
# Storage that can make an object only if it is not there yet, without which an output cannot be locked.
WRITABLE = ("s3", "s3a", "gs", "gcs", "memory")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
# file:///x, file://localhost/x and file:/x are one file
_LOCAL = re.compile(r"(?:file|local):(?://(?:localhost(?=/))?|(?=/))", re.IGNORECASE)
WEB = ("http", "https")
KEYLESS = ("s3", "s3a", "gs", "gcs")
# what libraries of storage raise where nobody has said who asks
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
)
_MEANT_FOR_CALLERS = (FileNotFoundError, FileExistsError, PermissionError)


def place_of(given: str | Path | RemotePath) -> Place:
    """What a user's word stands for; nothing is looked up yet, but a missing package is a `ConfigError`."""
    if isinstance(given, Path | RemotePath):
        return given
    if _LOCAL.match(given):
        path = _LOCAL.sub("", given, count=1)
        return Path(path if os.path.lexists(path) else unquote(path))
    return RemotePath.of(given) if _URL.match(given) else Path(os.path.expanduser(given))


def output_place(given: str | Path | RemotePath) -> Place:
    """As `place_of`; a `ConfigError` for storage that outputs cannot be written to."""
    scheme = _scheme(str(given))
    if scheme and not _LOCAL.match(str(given)) and scheme not in WRITABLE:
        raise ConfigError(
            f"{hidden(str(given))} cannot be an output: {scheme}:// cannot lock it against a second run; "
            "write to a file, s3:// or gs://, and copy it"
        )
    return place_of(given)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Whatever a storage library raises becomes an `OSError`: which classes they use is theirs to change."""
    try:
        yield
    except MarsError:
        raise
    except _MEANT_FOR_CALLERS as error:
        if _is_other_failure(error.__cause__):
            raise _network_error(error.__cause__) from error
        raise
    except Exception as error:
        raise _network_error(error) from error


def _is_other_failure(reason: BaseException | None) -> bool:
    """Of web servers, fsspec calls whatever went wrong a file that is not there."""
    return type(reason).__module__.startswith("aiohttp") and getattr(reason, "status", None) not in (404, 410)


def _network_error(error: BaseException | None) -> NetworkError:
    kind = CredentialsError if type(error).__name__ in NO_CREDENTIALS else NetworkError
    return kind(errno.EIO, cause(error or OSError()))


@dataclass(frozen=True, slots=True)
class RemotePath:
    """One object: `key` is its name to the file system `fs`, `shown` its URL without secrets."""

    shown: str
    key: str
    fs: Any = field(compare=False, repr=False)
    known_size: int | None = field(default=None, compare=False)

    @classmethod
    def of(cls, url: str) -> RemotePath:
        scheme = _scheme(url)
        url = scheme + url[len(scheme) :]
        if scheme in KEYLESS and hidden(url).startswith(f"{scheme}://{HIDDEN}@"):
            raise ConfigError(
                f"{hidden(url)}: {scheme}:// takes no user and password; give credentials in the "
                "environment, or in the file of its library"
            )
        options = {} if "::" in url else {"use_listings_cache": False, **OF_SCHEME.get(scheme, {})}
        try:
            with storage_errors():
                import fsspec

                fs, key = fsspec.url_to_fs(url, **options)
                fs.invalidate_cache()
        except NetworkError as error:
            if isinstance(error.__cause__, ImportError):
                raise ConfigError(_missing_package(url, scheme, error.__cause__)) from error
            raise ConfigError(f"{hidden(url)} cannot be used: {cause(error)}") from error
        return cls(hidden(url), key, fs)

    def __str__(self) -> str:
        return self.shown

    @property
    def scheme(self) -> str:
        return _scheme(self.shown)

    @property
    def name(self) -> str:
        return self.bare.rstrip("/").rpartition("/")[2]

    @property
    def bare(self) -> str:
        """The key, that of a web address without user info and query: names of folders and of the file."""
        return bare(self.key)

    @property
    def address(self) -> str:
        """What tells it from any other object."""
        return self.fs.unstrip_protocol(self.key)

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def beside(self, name: str) -> RemotePath:
        """The object `name` in the same folder."""
        shown, slash, _ = self.shown.rpartition("/")
        return RemotePath(f"{shown}{slash}{name}", f"{self.folder}/{name}", self.fs)

    @property
    def folder(self) -> str:
        return self.key.rpartition("/")[0]

    def kind(self) -> str | None:
        """`file`, `directory`, or None if there is nothing."""
        try:
            with storage_errors():
                return self.fs.info(self.key)["type"]
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        """Whether there is an object of this name; a folder is none."""
        return self.kind() == "file"

    def is_file(self) -> bool:
        """Whether it can be read more than once: always."""
        return True

    def size(self) -> int:
        """Bytes, or 0 where a web server does not tell."""
        if self.known_size is not None:
            return self.known_size
        with storage_errors():
            return self.fs.info(self.key)["size"] or 0

    def open(self, mode: str = "rb") -> BinaryIO:
        assert mode == "rb"
        with storage_errors():
            inner = self.fs.open(self.key, "rb", block_size=BLOCK_BYTES, cache_type="none")
            size = getattr(inner, "size", None)
            if size is not None and (self.scheme not in WEB or _sends_parts(inner, size)):
                return cast(BinaryIO, io.BufferedReader(_Blocks(inner, size)))
            inner.close()
            return cast(BinaryIO, io.BufferedReader(_Stream(self.fs.open(self.key, "rb", block_size=0))))

    def read_bytes(self) -> bytes:
        with storage_errors():
            return self.fs.cat_file(self.key)

    def write_bytes(self, data: bytes) -> None:
        """Replace the object; it is durable on return."""
        with storage_errors():
            self.fs.pipe_file(self.key, data)

    def create(self, data: bytes) -> bool:
        """Make the object if there is none, which of several callers at one time only one can.

        A repeated request fails on the object that the first one made, and storage words a lost race in
        several ways. So after a failure what is there decides: `data` must be the caller's alone.
        """
        try:
            with storage_errors():
                self.fs.pipe_file(self.key, data, mode="create")
        except OSError as error:
            try:
                return self.read_bytes() == data
            except FileNotFoundError:
                raise error from None
        return True

    def upload(self, file: Path) -> None:
        """Make the object from a local file; it appears whole or not at all."""
        with storage_errors():
            self.fs.put_file(str(file), self.key, **_upload_options(self.scheme, file.stat().st_size))

    def download(self, file: Path) -> None:
        with storage_errors():
            self.fs.get_file(self.key, str(file))

    def unlink(self) -> None:
        """Remove the object, if it is there."""
        try:
            with storage_errors():
                self.fs.rm_file(self.key)
        except FileNotFoundError:
            pass

    def walk(self) -> list[RemotePath]:
        """All files below this folder, hidden ones too, sorted."""
        with storage_errors():
            found = self.fs.find(self.key, detail=True)
        files = (self._listed(info) for info in found.values() if info["type"] == "file")
        # an empty object whose name ends in a slash stands for a folder
        return sorted(
            (file for file in files if not file.key.endswith("/")),
            key=lambda file: relative(file, self).parts,
        )

    def glob(self, suffix: str = "") -> list[tuple[RemotePath, bool]]:
        """What matches this pattern with `suffix` behind it, sorted, and whether it is a folder."""
        with storage_errors():
            found = self.fs.glob(f"{self.key}{suffix}", detail=True)
        keys = sorted(key for key in found if not key.endswith("/"))
        return [(self._listed(found[key]), found[key]["type"] == "directory") for key in keys]

    def above(self, parts: int) -> RemotePath:
        """The folder that the first `parts` parts of the key name, of which only the key counts."""
        return RemotePath(self.shown, "/".join(self.key.split("/")[:parts]), self.fs)

    def siblings(self, prefix: str) -> list[RemotePath]:
        """The files of the same folder, and below it, whose path from there begins with `prefix`."""
        with storage_errors():
            found = self.fs.find(self.folder, prefix=prefix, detail=True)
        start = f"{self.folder}/{prefix}"
        return [self._listed(found[key]) for key in sorted(found) if key.startswith(start)]

    def _listed(self, info: dict[str, Any]) -> RemotePath:
        key = info["name"]
        return RemotePath(hidden(self.fs.unstrip_protocol(key)), key, self.fs, info.get("size") or 0)


Place = Path | RemotePath


def relative(path: Place, folder: Place) -> PurePath:
    """The path below the folder."""
    if isinstance(path, RemotePath) and isinstance(folder, RemotePath):
        return PurePosixPath(path.bare.removeprefix(folder.bare.rstrip("/")).lstrip("/"))
    assert isinstance(path, Path)
    assert isinstance(folder, Path)
    return path.relative_to(folder)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec, whose errors become an `OSError` whatever their class."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        part = self._part(len(buffer))
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()

    def _part(self, length: int) -> bytes | memoryview:
        """At most so many bytes from where it stands; none at the end."""
        try:
            return self._inner.read(length)
        except Exception as error:
            raise _network_error(error) from error


class _Blocks(_RemoteFile):
    """A seekable object read in blocks, of which the last few are kept."""

    def __init__(self, inner: Any, size: int) -> None:
        super().__init__(inner)
        self._size = size
        self._block = lru_cache(BLOCKS)(self._fetched)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def close(self) -> None:
        self._block.cache_clear()
        super().close()

    def _part(self, length: int) -> bytes | memoryview:
        if self._position >= self._size:
            return b""
        number, start = divmod(self._position, BLOCK_BYTES)
        return memoryview(self._block(number))[start : start + length]

    def _fetched(self, number: int) -> bytes:
        first = number * BLOCK_BYTES
        wanted = min(BLOCK_BYTES, self._size - first)
        try:
            self._inner.seek(first)
            data = self._inner.read(wanted)
        except Exception as error:
            raise _network_error(error) from error
        if len(data) != wanted:
            raise NetworkError(errno.EIO, "it ended early, or was changed during the run")
        return data


class _Stream(_RemoteFile):
    """What a web server sends only from its beginning to its end."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        raise OSError(errno.ESPIPE, "its server does not send parts of it; download it and name the file")


def _sends_parts(inner: Any, size: int) -> bool:
    """Whether a web server answers a request for a part; if not, the first block can be had all the same."""
    if size <= BLOCK_BYTES:
        return True
    try:
        inner.seek(size - 1)
        return len(inner.read(1)) == 1
    except ValueError:
        return False


def _scheme(url: str) -> str:
    match = _URL.match(url)
    return match[1].lower() if match else ""


def _missing_package(url: str, scheme: str, error: ImportError) -> str:
    if scheme in EXTRAS:
        return (
            f"{hidden(url)} needs a package that is not installed: pip install 'marsinfer[{EXTRAS[scheme]}]'"
        )
    return f"{hidden(url)} needs a package that is not installed: {cause(error)}"


def _upload_options(scheme: str, size: int) -> dict[str, int]:
    """Else s3fs would hold half a gigabyte at a time."""
    if scheme not in ("s3", "s3a"):
        return {}
    return {"chunksize": max(UPLOAD_BYTES, -(-size // MOST_PIECES)), "max_concurrency": UPLOADS_AT_ONCE}
