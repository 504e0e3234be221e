"""The weights of one rank: of each matrix that is divided its part, whatever the weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.kernels.fp8 import Fp8Weight
from pipeline.ranks.shares import TensorPart


class Weights(Protocol):
    """Where the weights of a model come from, by the names of its parameters."""

    def write(self, name: str, target: Tensor, /) -> None:
        """Fill a parameter, which is on its device and of its type. Raises ValueError for damaged ones."""

    def fp8(self, name: str, device: torch.device, /) -> Fp8Weight | None:
        """A matrix as it is stored, if that is in fp8 with scales for rows; else None."""


@runtime_checkable
class PartedWeights(Protocol):
    """Weights of which a part can be read alone."""

    def part(self, name: str, part: TensorPart, /) -> Tensor | None:
        """A part of a parameter, on any device; None where it must be read whole. Raises ValueError."""


class OwnWeights:
    """Weights of which only a part of each parameter is kept, read alone where that can be."""

    def __init__(
        self, weights: Weights, parts: Mapping[str, TensorPart], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """`shapes` are those of whole parameters; what has none of the `parts` is kept whole."""
        self._weights, self._parts, self._shapes = weights, parts, shapes

    def write(self, name: str, target: Tensor, /) -> None:
        part = self._parts.get(name)
        if part is None:
            self._weights.write(name, target)
            return
        own = self._weights.part(name, part) if isinstance(self._weights, PartedWeights) else None
        if own is None:
            whole = torch.empty(self._shapes[name], dtype=target.dtype, device=target.device)
            self._weights.write(name, whole)
            own = part.of(whole)
        target.copy_(own)

    def fp8(self, name: str, device: torch.device, /) -> Fp8Weight | None:
        whole, part = self._weights.fp8(name, device), self._parts.get(name)
        if whole is None or part is None:
            return whole
        scale_1N = TensorPart(1, part.ranges).of(whole.scale) if part.dim == 0 else whole.scale
        return Fp8Weight(part.of(whole.quantised), scale_1N)
