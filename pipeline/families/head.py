"""From the residual stream to logits: the last norm, and the head, of which each rank has a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear, pad

from pipeline.families.projection import Norm
from pipeline.families.slots import LayerSlots
from pipeline.ranks.collectives import Ranks


class Head:
    """Of a loaded model; of several ranks each makes the logits of some tokens."""

    def __init__(self, model: Any, slots: LayerSlots, ranks: Ranks | None) -> None:
        self._norm = Norm(model.model.norm, slots.norm_offset)
        self._model, self._scale, self._ranks = model, slots.logits_scale, ranks

    def __call__(self, hidden_BD: Tensor) -> Tensor:
        """(B, vocabulary) logits in the model's dtype."""
        normed_BD = self._norm(hidden_BD)
        logits_BV = self._model.lm_head(normed_BD) if self._ranks is None else self._joined(normed_BD)
        return logits_BV if self._scale == 1 else logits_BV * self._scale

    def _joined(self, normed_BD: Tensor) -> Tensor:
        """Of all ranks."""
        ranks, weight_VD, vocab = self._ranks, self._model.lm_head.weight, self._model.config.vocab_size
        assert ranks is not None
        start, stop = ranks.share.range(vocab)
        own_VD = weight_VD[start:stop] if len(weight_VD) == vocab else weight_VD  # the former if it is tied
        part_BV, width = linear(normed_BD, own_VD), -(-vocab // ranks.count)
        return ranks.joined(pad(part_BV, (0, width - part_BV.shape[1])))[:, :vocab]
