"""The prompt's end goes on alone, and reads in later layers what the tokens before it have become so far.

A token that has left keeps the hidden state it left with; each later layer computes its keys and values from
that, as if the layers in between had added nothing. Letters: Q tokens that go on, T all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.families.rope import Rope
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.segments import Segments
from pipeline.pruning.operations import causal_pairs


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """A pack of which each document's last tokens go on."""

    whole: Segments  # the documents as they entered the model
    live: Segments  # what goes on of each
    live_Q: Tensor  # places in the pack, ascending
    hidden_TD: Tensor  # of all tokens, when the others left
    rope: Rope  # of all tokens

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
        k_TKd, v_TKd = decoder.keys_values(layer, self.hidden_TD, self.rope)
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
