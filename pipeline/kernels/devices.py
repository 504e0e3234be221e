"""Devices and dtypes by the names that users give them, and the memory that is free."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from pipeline.errors import ConfigError


def pick_device(device: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device that exists."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}: give auto, cpu, cuda or cuda:N") from None
    if wanted.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported: give auto, cpu, cuda or cuda:N")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", wanted.index or 0) if wanted.type == "cuda" else wanted


def use_device(device: torch.device) -> torch.device:
    """Make a GPU this thread's current one, on which Triton launches whatever its tensors' device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of NVIDIA's Hopper; AMD's have versions of their own, of which some are 9 too."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def copied_by_tiles(x_TNd: Tensor) -> bool:
    """Whether Hopper's copy engine can load tiles of it: heads end to end, tokens at places of 16 bytes."""
    joined = x_TNd.stride(2) == 1 and x_TNd.stride(1) == x_TNd.shape[2]
    return joined and x_TNd.stride(0) * x_TNd.itemsize % 16 == 0 and x_TNd.data_ptr() % 16 == 0


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Of `DTYPES`, the settings'."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype)


def free_memory(device: torch.device) -> int:
    """Bytes that weights may take; of the host, what it would swap counts too."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available + psutil.swap_memory().free
