"""From scores to the set of tokens that is kept, for all documents of a pack at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.kernels.segments import Segments, on_device


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


def top_mask(scores_T: Tensor, segments: Segments, counts: Sequence[int] | Tensor) -> Tensor:
    """The `counts[b]` best tokens of each document; ties go to the earlier token. (T,) bool mask.

    Counts that only the device knows are given as a tensor, (B,), so that the host need not wait for them.
    """
    scores_BL = segments.padded(scores_T, fill=float("-inf"))
    order_BL = scores_BL.sort(dim=-1, descending=True, stable=True).indices
    rank_L = torch.arange(segments.longest, device=scores_T.device)
    count_B = counts if isinstance(counts, Tensor) else on_device(counts, scores_T.device)
    keep_BL = rank_L < count_B[:, None]
    return _unsorted(keep_BL, order_BL, segments)


def top_share_mask(scores_T: Tensor, segments: Segments, share: float, of_B: Tensor) -> Tensor:
    """As `top_mask`, of `share` of so many of each document's tokens, (B,), rounded up."""
    return top_mask(scores_T, segments, (share * of_B.double()).ceil())


def _unsorted(keep_BL: Tensor, order_BL: Tensor, segments: Segments) -> Tensor:
    mask_BL = torch.zeros_like(keep_BL).scatter_(1, order_BL, keep_BL)
    return mask_BL[segments.document_T, segments.index_in_document_T]


def top_indices(scores_NL: Tensor, count: int) -> Tensor:
    """Of each row the `count` best places, ascending, (N, count); ties go to the earlier one."""
    order_NL = scores_NL.sort(dim=-1, descending=True, stable=True).indices
    return order_NL[:, :count].sort(dim=-1).values


def top_blocks(scores_N: Tensor, count: int) -> Tensor:
    """The `count` best blocks of one document, ascending, the first and the last among them; ties go to
    the earlier block."""
    forced_N = scores_N.clone()
    forced_N[[0, -1]] = float("inf")
    return forced_N.sort(descending=True, stable=True).indices[: max(count, 2)].sort().values


def tokens_of_blocks(blocks_N: Tensor, block: int, length: int) -> Tensor:
    """Ascending token indices of ascending blocks that end with the last one of a document of `length`."""
    tokens = (blocks_N[:, None] * block + torch.arange(block, device=blocks_N.device)).flatten()
    # only the last block may be shorter: cut by a number that the host knows, so nothing waits
    return tokens[: len(tokens) - (-length % block)]
