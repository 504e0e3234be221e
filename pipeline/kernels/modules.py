"""Where the kernels are: in modules that can be imported only where Triton is."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor


def kernels_for(x: Tensor, module: str) -> Any | None:
    """A module of this folder with kernels in Triton where they can run on this tensor, else None."""
    return _imported(module) if x.is_cuda else None


@cache
def _imported(module: str) -> Any | None:
    try:
        return import_module(f"pipeline.kernels.{module}")
    except ImportError:
        return None
