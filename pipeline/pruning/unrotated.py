"""Base of the methods that hold keys before RoPE: see `HoldsUnrotatedKeys` of capabilities.py."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.errors import ConfigError
from pipeline.pruning.base import KEEP_ALL, PruningMethod, Selection
from pipeline.pruning.limits import setting, several
from pipeline.pruning.memories.key_memory import KeyMemory, MemoryNeeds
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView

LONGEST = 1 << 20  # tokens


@dataclass(frozen=True, kw_only=True)
class UnrotatedMethod(PruningMethod):
    """A method that writes `memory`, and computes every token in every layer."""

    reads_layers: ClassVar[bool] = False

    longest_tokens: int = setting(
        LONGEST, "longest prompt with its answer that is read, beyond the model's context", low=1, whole=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(mass is not None and mass < 1 for mass in several(self.sparse_attention)):
            raise ConfigError(f"method {self.name} chooses keys by itself: it takes no sparse_attention")

    def check_depth(self, shape: ModelShape) -> None:
        super().check_depth(shape)
        lacking = {"LongRoPE": shape.has_long_rope, "attention sinks of their own": shape.has_sinks}
        for trait, is_there in lacking.items():
            if is_there:
                raise ConfigError(f"method {self.name} does not suit this model, whose layers have {trait}")

    def alike(self, lengths: Sequence[int]) -> bool:
        return len(lengths) == 1  # a prompt's chunks pass all layers one after the other

    def longest(self, shape: ModelShape) -> int:
        """See `HoldsUnrotatedKeys`."""
        return max(shape.context, self.longest_tokens)

    @abstractmethod
    def chunk_tokens(self, most: int) -> int:
        """See `HoldsUnrotatedKeys`."""

    @abstractmethod
    def memory(self, needs: MemoryNeeds) -> KeyMemory:
        """See `HoldsUnrotatedKeys`."""

    @abstractmethod
    def attention_bytes(self, shape: ModelShape, itemsize: int, length: int, chunk: int) -> int:
        """See `HoldsUnrotatedKeys`."""

    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        return KEEP_ALL  # which nobody asks
