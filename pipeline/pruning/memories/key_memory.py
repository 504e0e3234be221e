"""Keys that a method holds before RoPE, with their values; it gives them positions when they are read.

A `KeyMemory` is of one document. It is given the document's tokens in order, layer by layer: chunks of the
prompt, each of which passes all layers before the next one does, and then what is generated. Letters beside
those of segments.py: N new tokens, Q queries, P positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.fused import rope_
from pipeline.kernels.query_pieces import QueryPart, QueryPiece
from pipeline.kernels.segments import Segments
from pipeline.pruning.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """RoPE at any of the positions from 0 up to a last one, of the layers of a model."""

    kinds: tuple[str | None, ...]  # of each layer, among the tables; None: it has no RoPE
    tables: dict[str, tuple[Tensor, Tensor]]  # cosines and sines (P, d), or of a head's first dimensions
    query_scale_P: Tensor | None = None  # of queries, where that depends on the position

    def turn_keys_(self, layer: int, k_TKd: Tensor, positions_T: Tensor) -> None:
        """Give keys their positions, in place."""
        kind = self.kinds[layer]
        if kind is not None:
            cos_Td, sin_Td = (table[positions_T] for table in self.tables[kind])
            turned = k_TKd[..., : cos_Td.shape[-1]]
            rope_(turned, turned[:, :0], cos_Td, sin_Td)

    def queries(self, layer: int, q_THd: Tensor, positions_T: Tensor) -> Tensor:
        """Queries at these positions, (T, H, d)."""
        turned_THd = q_THd.clone()
        self.turn_keys_(layer, turned_THd, positions_T)
        if self.query_scale_P is not None:
            turned_THd.mul_(self.query_scale_P[positions_T][:, None, None])
        return turned_THd


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What a memory is made for: one document of a model, on a device."""

    shape: ModelShape
    length: int  # tokens of the prompt
    new_tokens: int  # that may follow
    dtype: torch.dtype
    device: torch.device
    attention: AttentionBackend
    rotation: Callable[[int], Rotation]  # of so many positions, from 0 on

    @property
    def fits_context(self) -> bool:
        """Whether all tokens have positions that the model was trained on."""
        return self.length + self.new_tokens <= self.shape.context


class KeyMemory(ABC):
    """What a method holds of one document's keys, before RoPE, and values."""

    def __init__(self, layers: int) -> None:
        # of each layer, mean over heads: query-key pairs of attention so far
        self.pairs = [0] * layers
        self.estimated_pairs = [0] * layers  # and those that keys were chosen by

    @abstractmethod
    def attend(self, layer: int, q_QHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        """Take in a layer's next N tokens; what the last Q of them attend to, (Q, H, d).

        Queries and keys are without RoPE. Q is N, or fewer where nothing else is read of the layer.
        """

    @property
    @abstractmethod
    def stored(self) -> list[int]:
        """Of each layer, the tokens whose keys and values are held."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of the device."""


def attended_by_last(attention: AttentionBackend, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
    """(Q, H, d) causal attention of the last Q of T tokens."""
    first, end = len(k_TKd) - len(q_QHd), len(k_TKd)
    piece = QueryPiece(first, (QueryPart(0, first, end),))
    return attention.prefill_piece(q_QHd, k_TKd, v_TKd, Segments.of((end,), q_QHd.device), piece)
