"""How much late queries have to do with each token, or with each block of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from pipeline.kernels.segments import Segments

SCORES_AT_ONCE = 1 << 26


def window_importance(q_THd: Tensor, k_TKd: Tensor, segments: Segments, window: int) -> Tensor:
    """Attention that each token gets from its document's last `window` queries, (T,) float32.

    FlashAttention returns no weights, so they are recomputed for the window alone. The mean is taken over
    heads and queries: each document's scores sum to one. As many key/value heads at a time as keep the
    weights within `SCORES_AT_ONCE` floats, at least one.
    """
    scores_T = torch.empty(q_THd.shape[0], dtype=torch.float32, device=q_THd.device)
    for start, end in segments.ranges():
        scores_T[start:end] = _window_attention(q_THd[start:end], k_TKd[start:end], window).mean(0)
    return scores_T


def window_importance_by_head(q_THd: Tensor, k_TKd: Tensor, segments: Segments, window: int) -> Tensor:
    """The same for each key/value head, (K, T): mean over its query heads and the queries."""
    parts = [_window_attention(q_THd[a:b], k_TKd[a:b], window) for a, b in segments.ranges()]
    return torch.cat(parts, dim=1)


def last_query_products(q_THd: Tensor, k_TKd: Tensor, segments: Segments) -> Tensor:
    """Sum over heads of q.k, without softmax, of each document's last query, (T,) float32."""
    parts = []
    for start, end in segments.ranges():
        q_KGd = q_THd[end - 1].float().unflatten(0, (k_TKd.shape[1], -1))
        # the sum over heads that share keys is taken before the product: one pass over the keys
        parts.append(torch.einsum("kd,tkd->t", q_KGd.sum(1), k_TKd[start:end].float()))
    return torch.cat(parts)


def smoothed(scores_NT: Tensor, width: int) -> Tensor:
    """Running mean over `width` neighbours of a document's scores (N, T), zeros beyond its ends."""
    return avg_pool1d(scores_NT, width, stride=1, padding=width // 2)[..., : scores_NT.shape[-1]]


def unit_keys(k_LKd: Tensor, unit: int) -> Tensor:
    """Mean key of every `unit` tokens of one document, (U, K, d); the last unit may be shorter."""
    length = k_LKd.shape[0]
    full = length // unit * unit
    means = [k_LKd[:full].unflatten(0, (-1, unit)).mean(1, dtype=torch.float32)] if full else []
    if full < length:
        means.append(k_LKd[full:].mean(0, keepdim=True, dtype=torch.float32))
    return torch.cat(means).to(k_LKd.dtype)


def block_scores(q_Hd: Tensor, units_UKd: Tensor, units_per_block: int) -> Tensor:
    """Each block's best unit, by the mean over heads of |q.k|, (N,) float32."""
    q_KGd = q_Hd.float().unflatten(0, (units_UKd.shape[1], -1))
    products_KGU = q_KGd @ units_UKd.float().permute(1, 2, 0)
    scores_U = products_KGU.abs().mean(dim=(0, 1))
    return pad(scores_U, (0, -len(scores_U) % units_per_block)).unflatten(0, (-1, units_per_block)).amax(1)


def block_means(scores_L: Tensor, block: int) -> Tensor:
    """Mean score of every `block` tokens of one document, (N,); the last block may be shorter."""
    length = len(scores_L)
    sums_N = pad(scores_L, (0, -length % block)).unflatten(0, (-1, block)).sum(1)
    counts_N = torch.full_like(sums_N, block)
    counts_N[-1] = length - (len(sums_N) - 1) * block
    return sums_N / counts_N


def _window_attention(q_LHd: Tensor, k_LKd: Tensor, window: int) -> Tensor:
    """(K, L) attention of one document's last queries, mean over them and the heads that share keys."""
    length, heads, head_dim = q_LHd.shape
    kv_heads = k_LKd.shape[1]
    window = min(window, length)
    # (L, H, d) -> (K, G * Q, d): the query heads that share a key head stand beside each other
    q_KQd = q_LHd[-window:].reshape(window, kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
    k_KdL = k_LKd.permute(1, 2, 0)
    future_QQ = torch.ones(window, window, dtype=torch.bool, device=q_LHd.device).triu(1)
    at_once = max(1, SCORES_AT_ONCE * kv_heads // (heads * window * length))
    parts = []
    for head in range(0, kv_heads, at_once):
        chunk = slice(head, head + at_once)
        scores_KGQL = _products_fp32(q_KQd[chunk], k_KdL[chunk]).unflatten(1, (-1, window))
        scores_KGQL.mul_(1 / math.sqrt(head_dim))
        scores_KGQL[..., length - window :].masked_fill_(future_QQ, -math.inf)
        parts.append(scores_KGQL.softmax(-1).mean(dim=(1, 2)))
    return torch.cat(parts)


def _products_fp32(q_KQd: Tensor, k_KdL: Tensor) -> Tensor:
    """Products (K, Q, L) accumulated and returned in float32 whatever the inputs' type."""
    if q_KQd.is_cuda and q_KQd.dtype != torch.float32:
        return torch.bmm(q_KQd, k_KdL, out_dtype=torch.float32)
    return q_KQd.float() @ k_KdL.float()
