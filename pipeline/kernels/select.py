"""From scores to the set of tokens that is kept, for all documents of a pack at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.kernels.segments import Segments


def mass_mask(scores_T: Tensor, segments: Segments, eta: float) -> Tensor:
    """The smallest set of tokens a document whose scores reach the share `eta` of the document's total.

    Scores are non-negative, and `eta` is below 1: from 1 on, a caller keeps all without asking, since
    a floating-point sum reaches its total long before the last token. Ties go to the earlier token.
    Returns a (T,) bool mask.
    """
    scores_BL = segments.padded(scores_T, fill=-1.0)
    ordered_BL, order_BL = scores_BL.sort(dim=-1, descending=True, stable=True)
    ordered_BL = ordered_BL.double().clamp(min=0.0)
    reached_BL = ordered_BL.cumsum(-1)
    before_BL = reached_BL - ordered_BL
    keep_BL = before_BL < eta * reached_BL[:, -1:]
    return _unsorted(keep_BL, order_BL, segments)


def top_mask(scores_T: Tensor, segments: Segments, counts: Sequence[int]) -> Tensor:
    """The `counts[b]` best tokens of each document; ties go to the earlier token. (T,) bool mask."""
    scores_BL = segments.padded(scores_T, fill=float("-inf"))
    order_BL = scores_BL.sort(dim=-1, descending=True, stable=True).indices
    rank_L = torch.arange(segments.longest, device=scores_T.device)
    keep_BL = rank_L < torch.tensor(counts, device=scores_T.device)[:, None]
    return _unsorted(keep_BL, order_BL, segments)


def _unsorted(keep_BL: Tensor, order_BL: Tensor, segments: Segments) -> Tensor:
    mask_BL = torch.zeros_like(keep_BL).scatter_(1, order_BL, keep_BL)
    return mask_BL[segments.document_T, segments.index_in_document_T]
