"""Safetensors files by their headers: which tensors a file holds, without reading them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MOST_POINTER_BYTES = 1024
MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it

WINDOW = 4096  # bytes that are read at one place
WINDOW_EVERY = 4 << 20  # bytes of a tensor for which one window is read
LEAST_WINDOWS = 4  # of a tensor


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a file; `begin` and `end` are offsets from the file's first byte."""

    name: str
    dtype: str  # as safetensors names it (F32, BF16, F8_E4M3), or GGUF (Q8_0)
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def is_lfs_pointer(path: Path) -> bool:
    """Whether a clone without Git LFS left a note of where the file is, in place of the file."""
    if not path.is_file() or path.stat().st_size > MOST_POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def lfs_message(path: Path) -> str:
    return f"{path.name} is a Git LFS pointer, not the file: run `git lfs pull` in the folder"


def read_header(path: Path) -> list[Stored]:
    """All tensors of a file. Raises ValueError, with the reason and a remedy, for a file that is damaged."""
    if is_lfs_pointer(path):
        raise ValueError(lfs_message(path))
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path.name} is empty: download or copy it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MOST_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file: download or copy it again")
        if 8 + length > size:
            raise ValueError(_cut(path, size, 8 + length))
        header = file.read(length)
    stored = _parsed(path, header)
    end = max((each.end for each in stored), default=8 + length)
    if end > size:
        raise ValueError(_cut(path, size, end))
    return stored


def _cut(path: Path, size: int, least: int) -> str:
    return f"{path.name} is cut short ({size:,} of at least {least:,} bytes): download or copy it again"


def _parsed(path: Path, header: bytes) -> list[Stored]:
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        return [
            Stored(
                name=name,
                dtype=about["dtype"],
                shape=tuple(about["shape"]),
                file=path,
                begin=8 + len(header) + about["data_offsets"][0],
                end=8 + len(header) + about["data_offsets"][1],
            )
            for name, about in entries.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the header of {path.name} is damaged: download or copy it again") from error


def sampled(stored: Stored) -> Iterator[bytes]:
    """Bytes from places spread over a tensor, its first and its last among them; all of a small one."""
    size = stored.end - stored.begin
    windows = max(LEAST_WINDOWS, size // WINDOW_EVERY)
    with stored.file.open("rb") as file:
        if size <= windows * WINDOW:
            file.seek(stored.begin)
            yield file.read(size)
            return
        for window in range(windows):
            file.seek(stored.begin + window * (size - WINDOW) // (windows - 1))
            yield file.read(WINDOW)


def seem_equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors have the same type, shape and sample of bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(mine == theirs for mine, theirs in zip(sampled(one), sampled(other), strict=True))
