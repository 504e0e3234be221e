"""Safetensors files: which tensors a file holds, by its header alone, and one of them at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.ranks.shares import TensorPart

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MOST_POINTER_BYTES = 1024
MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it

WINDOW = 4096  # bytes that are read at one place
WINDOW_EVERY = 4 << 20  # bytes of a tensor for which one window is read
LEAST_WINDOWS = 4  # of a tensor

# matrices that make what attention and FFN add to the residual stream
ADDED = re.compile(r"\b(o_proj|down_proj|w2|attn_output|ffn_down)(\.|_)")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
    _check_places(path, stored, 8 + length, size)
    for each in stored:
        dtype = DTYPES.get(each.dtype)
        if dtype is not None and each.end - each.begin != prod(each.shape) * dtype.itemsize:
            raise ValueError(
                f"the header of {path.name} is damaged ({each.name} is {each.dtype} of shape {each.shape} in"
                f" {each.end - each.begin:,} bytes): download or copy it again"
            )
    return stored


def _check_places(path: Path, stored: list[Stored], begin: int, size: int) -> None:
    """Raise ValueError unless tensors lie side by side and fill the file, as the format has it."""
    end = begin
    for each in sorted(stored, key=lambda each: (each.begin, each.end)):
        if each.begin != end or each.end < end:
            raise ValueError(
                f"the header of {path.name} is damaged ({each.name} does not begin where the tensor before"
                " ends): download or copy it again"
            )
        end = each.end
    if end != size:
        raise ValueError(
            f"{path.name} is damaged ({size - end:,} bytes are of no tensor): download or copy it again"
        )


def read_tensor(stored: Stored) -> Tensor:
    """A tensor on the host, in memory of its own, which no page of the file stays behind in.

    Raises ValueError for a type that torch has not, or a file that has become shorter.
    """
    dtype = DTYPES.get(stored.dtype)
    if dtype is None:
        raise ValueError(f"{stored.name} is of type {stored.dtype}, which cannot be read")
    size = stored.end - stored.begin
    data = np.fromfile(stored.file, dtype=np.uint8, count=size, offset=stored.begin)
    if len(data) != size:
        raise ValueError(_cut(stored.file, stored.begin + len(data), stored.end))
    return torch.from_numpy(data).view(dtype).reshape(stored.shape)


def read_part(stored: Stored, part: TensorPart) -> Tensor:
    """Part of a matrix or vector, of which no more is read than lies between its first and its last number.

    Raises ValueError as `read_tensor`.
    """
    width = prod(stored.shape[1:])
    itemsize = (stored.end - stored.begin) // max(1, prod(stored.shape))
    if part.dim == 0:
        rows = [
            read_tensor(
                replace(
                    stored,
                    shape=(stop - start, *stored.shape[1:]),
                    begin=stored.begin + start * width * itemsize,
                    end=stored.begin + stop * width * itemsize,
                )
            )
            for start, stop in part.ranges
        ]
        return torch.cat(rows)
    if stored.file.stat().st_size < stored.end:
        raise ValueError(_cut(stored.file, stored.file.stat().st_size, stored.end))
    size = (stored.shape[0], width * itemsize)
    data = np.memmap(stored.file, dtype=np.uint8, mode="r", offset=stored.begin, shape=size)
    columns = [data[:, start * itemsize : stop * itemsize] for start, stop in part.ranges]
    return torch.from_numpy(np.concatenate(columns, axis=1)).view(DTYPES[stored.dtype])


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


def matrices_of_zeros(tensors: Mapping[str, Stored]) -> list[str]:
    """Names of matrices whose sample is zeros alone, as files have them whose download was cut off.

    Not those whose product is added to the residual stream: added layers may begin with such ones.
    """
    return [
        name
        for name, each in tensors.items()
        if len(each.shape) > 1
        and not ADDED.search(name)
        and not any(piece.strip(b"\0") for piece in sampled(each))
    ]


def seem_equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors have the same type, shape and sample of bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(mine == theirs for mine, theirs in zip(sampled(one), sampled(other), strict=True))


def are_equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors have the same type, shape and bytes, all of which are read."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(_pieces(one), _pieces(other), strict=True)
    return all(mine == theirs for mine, theirs in pairs)


def _pieces(stored: Stored) -> Iterator[bytes]:
    with stored.file.open("rb") as file:
        file.seek(stored.begin)
        for begin in range(stored.begin, stored.end, WINDOW_EVERY):
            yield file.read(min(WINDOW_EVERY, stored.end - begin))
