"""What a method selects, as the rank that leads has it: sums of the others may differ in their last bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.pruning.base import Selection
from pipeline.ranks.collectives import Ranks

FIELDS = ("live", "ffn", "ffn_fp8")


def agreed(selection: Selection, ranks: Ranks, tokens: int, device: torch.device) -> Selection:
    """The first rank's selection among so many tokens; all ranks must have one of the same form."""
    there = [name for name in FIELDS if getattr(selection, name) is not None]
    if not there:
        return selection
    marks_T = torch.zeros(tokens, dtype=torch.uint8, device=device)
    for bit, name in enumerate(there):
        indices: Tensor = getattr(selection, name)
        marks_T[indices] |= 1 << bit
    ranks.from_first_(marks_T)
    if ranks.leads:
        return selection
    chosen: dict[str, Any] = {name: (marks_T & 1 << n).nonzero().flatten() for n, name in enumerate(there)}
    return replace(selection, **chosen)
