"""Objects behind URLs as open files, read block by block or as a stream."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pipeline.storage.causes import NetworkError, network_error

# What a reader keeps of one file: enough blocks for a few columns of Parquet side by side.
BLOCK_BYTES = 2 << 20
BLOCKS = 16


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
            raise network_error(error) from error


class Blocks(_RemoteFile):
    """A seekable object read in blocks, of which the last few are kept; `check` is called behind each."""

    def __init__(self, inner: Any, size: int, check: Callable[[], None]) -> None:
        super().__init__(inner)
        self._size, self._check = size, check
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
            self._check()
        except Exception as error:
            raise network_error(error) from error
        if len(data) != wanted:
            raise NetworkError(errno.EIO, "it ended early, or was changed during the run")
        return data


class Stream(_RemoteFile):
    """What a web server sends only from its beginning to its end."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        raise OSError(errno.ESPIPE, "its server does not send parts of it; download it and name the file")


def sends_parts(inner: Any, size: int) -> bool:
    """Whether a web server answers a request for a part; if not, the first block can be had all the same."""
    if size <= BLOCK_BYTES:
        return True
    try:
        inner.seek(size - 1)
        return len(inner.read(1)) == 1
    except ValueError:
        return False
