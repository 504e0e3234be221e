"""The prompt's end goes on alone, and reads in later layers what the tokens before it have become so far.

A token that has left keeps the hidden state it left with; each later layer computes its keys and values from
that, as if the layers in between had added nothing. Letters: P tokens that have left, Q those that go on, T
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.families.rope import Rope
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.segments import Segments, runs
from pipeline.pruning.operations import causal_pairs


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """A pack of which each document's last tokens go on."""

    whole: Segments  # the documents as they entered the model
    live: Segments  # what goes on of each
    live_Q: Tensor  # places in the pack, ascending, as the following
    exited_P: Tensor
    hidden_PD: Tensor
    rope: Rope  # of the tokens that have left

    @classmethod
    def of(cls, whole: Segments, live: Segments, live_Q: Tensor, hidden_TD: Tensor, rope: Rope) -> Self:
        """Let all leave but the tokens at the places `live_Q`, each document's last."""
        counts = [n - left for n, left in zip(whole.lengths, live.lengths, strict=True)]
        exited_P = runs(whole.offsets[:-1], counts, whole.device)
        return cls(
            whole=whole,
            live=live,
            live_Q=live_Q,
            exited_P=exited_P,
            hidden_PD=hidden_TD[exited_P],
            rope=rope.at(exited_P),
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """EarlyExit tokens of each document."""
        return tuple(n - left for n, left in zip(self.whole.lengths, self.live.lengths, strict=True))

    def keys_values(
        self, decoder: Decoder, layer: int, k_QKd: Tensor, v_QKd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of all tokens, (T, K, d) each."""
        merged = []
        exited = decoder.keys_values(layer, self.hidden_PD, self.rope)
        for x_QKd, x_PKd in zip((k_QKd, v_QKd), exited, strict=True):
            whole = x_QKd.new_empty(self.whole.total, *x_QKd.shape[1:])
            merged.append(whole.index_copy_(0, self.live_Q, x_QKd).index_copy_(0, self.exited_P, x_PKd))
        return merged[0], merged[1]

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
