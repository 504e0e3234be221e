"""Attention in the layers of a prefill: of all tokens, or of the prompt's end, which goes on alone.

After an early exit the end reads in later layers what the tokens before it have become so far.
A token that has left keeps the hidden state it left with; each later layer computes its keys and values from
that, as if the layers in between had added nothing, or by maps that were fitted for it. Letters: Q tokens
that go on, T all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.families.projection import Projection
from pipeline.families.rope import Rope
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.query_pieces import QueryPiece
from pipeline.kernels.segments import Segments
from pipeline.kernels.sparse_prefill import SparsePrefill
from pipeline.pruning.operations import causal_pairs


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """A pack of which each document's last tokens go on."""

    whole: Segments  # the documents as they entered the model
    live: Segments  # what goes on of each
    live_Q: Tensor  # places in the pack, ascending
    hidden_TD: Tensor  # of all tokens, when the others left
    rope: Rope  # of all tokens
    maps: Mapping[int, Projection]  # of layers whose keys and values are not made as usual: see exit_maps.py

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each document that have left."""
        return tuple(n - left for n, left in zip(self.whole.lengths, self.live.lengths, strict=True))

    def keys_values(
        self, decoder: Decoder, layer: int, k_QKd: Tensor, v_QKd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of all tokens, (T, K, d) each.

        Those of the few that go on are computed from what they were too, and overwritten: so nothing is
        gathered of the others, who may be as many as fit the memory.
        """
        mapped = self.maps.get(layer)
        fp8 = None if mapped is None else False
        k_TKd, v_TKd = decoder.keys_values(layer, self.hidden_TD, self.rope, fp8, mapped)
        for whole, live in ((k_TKd, k_QKd), (v_TKd, v_QKd)):
            whole.index_copy_(0, self.live_Q, live)
        return k_TKd, v_TKd

    def attend(
        self,
        attention: AttentionBackend,
        q_QHd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Attention of the tokens that go on to all before them, or to the last `window`, (Q, H, d)."""
        starts, whole = self.whole.offsets[:-1], self.whole
        slots = DecodeSlots.of(starts, whole.lengths, whole.total, whole.device, self.live.lengths)
        return attention.decode(q_QHd, k_TKd, v_TKd, slots.within(window), sinks_H)

    def pairs_B(self, window: int | None = None) -> Tensor:
        """(B,) query-key pairs of each document, of what `attend` computes."""
        lengths = zip(self.whole.lengths, self.live.lengths, strict=True)
        pairs = [causal_pairs(n, window) - causal_pairs(n - left, window) for n, left in lengths]
        return torch.tensor(pairs)


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
