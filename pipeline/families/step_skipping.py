"""Decode steps of one row that leave feed-forward networks out, as a method's `StepSkips` says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.families.rope import Rope
from pipeline.kernels.fused import Quantised
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.pruning.capabilities import StepSkips


class StepSkipping:
    """What of a row's steps is left out; the host looks at each layer that is measured."""

    def __init__(self, decoder: Decoder, rule: StepSkips) -> None:
        self._decoder, self._rule = decoder, rule
        self._tokens = 0  # of the answer that are there, or come of the step
        self._left = 0  # networks that are to be left out yet
        self.skipped = 0  # networks that the last step left out

    def begin(self) -> None:
        """Another row goes on, which has its first token."""
        self._tokens = 1

    def step_layer_(
        self,
        layer: int,
        hidden_1D: Tensor,
        rope: Rope,
        target: KvTarget,
        attend: Callable[[Tensor], Tensor],
        normed: Quantised | None = None,
    ) -> None:
        """As `Decoder.step_layer_`, of one row, and of its feed-forward network only if it is to run."""
        assert normed is None, "no layer's last kernel makes the next one's input"
        decoder, rule = self._decoder, self._rule
        if layer == 0:
            self._tokens += 1
            self._left = self.skipped = 0
        q_1Hd, k_1Kd, v_1Kd = decoder.qkv(layer, hidden_1D, rope)
        target.put(k_1Kd, v_1Kd)
        decoder.add_attention_(layer, hidden_1D, attend(q_1Hd))
        if self._left and layer in rule.layers:
            self._left -= 1
            self.skipped += 1
            return
        measured = layer + 1 in rule.layers and self._tokens > rule.warm_up
        before_1D = hidden_1D.clone() if measured else None
        decoder.add_feed_forward_(layer, hidden_1D)
        if before_1D is not None:
            cosine = float(torch.cosine_similarity(before_1D, hidden_1D))
            self._left = rule.most if cosine >= rule.threshold else 0
