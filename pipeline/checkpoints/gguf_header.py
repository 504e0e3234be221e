"""The header of a GGUF file: its settings, and where its tensors lie. No tensor is read.

The reader of the `gguf` package makes several numpy views of each token of the vocabulary, which takes
seconds; this one steps over the vocabulary, which transformers reads for the tokenizer.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf

from pipeline.checkpoints.safetensor_files import Stored, is_lfs_pointer, lfs_message

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where the header names none
STRING, ARRAY = 8, 9
# how values of fixed size are packed, by the number of their type
PACKED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GgufError(ValueError):
    """A file that cannot be used, in a sentence that begins with the file's name."""


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    path: Path
    settings: dict[str, Any]  # by key; of an array of strings, how many there are
    tensors: tuple[Stored, ...]  # their shapes in torch's order, rows first
    places: dict[str, int]  # by key: where the strings of an array begin

    def texts(self, key: str) -> list[str]:
        """The strings of an array; none where there is no such array. Raises GgufError for damaged ones."""
        if key not in self.places:
            return []
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, self.places[key])
            try:
                return [cursor.text() for _ in range(self.settings[key])]
            except (struct.error, UnicodeDecodeError, OverflowError) as error:
                raise GgufError(f"{self.path.name} is damaged: {key} holds what is no text") from error


def read_header(path: Path) -> GgufHeader:
    """Raises GgufError for what is no GGUF file, is cut short, or holds types that are not known."""
    size = path.stat().st_size
    if is_lfs_pointer(path):
        raise GgufError(lfs_message(path))
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise GgufError(f"{path.name} is no GGUF file: it does not begin with {MAGIC.decode()}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                cursor = _Cursor(data, len(MAGIC))
                settings, lines, end = cursor.header(path.name)
            except (struct.error, UnicodeDecodeError, OverflowError) as error:
                raise GgufError(f"{path.name} is cut short or damaged: its header ends too early") from error
    alignment = settings.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise GgufError(f"{path.name} is damaged: its alignment is {alignment!r}")
    begin = -(-end // alignment) * alignment
    tensors = tuple(_stored(path, begin, *line) for line in lines)
    _check_places(path.name, tensors, begin, alignment, size)
    return GgufHeader(path=path, settings=settings, tensors=tensors, places=cursor.arrays)


Line = tuple[str, tuple[int, ...], int, int]  # name, shape, number of its type, place behind the header


class _Cursor:
    """A place in the file, that moves on with each value read."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data, self.place = data, place
        self.arrays: dict[str, int] = {}  # of strings, by their keys: where these begin

    def header(self, name: str) -> tuple[dict[str, Any], list[Line], int]:
        (version,) = self.unpack("I")
        if version not in VERSIONS:
            reason = "is big-endian" if version and version & 0xFFFF == 0 else f"has version {version}"
            raise GgufError(f"{name} {reason}, which cannot be read (little-endian versions 2 and 3 can)")
        tensor_count, setting_count = self.unpack("QQ")
        settings = {}
        for _ in range(setting_count):
            key = self.text()
            settings[key] = self.value(name, key)
        lines = [self.line() for _ in range(tensor_count)]
        return settings, lines, self.place

    def unpack(self, packed: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{packed}", self.data, self.place)
        self.place += struct.calcsize(f"<{packed}")
        return values

    def text(self) -> str:
        (length,) = self.unpack("Q")
        return self.unpack(f"{length}s")[0].decode("utf-8")

    def value(self, name: str, key: str) -> Any:
        (kind,) = self.unpack("I")
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(name, key)
        return self.unpack(_packed(name, kind))[0]

    def array(self, name: str, key: str) -> Any:
        kind, count = self.unpack("IQ")
        if kind != STRING:
            return list(self.unpack(f"{count}{_packed(name, kind)}"))
        self.arrays[key] = self.place
        read_length, place = struct.Struct("<Q").unpack_from, self.place
        for _ in range(count):
            place += 8 + read_length(self.data, place)[0]
        self.place = place
        return count

    def line(self) -> Line:
        name = self.text()
        (dimensions,) = self.unpack("I")
        shape = self.unpack(f"{dimensions}Q")
        kind, place = self.unpack("IQ")
        return name, tuple(reversed(shape)), kind, place


def _packed(name: str, kind: int) -> str:
    if kind not in PACKED:
        raise GgufError(f"{name} is damaged, or of a newer kind: it has a setting of type {kind}")
    return PACKED[kind]


def _stored(file: Path, begin: int, name: str, shape: tuple[int, ...], number: int, place: int) -> Stored:
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise GgufError(
            f"{file.name} stores {name} in type {number}, which the installed gguf package does not know;"
            " a newer release may, or get the model in another quantisation"
        ) from None
    if not shape or shape[-1] % block:
        raise GgufError(f"{file.name} is damaged: the rows of {name} are no whole blocks of type {kind.name}")
    begin, size = begin + place, prod(shape) // block * block_bytes
    return Stored(name=name, dtype=kind.name, shape=shape, file=file, begin=begin, end=begin + size)


def _check_places(file: str, tensors: tuple[Stored, ...], begin: int, alignment: int, size: int) -> None:
    """Every tensor must stand in the file, once, and begin where the one before ends, as llama.cpp wants."""
    twice = [name for name, count in Counter(each.name for each in tensors).items() if count > 1]
    if twice:
        raise GgufError(f"{file} is damaged: it names {twice[0]} twice")
    place = begin
    for each in sorted(tensors, key=lambda each: (each.begin, each.end)):
        if each.begin != place:
            raise GgufError(f"{file} is damaged: {each.name} does not begin where the tensor before ends")
        place = -(-each.end // alignment) * alignment
    last = max(tensors, key=lambda each: each.end, default=None)
    if last is not None and last.end > size:
        raise GgufError(
            f"{file} is cut short: it has {size:,} bytes, and {last.name} would end at {last.end:,};"
            " copy or download it again"
        )
