"""Lines of a stream, none of which is read beyond a bound: one without an end costs its row, no memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

LONGEST = 2**30  # bytes; what pyarrow and JSON can hold of one text is not much more
PASSED_BYTES = 1 << 20  # read at a time of what is passed over


@dataclass(frozen=True, slots=True)
class LongLine:
    """A line that was passed over, of which no more is known than that it has more bytes than these."""

    longest: int

    def __str__(self) -> str:
        return (
            f"has more than {self.longest:,} bytes, and was passed over; --longest-line takes longer ones, "
            "for which there must be memory several times over"
        )


def bounded_lines(stream: BinaryIO, longest: int = LONGEST) -> Iterator[bytes | LongLine]:
    """All lines, with their ends; in place of one of more than `longest` bytes, decompressed, a LongLine."""
    while line := stream.readline(longest + 2):  # its end, or a byte too many and a sign of more
        if len(line) <= longest or len(line.rstrip(b"\r\n")) <= longest:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(PASSED_BYTES)
        yield LongLine(longest)
