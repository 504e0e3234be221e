"""No pruning: the control that every method is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pipeline.pruning.base import KEEP_ALL, PruningMethod, Selection
from pipeline.pruning.operations import Passes, dense_work
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView


@dataclass(frozen=True, kw_only=True)
class Dense(PruningMethod):
    """Every token passes every layer."""

    name: ClassVar[str] = "dense"
    source: ClassVar[str] = "the unpruned model"
    reads_layers: ClassVar[bool] = False

    @classmethod
    def suits(cls, shape: ModelShape) -> bool:
        return True

    @classmethod
    def attending_as(cls, method: PruningMethod, shape: ModelShape) -> Self:
        """No pruning, but attention as block-sparse as `method` makes it."""
        masses = [1.0 if mass is None else mass for mass in method.attention_masses(shape.layers)]
        same = len(set(masses)) == 1
        return cls(sparse_attention=(None if masses[0] >= 1 else masses[0]) if same else tuple(masses))

    def with_keep(self, shares: tuple[float, ...]) -> Self:
        return self  # whose runs others are measured against

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return False

    def shared_layers(self, shape: ModelShape) -> int:
        return shape.layers

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        return [dense_work(shape, length)]

    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        return KEEP_ALL
