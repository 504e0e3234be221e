"""Files behind URLs, through fsspec: one class that readers and writers use as they use `pathlib.Path`."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from pipeline.errors import ConfigError
from pipeline.storage.causes import NetworkError, cause, storage_errors
from pipeline.storage.remote_files import BLOCK_BYTES, Blocks, Stream, sends_parts
from pipeline.storage.version import Version, web_settings
from pipeline.texts.redaction import HIDDEN, bare, hidden

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
CHECKING = ("s3", "s3a")  # whose library asks for parts of the version alone that it opened
KEYLESS = ("s3", "s3a", "gs", "gcs")


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
        try:
            with storage_errors():
                import fsspec

                options: dict[str, Any] = {} if "::" in url else {"use_listings_cache": False}
                if options and scheme in WEB:
                    options |= web_settings()
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

    def open(self, mode: str = "rb", version: Version | None = None) -> BinaryIO:
        """Open it for reading; an OSError for a part of another version than `version`, or the first part.

        Web servers tell the version with each part, other storage behind it, unless its library sees to it.
        """
        assert mode == "rb"
        version = Version() if version is None else version
        is_web = self.scheme in WEB
        asked = {"trace_request_ctx": version} if is_web else {}

        def check() -> None:
            if not (is_web or self.scheme in CHECKING):
                version.check(self.fs.info(self.key))

        with storage_errors():
            inner = self.fs.open(self.key, "rb", block_size=BLOCK_BYTES, cache_type="none", **asked)
            if not is_web:
                version.check(getattr(inner, "details", None) or self.fs.info(self.key))
            size = getattr(inner, "size", None)
            if size is not None and (not is_web or sends_parts(inner, size)):
                return cast(BinaryIO, io.BufferedReader(Blocks(inner, size, check)))
            inner.close()
            stream = self.fs.open(self.key, "rb", block_size=0, **asked)
            return cast(BinaryIO, io.BufferedReader(Stream(stream)))

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
