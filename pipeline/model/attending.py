"""A layer's attention in a prefill, a piece of the queries at a time, and what it took."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.query_pieces import QueryPiece
from pipeline.kernels.segments import Segments
from pipeline.kernels.sparse_prefill import SparsePrefill
from pipeline.model.early_exit import EarlyExit
from pipeline.pruning.operations import causal_pairs


@dataclass(kw_only=True)
class LayerAttention:
    """Attention of queries to the keys and values of a layer, which are there of all tokens."""

    attention: AttentionBackend
    segments: Segments  # of the queries
    k_TKd: Tensor
    v_TKd: Tensor
    window: int | None
    sinks_H: Tensor | None
    sparse: SparsePrefill | None  # None: attention is whole, or has a window
    mass: float  # that block-sparse attention is to reach
    exited: EarlyExit | None  # whose keys and values these are, too
    listed_B: Tensor | None = None  # of all pieces so far, see `SparsePrefill.attend_piece`

    def of(self, piece: QueryPiece, q_QHd: Tensor) -> Tensor:
        """(Q, H, d) of a piece's queries, all of them where tokens have exited early."""
        if self.exited is not None:
            return self.exited.attend(
                self.attention, q_QHd, self.k_TKd, self.v_TKd, self.window, self.sinks_H
            )
        pack = (q_QHd, self.k_TKd, self.v_TKd)
        if self.sparse is None:
            return self.attention.prefill_piece(*pack, self.segments, piece, self.window, self.sinks_H)
        attended_QHd, listed_B = self.sparse.attend_piece(piece, *pack, self.mass, self.sinks_H)
        if listed_B is not None:
            self.listed_B = listed_B if self.listed_B is None else self.listed_B + listed_B
        return attended_QHd

    @property
    def stored(self) -> tuple[Tensor, Tensor, Segments]:
        """Keys and values that there are to be stored."""
        return self.k_TKd, self.v_TKd, self.segments if self.exited is None else self.exited.whole

    def pairs_B(self, heads: int) -> Tensor | None:
        """(B,) query-key pairs of all pieces; None for all causal ones."""
        if self.exited is not None:
            return self.exited.pairs_B(self.window)
        if self.sparse is not None:
            return None if self.listed_B is None else self.sparse.pairs(self.listed_B, heads)
        if self.window is None:
            return None
        return torch.tensor([causal_pairs(n, self.window) for n in self.segments.lengths])

    @property
    def estimated(self) -> tuple[int, ...] | None:
        """Pairs by which blocks were chosen, of each document; None for none."""
        return None if self.sparse is None else self.sparse.estimated_pairs(self.mass)
