"""Plain, slow, obviously right torch for every operation that has a fast version elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.kernels.segments import Segments


def attention_weights(
    q_QHd: Tensor,
    k_TKd: Tensor,
    first_query: int,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of queries standing at indices `first_query`, ... over all keys.

    With a `window` over the last so many, the query's own among them; with sinks, a score of each head that
    no key has, the weights sum to less than one. Returns (H, Q, T) in float64; the whole matrix is held in
    memory.
    """
    groups = q_QHd.shape[1] // k_TKd.shape[1]
    q_HQd = q_QHd.double().transpose(0, 1)
    k_HTd = k_TKd.double().transpose(0, 1).repeat_interleave(groups, dim=0)
    scores_HQT = q_HQd @ k_HTd.transpose(1, 2) / math.sqrt(q_QHd.shape[-1])
    query_index = first_query + torch.arange(q_QHd.shape[0], device=q_QHd.device)
    behind_QT = query_index[:, None] - torch.arange(k_TKd.shape[0], device=k_TKd.device)
    unseen_QT = behind_QT < 0
    if window is not None:
        unseen_QT |= behind_QT >= window
    scores_HQT = scores_HQT.masked_fill(unseen_QT, -math.inf)
    if sinks_H is None:
        return scores_HQT.softmax(-1)
    sink_HQ1 = sinks_H.double()[:, None, None].expand(-1, len(q_QHd), 1)
    return torch.cat([scores_HQT, sink_HQ1], dim=-1).softmax(-1)[..., :-1]


def causal_attention(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    segments: Segments,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention within each document of a pack, (T, H, d) in float64."""
    groups = q_THd.shape[1] // k_TKd.shape[1]
    outputs = []
    for start, end in segments.ranges():
        weights_HTT = attention_weights(q_THd[start:end], k_TKd[start:end], 0, window, sinks_H)
        v_HTd = v_TKd[start:end].double().transpose(0, 1).repeat_interleave(groups, dim=0)
        outputs.append((weights_HTT @ v_HTd).transpose(0, 1))
    return torch.cat(outputs)


def window_importance(
    q_THd: Tensor, k_TKd: Tensor, segments: Segments, window: int | Sequence[int], *, heads: str = "mean"
) -> Tensor:
    """Attention that each token gets from its document's last `window` queries, (T,) in float64.

    Mean over the queries, and over heads the "mean", so that each document sums to one, or the "max". One
    window for all documents or one each.
    """
    windows = [window] * len(segments) if isinstance(window, int) else window
    scores = []
    for (start, end), count in zip(segments.ranges(), windows, strict=True):
        first = max(start, end - count)
        weights_HQT = attention_weights(q_THd[first:end], k_TKd[start:end], first_query=first - start)
        of_heads_HT = weights_HQT.mean(1)
        scores.append({"mean": of_heads_HT.mean(0), "max": of_heads_HT.amax(0)}[heads])
    return torch.cat(scores)
