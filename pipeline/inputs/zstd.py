"""Zstandard as a raw stream that gives all bytes before a cut, with pyarrow alone."""

from __future__ import annotations

import io
from typing import BinaryIO

import pyarrow as pa

from pipeline.storage.causes import NetworkError

SKIP_BYTES = 1 << 20


class ZstdReader(io.RawIOBase):
    """Decompresses all frames of an open file.

    Arrow's stream, asked for n bytes of which the file has fewer before a cut, fails without giving those. So
    after a failure this one starts again, skips what it gave already, and asks for single bytes.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._stream = pa.CompressedInputStream(raw, "zstd")
        self._given = 0
        self._has_failed = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(1 if self._has_failed else len(buffer))
        except OSError as error:
            if self._has_failed or isinstance(error, NetworkError) or not self._raw.seekable():
                raise
            self._start_again()
            data = self._stream.read(1)
        buffer[: len(data)] = data
        self._given += len(data)
        return len(data)

    def _start_again(self) -> None:
        self._has_failed = True
        self._failed_stream = self._stream  # its end would close the file
        self._raw.seek(0)
        self._stream = pa.CompressedInputStream(self._raw, "zstd")
        left = self._given
        while left:
            left -= len(self._stream.read(min(left, SKIP_BYTES)))
