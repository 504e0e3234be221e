"""Rotary embeddings of a model's layers, by the module of transformers that has their frequencies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.families.longrope import LongRope
from pipeline.families.rope import Rope, Table
from pipeline.families.slots import ONE_ROPE, LayerSlots
from pipeline.pruning.memories.key_memory import Rotation


class Rotary:
    """Of layers with these slots; `long_rope` stands for the module where there is one."""

    def __init__(self, module: Any, slots: LayerSlots, long_rope: LongRope | None) -> None:
        self._module, self._slots, self._long_rope = module, slots, long_rope

    def rope(self, hidden_TD: Tensor, positions_T: Tensor, reach_T: Tensor | None = None) -> Rope:
        """Rotary embeddings of original positions, in documents that may come to have `reach_T` tokens.

        Where queries grow with their position, by 1 + beta * log(1 + the number of whole stretches of some
        length before it), the two are the slot's (Llama 4's rule).
        """
        tables = {
            kind: self._rope_table(kind, hidden_TD, positions_T, reach_T)
            for kind in dict.fromkeys(self._slots.ropes)
            if kind is not None
        }
        if self._slots.query_growth is None:
            return Rope(tables=tables)
        beta, length = self._slots.query_growth
        scale_T = 1 + beta * torch.log1p(torch.floor(positions_T / length))
        return Rope(tables=tables, query_scale_T=scale_T.to(hidden_TD.dtype))

    def rotation(self, like: Tensor, positions: int) -> Rotation:
        """Of so many positions, from 0 on, for queries and keys of the device and type of `like`.

        Not for LongRoPE, whose tables depend on the document.
        """
        rope = self.rope(like, torch.arange(positions, device=like.device))
        return Rotation(kinds=self._slots.ropes, tables=rope.tables, query_scale_P=rope.query_scale_T)

    def _rope_table(self, kind: str, hidden_TD: Tensor, positions_T: Tensor, reach_T: Tensor | None) -> Table:
        if self._long_rope is not None:
            assert reach_T is not None, "LongRoPE, of documents whose lengths are not told"
            return self._long_rope.table(positions_T, reach_T, hidden_TD.dtype)
        of_kind = () if kind == ONE_ROPE else (kind,)
        (cos_Td,), (sin_Td,) = self._module(hidden_TD, positions_T[None], *of_kind)
        if self._slots.rope_by_halves:
            return torch.cat((cos_Td, cos_Td), dim=-1), torch.cat((sin_Td, sin_Td), dim=-1)
        return cos_Td, sin_Td
