"""Where the kernels are, in modules that can be imported only where Triton is, and the sizes they take."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def kernels_for(x: Tensor, module: str) -> Any | None:
    """A module of this folder with kernels in Triton where they can run on this tensor, else None."""
    return _imported(module) if x.is_cuda else None


@cache
def kernels_on(kind: str) -> bool:
    """Whether a device of this type has kernels, as far as can be told without importing one."""
    return kind == "cuda" and find_spec("triton") is not None


def power_of_two(number: int, low: int = 1, high: int = 1 << 30) -> int:
    """The least one that holds `number`, as Triton wants its blocks, within bounds."""
    return min(max(low, 1 << (number - 1).bit_length()), high)


@cache
def _imported(module: str) -> Any | None:
    try:
        return import_module(f"pipeline.kernels.{module}")
    except ImportError:
        return None
