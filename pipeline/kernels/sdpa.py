"""Attention of single documents through torch's scaled_dot_product_attention, with windows and sinks.

A sink is a number of each query head that takes part in the softmax as the score of one more key, whose value
is zero. SDPA does not return the log-sum-exp by which it could be applied afterwards, so that it gets that
key: queries and keys become `SINK_WIDTH` dimensions wider, of which the first holds the sink in each query
and one in the key alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

# queries that are taken at once where they need a mask, and its pairs, if the fewest queries do not have more
FEWEST_MASKED, MOST_MASKED, MASKED_PAIRS = 256, 1024, 1 << 22
SINK_WIDTH = 8  # dimensions: heads remain as wide as fused kernels want them


def masked_at_once(seen: int) -> int:
    """Queries that are taken at once where a mask is made, of which each sees at most `seen` keys."""
    return max(FEWEST_MASKED, min(MOST_MASKED, MASKED_PAIRS // seen))


def sdpa_last(
    q_QHd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """(Q, H, d) of a document's last Q tokens over all T, or of these the last `window` each.

    SDPA's own causal mask would take them for the first ones, so that they get a mask, some at a time.
    """
    queries, tokens = len(q_QHd), len(k_TKd)
    if window is not None and window >= tokens:
        window = None
    if window is None and queries in (1, tokens):
        return sdpa(q_QHd, k_TKd, v_TKd, causal=queries > 1, sinks_H=sinks_H)
    at_once = masked_at_once(window or tokens)
    attended_QHd = v_TKd.new_empty(*q_QHd.shape[:2], v_TKd.shape[2])
    for first in range(0, queries, at_once):
        end = min(first + at_once, queries)
        reached = 0 if window is None else max(0, tokens - queries + first - window + 1)
        keys = slice(reached, tokens - queries + end)
        attended_QHd[first:end] = _masked(q_QHd[first:end], k_TKd[keys], v_TKd[keys], window, sinks_H)
    return attended_QHd


def _masked(
    q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, window: int | None, sinks_H: Tensor | None
) -> Tensor:
    queries, tokens = len(q_QHd), len(k_TKd)
    seen_QT = torch.ones(queries, tokens, dtype=torch.bool, device=q_QHd.device).tril_(tokens - queries)
    if window is not None:
        seen_QT.triu_(tokens - queries - window + 1)
    return sdpa(q_QHd, k_TKd, v_TKd, causal=False, seen_QT=seen_QT, sinks_H=sinks_H)


def sdpa(
    q_QHd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    *,
    causal: bool,
    seen_QT: Tensor | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """(Q, H, d) of one document, by SDPA, which wants (1, heads, tokens, d)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QHd, k_TKd, v_TKd))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (q.dtype == torch.float32 or seen_QT is not None):
        # no fused CUDA kernel takes grouped heads so, and the plain one would hold the Q x T matrix
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    if sinks_H is None:
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=seen_QT, is_causal=causal, enable_gqa=grouped
        )
    else:
        attended = attention_with_sinks(q, k, v, sinks_H, causal=causal, seen=seen_QT, enable_gqa=grouped)
    return attended.squeeze(0).transpose(0, 1)


def attention_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks_H: Tensor,
    *,
    causal: bool = False,
    seen: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA of queries (..., H, Q, d) and keys (..., K, T, d) with a sink of each query head.

    The sinks' key comes first. With `causal` a query comes before the others too, so that each sees it.
    """
    head_dim = q.shape[-1]
    scale = 1 / math.sqrt(head_dim)
    q, k, v = pad(q, (0, SINK_WIDTH, int(causal), 0)), *(pad(x, (0, SINK_WIDTH, 1, 0)) for x in (k, v))
    q[..., head_dim] = (sinks_H / scale).to(q.dtype)[:, None]
    k[..., 0, head_dim] = 1
    if seen is not None:
        seen = pad(seen, (1, 0), value=True)
    attended = scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=enable_gqa
    )
    return attended[..., int(causal) :, :head_dim]
