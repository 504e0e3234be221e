"""How much late queries have to do with each token, or with each block of tokens.

Attention of a window has two paths: plain torch, and on a GPU the kernels of `triton_scoring`, which take
queries and keys with a contiguous last dimension, their other strides free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from pipeline.kernels.modules import kernels_for
from pipeline.kernels.segments import Segments, on_device

SCORES_AT_ONCE = 1 << 26
AHEAD_AT_ONCE = 1 << 22  # few enough for the cache of a GPU, as they are gone through several times
JUDGES_AT_ONCE = 64


def window_importance(
    q_THd: Tensor, k_TKd: Tensor, segments: Segments, window: int | Sequence[int], *, heads: str = "mean"
) -> Tensor:
    """Attention that each token gets from its document's last `window` queries, (T,) float32.

    FlashAttention returns no weights, so they are recomputed for the window alone, which is one number or one
    a document, at least 1; a shorter document's window is all of it. Of the queries the mean is taken; of the
    query heads, as `heads` says, the "mean" too, so that each document's scores sum to one, or the "max".
    """
    scores_KT = _window_attention(q_THd, k_TKd, segments, window, heads)
    return scores_KT.amax(0) if heads == "max" else scores_KT.mean(0)


def window_importance_by_head(
    q_THd: Tensor, k_TKd: Tensor, segments: Segments, window: int | Sequence[int]
) -> Tensor:
    """The same for each key/value head, (K, T): mean over its query heads and the queries."""
    return _window_attention(q_THd, k_TKd, segments, window, "mean")


def attention_received(q_QHd: Tensor, k_TKd: Tensor, decay: float) -> Tensor:
    """(H, T) float32 attention that each key gets from the queries of the last Q of T tokens, causal, summed.

    Of a query it counts `decay` times as much as of the one after it.
    """
    (queries, tokens), kernels = (len(q_QHd), len(k_TKd)), _kernels(q_QHd)
    if kernels is None:
        return _of_document(q_QHd, k_TKd, queries, "each", decay) * queries
    segments = Segments.of((tokens,), k_TKd.device)
    options = {"decay": decay, "absent": tokens - queries, "largest": False, "by_head": True}
    mean_HT: Tensor = kernels.window_attention(q_QHd, k_TKd, segments, (queries,), **options)
    return mean_HT * queries


def look_ahead_importance(q_NSHd: Tensor, keys: Sequence[Tensor], width: int) -> Tensor:
    """Attention that one document's tokens get from each of S tokens behind them, (S, L - S) float32.

    The keys of each of N layers, (L, K, d), are those of the document and then of these S tokens, each of
    which attends to all up to itself. Averaged over `width` neighbours, it is the largest of all heads and
    layers. As many key/value heads of any layer at a time as keep the weights within `AHEAD_AT_ONCE` floats,
    at least one.
    """
    layers, queries, heads, head_dim = q_NSHd.shape
    length, kv_heads = len(keys[0]), keys[0].shape[1]
    # key/value heads of all layers, and the queries of the heads that share each of them
    q_UQd = (
        q_NSHd.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(layers * kv_heads, -1, head_dim)
    )
    keys_U = [k_LKd[:, head] for k_LKd in keys for head in range(kv_heads)]
    future_SS = torch.ones(queries, queries, dtype=torch.bool, device=q_NSHd.device).triu(1)
    largest_SL = q_NSHd.new_zeros((queries, length - queries), dtype=torch.float32)
    at_once = max(1, AHEAD_AT_ONCE * kv_heads // (heads * queries * length))
    for first in range(0, len(keys_U), at_once):
        chunk = slice(first, first + at_once)
        k_UdL = torch.stack(keys_U[chunk]).transpose(1, 2)
        scores_UGSL = _products_fp32(q_UQd[chunk], k_UdL).unflatten(1, (-1, queries))
        scores_UGSL.mul_(1 / math.sqrt(head_dim))
        scores_UGSL[..., length - queries :].masked_fill_(future_SS, -math.inf)
        weights_XSL = scores_UGSL.softmax(-1)[..., : length - queries].flatten(0, 1)
        largest_SL = torch.maximum(largest_SL, smoothed(weights_XSL, width).amax(0))
    return largest_SL


def received_attention(q_THd: Tensor, k_TKd: Tensor, segments: Segments, judges: int) -> Tensor:
    """How much of the attention of later tokens each token gets, relative to who picks none, (T,) float32.

    Of each document up to `judges` tokens, evenly spaced and the last among them, judge those that stand at
    least as far before them as one judge before the next: by their softmax attention, mean over heads, times
    the number of tokens that they attend to. The mean over a token's judges; infinite for who has none.
    """
    apart, kernels = [-(-length // judges) for length in segments.lengths], _kernels(q_THd)
    apart_B, document_T = on_device(apart, q_THd.device), segments.document_T
    judges_B = (segments.lengths_B - 1) // apart_B + 1
    if kernels is None:
        documents = zip(segments.ranges(), apart, strict=True)
        sums_T = torch.cat([_judged(q_THd[a:b], k_TKd[a:b], step) for (a, b), step in documents])
    else:
        windows = (judges,) * len(segments)
        means_KT = kernels.window_attention(q_THd, k_TKd, segments, windows, largest=False, apart=apart)
        sums_T = means_KT.mean(0) * judges_B[document_T]
    # a document's judges but those that are as near to a token as one to the next, or before it
    left_T = segments.lengths_B[document_T] - 1 - segments.index_in_document_T
    counts_T = left_T // apart_B[document_T]
    return torch.where(counts_T > 0, sums_T / counts_T, math.inf)


def _judged(q_LHd: Tensor, k_LKd: Tensor, apart: int) -> Tensor:
    """(L,) what the judges of one document give each token, in plain torch; one stands `apart` from the next.

    Some judges at a time, as `SCORES_AT_ONCE` allows, and for these the keys up to the last of them.
    """
    length, heads, head_dim = q_LHd.shape
    index_L, first = torch.arange(length, device=q_LHd.device), (length - 1) % apart
    k_KdL, sums_L = k_LKd.permute(1, 2, 0), torch.zeros(length, device=q_LHd.device)
    rows = max(1, min(JUDGES_AT_ONCE, SCORES_AT_ONCE // (heads * length)))
    for start in range(first, length, rows * apart):
        at_R = index_L[start : start + rows * apart : apart]
        seen = start + (len(at_R) - 1) * apart + 1  # up to the last of these judges
        q_KQd = q_LHd[start:seen:apart].unflatten(1, (k_LKd.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2)
        scores_KGRS = _products_fp32(q_KQd, k_KdL[..., :seen]).unflatten(1, (-1, len(at_R)))
        scores_KGRS.mul_(1 / math.sqrt(head_dim))
        # up to the first of them all judges see all
        scores_KGRS[..., start:].masked_fill_(index_L[start:seen] > at_R[:, None], -math.inf)
        weights_RS = scores_KGRS.softmax(-1).mean((0, 1)) * (at_R + 1)[:, None]
        sums_L[:seen] += weights_RS.masked_fill_(index_L[:seen] > at_R[:, None] - apart, 0.0).sum(0)
    return sums_L


def windows_of(window: int | Sequence[int], segments: Segments) -> tuple[int, ...]:
    """The window asked for of each document; raises ValueError unless there is one a document."""
    windows = (window,) * len(segments) if isinstance(window, int) else tuple(window)
    if len(windows) != len(segments):
        raise ValueError(
            f"{len(windows)} windows for {len(segments)} documents: give one number, or one each"
        )
    return windows


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


def _window_attention(
    q_THd: Tensor, k_TKd: Tensor, segments: Segments, window: int | Sequence[int], heads: str
) -> Tensor:
    """(K, T) attention of the last queries, mean over them, "mean" or "max" over heads that share keys."""
    if heads not in ("mean", "max"):
        raise ValueError(f"heads={heads!r} must be 'mean' or 'max'")
    windows, kernels = windows_of(window, segments), _kernels(q_THd)
    if kernels is not None:
        return kernels.window_attention(q_THd, k_TKd, segments, windows, largest=heads == "max")
    documents = zip(segments.ranges(), windows, strict=True)
    return torch.cat(
        [_of_document(q_THd[a:b], k_TKd[a:b], count, heads) for (a, b), count in documents], dim=1
    )


def _kernels(x: Tensor) -> Any | None:
    """The module of Triton kernels where they can run on this tensor, else None."""
    return kernels_for(x, "triton_scoring")


def _of_document(q_LHd: Tensor, k_LKd: Tensor, window: int, over_heads: str, decay: float = 1.0) -> Tensor:
    """(K, L) the same for one document, in plain torch; see `attention_received` for `decay`.

    With `over_heads` "each" it is of each query head, (H, L).
    As many key/value heads at a time as keep the weights within `SCORES_AT_ONCE` floats, at least one.
    """
    heads, head_dim = q_LHd.shape[1:]
    length, kv_heads = k_LKd.shape[:2]
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
        weights_KGQL = scores_KGQL.softmax(-1)
        if decay != 1:
            later_Q = torch.arange(window - 1, -1, -1, device=q_LHd.device)
            weights_KGQL.mul_((decay**later_Q)[:, None])
        weights_KGL = weights_KGQL.mean(2)
        if over_heads == "each":
            parts.append(weights_KGL.flatten(0, 1))
        else:
            parts.append(weights_KGL.amax(1) if over_heads == "max" else weights_KGL.mean(1))
    return torch.cat(parts)


def _products_fp32(q_KQd: Tensor, k_KdL: Tensor) -> Tensor:
    """Products (K, Q, L) accumulated and returned in float32 whatever the inputs' type."""
    if q_KQd.is_cuda and q_KQd.dtype != torch.float32:
        return torch.bmm(q_KQd, k_KdL, out_dtype=torch.float32)
    return q_KQd.float() @ k_KdL.float()
