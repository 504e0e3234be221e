"""LongRoPE (arXiv 2402.13753): frequencies of their own for documents that outgrow the original context."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.families.rope import Table


class LongRope:
    """Both sets of frequencies, between which each document chooses by itself, once for all of its tokens."""

    def __init__(self, short_F: Tensor, long_F: Tensor, scale: float, original: int) -> None:
        """Up to the length `original` a document has the short set; cosines and sines are scaled."""
        self._short_F, self._long_F, self._scale, self._original = short_F, long_F, scale, original

    @classmethod
    def of(cls, config: PreTrainedConfig, device: torch.device) -> Self | None:
        """As transformers computes them; None for a model that has another RoPE."""
        parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        if parameters.get("rope_type") != "longrope":
            return None
        original = parameters["original_max_position_embeddings"]
        frequencies = ROPE_INIT_FUNCTIONS["longrope"]
        short_F, scale = frequencies(config, device)
        long_F, _ = frequencies(config, device, seq_len=original + 1)
        return cls(short_F, long_F, scale, original)

    def table(self, positions_T: Tensor, reach_T: Tensor, dtype: torch.dtype) -> Table:
        """Of tokens whose documents may come to have `reach_T` tokens, answers among them."""
        is_long_T1 = (reach_T > self._original)[:, None]
        angles_TF = positions_T[:, None].float() * torch.where(is_long_T1, self._long_F, self._short_F)
        angles_Td = torch.cat((angles_TF, angles_TF), dim=-1)
        cos_Td, sin_Td = (made * self._scale for made in (angles_Td.cos(), angles_Td.sin()))
        return cos_Td.to(dtype), sin_Td.to(dtype)
