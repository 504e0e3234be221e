"""How much attention each token gets from an observation window of late queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.kernels.segments import Segments


def window_importance(q_THd: Tensor, k_TKd: Tensor, segments: Segments, window: int) -> Tensor:
    """Attention that each token gets from its document's last `window` queries, (T,) float32.

    FlashAttention returns no weights, so they are recomputed for the window alone. The mean is taken over
    heads and queries: each document's scores sum to one. One key/value head at a time, so that memory
    stays at (H / K) * window * L floats.
    """
    scores_T = torch.empty(q_THd.shape[0], dtype=torch.float32, device=q_THd.device)
    for start, end in segments.ranges():
        scores_T[start:end] = _document_importance(q_THd[start:end], k_TKd[start:end], window)
    return scores_T


def _document_importance(q_THd: Tensor, k_TKd: Tensor, window: int) -> Tensor:
    length, heads, head_dim = q_THd.shape
    kv_heads = k_TKd.shape[1]
    window = min(window, length)
    # (T, H, d) -> (K, G * Q, d): the query heads that share a key head stand beside each other
    q_KQd = q_THd[-window:].reshape(window, kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
    future_QQ = torch.ones(window, window, dtype=torch.bool, device=q_THd.device).triu(1)
    total_T = torch.zeros(length, dtype=torch.float32, device=q_THd.device)
    for head in range(kv_heads):
        scores_GQT = _scores_fp32(q_KQd[head], k_TKd[:, head]).unflatten(0, (-1, window))
        scores_GQT.mul_(1 / math.sqrt(head_dim))
        scores_GQT[:, :, length - window :].masked_fill_(future_QQ, -math.inf)
        total_T += scores_GQT.softmax(-1).sum(dim=(0, 1))
    return total_T / (heads * window)


def _scores_fp32(q_Qd: Tensor, k_Td: Tensor) -> Tensor:
    """Products (Q, T) accumulated and returned in float32 whatever the inputs' type."""
    if q_Qd.is_cuda and q_Qd.dtype != torch.float32:
        return torch.mm(q_Qd, k_Td.T, out_dtype=torch.float32)
    return q_Qd.float() @ k_Td.float().T
