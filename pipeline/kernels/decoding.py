"""Attention of decode steps: few queries of each row over many keys, some of which several rows may share.

Every range of keys makes parts of its queries' outputs, which are merged by their log-sum-exps: so a query
may attend to several ranges, and a long range be cut into splits that run side by side (as in FlashDecoding).
Plain torch and kernels of `triton_decoding` compute the same, in float32 inside; plain torch has float64 too.

Letters beside those of segments.py: Q queries, N ranges, O places in an order of queries, P parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.errors import first_line, is_failure
from pipeline.kernels.modules import kernels_for, kernels_on, power_of_two
from pipeline.kernels.segments import on_device

KEYS = 64  # of a range that a program looks at at a time
FEWEST_ROWS = 16  # that Triton multiplies
MOST_ROWS = 64  # queries of a range times the heads that share keys: what a program holds
MOST_SPLITS = 32  # of a range
WIDE_HEAD = 128  # dimensions, beyond which a program looks at fewer keys at a time
TOLERANCE = 0.02  # of the largest value, for a trial in bf16
# where a trial of the kernels failed, and why: a device, the type of its queries and their size
_REFUSED: dict[tuple[torch.device, torch.dtype, int], str] = {}
MOST_PROGRAMS = 8192  # by which splits are limited where ranges are many
# keys of a split at least, by how many ranges times key heads there are up to: fewer fill no device unless
# they are cut finely, of more a split that is worth its launch is longer
LEAST_KEYS = ((128, 256), (512, 1024), (1 << 30, 2048))


@dataclass(frozen=True, kw_only=True)
class Fp8Scales:
    """What keys and values in e4m3 lack, by line and key head, float32; a line is a row's, or a document's.

    A key is its float8 value times its scale plus the mean, a value is its own times its scale.
    """

    keys_LK: Tensor
    values_LK: Tensor
    means_LKd: Tensor

    @classmethod
    def ones(cls, lines: int, kv_heads: int, head_dim: int, device: torch.device) -> Self:
        """Of keys and values that are as they are."""
        keys, values = (torch.ones(lines, kv_heads, device=device) for _ in range(2))
        return cls(
            keys_LK=keys, values_LK=values, means_LKd=torch.zeros(lines, kv_heads, head_dim, device=device)
        )


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Ranges of a buffer's slots, and the queries that attend to each; tensors on the device, int32.

    Without `order_O` the queries queries_N1[n] .. queries_N1[n + 1] attend to range n, the last of them from
    the range's last slot, the one before from the slot before. With it these are places in `order_O`, which
    names the queries, and each of them sees the whole range. No query is in two ranges.
    """

    starts_N: Tensor
    used_N: Tensor
    queries_N1: Tensor
    most_queries: int  # of any range
    longest: int  # slots that a range ever has
    order_O: Tensor | None = None
    scales: Fp8Scales | None = None  # of a buffer in e4m3
    lines_N: Tensor | None = None  # of each range, in the scales


def queries_of_a_range(heads: int, kv_heads: int) -> int:
    """How many queries a program holds at most, each of all heads that share keys."""
    return max(1, MOST_ROWS // (heads // kv_heads))


def own_ranges(
    starts: Sequence[int], used: Sequence[int], queries: Sequence[int], most: int, device: torch.device
) -> Ranges:
    """Of rows' own slots, of which the queries are the last; at most `most` queries a range.

    Row b has the slots starts[b] .. starts[b] + used[b], the queries stand row by row.
    """
    pieces = [
        (start, count - asked + end, end - first)
        for start, count, asked in zip(starts, used, queries, strict=True)
        for first in range(0, asked, most)
        for end in [min(asked, first + most)]
    ]
    return _ranges(pieces, most, device)


def windowed_ranges(
    starts: Sequence[int], used: Sequence[int], queries: Sequence[int], window: int, device: torch.device
) -> Ranges:
    """As `own_ranges`, of queries that see the last `window` slots: each has a range of its own."""
    pieces = []
    for start, count, asked in zip(starts, used, queries, strict=True):
        for seen in range(count - asked + 1, count + 1):
            first = max(0, seen - window)
            pieces.append((start + first, seen - first, 1))
    return _ranges(pieces, 1, device)


def shared_ranges(
    starts: Sequence[int],
    used: Sequence[int],
    members: Sequence[Sequence[int]],
    most: int,
    device: torch.device,
) -> Ranges:
    """Of documents' slots, each with the queries that see all of them; at most `most` queries a range."""
    chunks = [
        (start, count, chunk)
        for start, count, names in zip(starts, used, members, strict=True)
        for chunk in in_chunks(names, most)
    ]
    order = [name for *_, names in chunks for name in names]
    return _ranges([(start, count, len(names)) for start, count, names in chunks], most, device, order)


def in_chunks(queries: Sequence[int], most: int) -> list[Sequence[int]]:
    """The queries of a document, at most `most` a range."""
    return [queries[first : first + most] for first in range(0, len(queries), most)]


def _ranges(
    pieces: Sequence[tuple[int, int, int]],
    most: int,
    device: torch.device,
    order: Sequence[int] | None = None,
) -> Ranges:
    """Of each piece its start, its slots, and how many queries it has, of `most` that it could have."""
    starts, used, queries = zip(*pieces, strict=True)
    return Ranges(
        starts_N=on_device(starts, device, torch.int32),
        used_N=on_device(used, device, torch.int32),
        queries_N1=on_device([0, *accumulate(queries)], device, torch.int32),
        most_queries=most,
        longest=max(used),
        order_O=None if order is None else on_device(order, device, torch.int32),
    )


def available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there are kernels for such queries, as far as can be told without importing one."""
    refused = (device, dtype, head_dim) in _REFUSED
    return kernels_on(device.type) and dtype != torch.float64 and not refused


def try_once(
    device: torch.device, dtype: torch.dtype, *, heads: int, kv_heads: int, head_dim: int
) -> str | None:
    """Why a small trial of the kernels fails on a device, on which plain torch then takes their place.

    None where they work, or where there are none.
    """
    if not available(device, dtype, head_dim):
        return _REFUSED.get((device, dtype, head_dim))
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, heads), (200, kv_heads), (200, kv_heads))
    q, k, v = (torch.randn(*size, head_dim, generator=generator).to(device, dtype) for size in sizes)
    most = queries_of_a_range(heads, kv_heads)
    own = own_ranges([90, 130, 150], [40, 3, 50], [1, 1, 2], most, device)
    shared = shared_ranges([0], [90], [[2, 0]], most, device)
    attended, kind = [(k, v, own), (k, v, shared)], _kind(q)
    try:
        made = attention(q, attended)
    except BaseException as failure:  # whatever a compiler raises
        if not is_failure(failure):
            raise
        _REFUSED[kind] = first_line(failure)
        return _REFUSED[kind]
    _REFUSED[kind] = "on trial"  # so that plain torch makes what to compare with
    exact = attention(q, attended)
    error = ((made - exact).abs().max() / exact.abs().max()).item()
    if error <= TOLERANCE:
        del _REFUSED[kind]
        return None
    _REFUSED[kind] = f"off by {error:.3g} on a trial"
    return _REFUSED[kind]


def takes(q_QHd: Tensor, k_SKd: Tensor, most_queries: int) -> bool:
    """Whether there are kernels for so many queries a range."""
    return _kernels(q_QHd) is not None and most_queries <= queries_of_a_range(q_QHd.shape[1], k_SKd.shape[1])


def attention(
    q_QHd: Tensor, attended: Sequence[tuple[Tensor, Tensor, Ranges]], sinks_H: Tensor | None = None
) -> Tensor:
    """(Q, H, d) of queries to all their ranges together; zeros for a query of none.

    Each of `attended` are keys and values (S, K, d), and ranges of their slots; of sinks see attention.py.
    """
    heads, head_dim = q_QHd.shape[1:]
    cut = _kernels(q_QHd) is not None
    counts = [_splits(ranges, k_SKd.shape[1]) if cut else (1, 1) for k_SKd, _, ranges in attended]
    shape = (len(q_QHd), heads, sum(count for count, _ in counts))
    wide = torch.promote_types(q_QHd.dtype, torch.float32)
    logs = torch.full(shape, -math.inf, dtype=wide, device=q_QHd.device)
    parts = torch.empty((*shape, head_dim), dtype=wide, device=q_QHd.device)
    first = 0
    for (k_SKd, v_SKd, ranges), (count, least) in zip(attended, counts, strict=True):
        partial_attention(q_QHd, k_SKd, v_SKd, ranges, parts, logs, first, count, least)
        first += count
    return merged(parts, logs, q_QHd.dtype, sinks_H)


def partial_attention(
    q_QHd: Tensor,
    k_SKd: Tensor,
    v_SKd: Tensor,
    ranges: Ranges,
    parts_QHPd: Tensor,
    logs_QHP: Tensor,
    first: int,
    splits: int,
    least: int,
) -> None:
    """Write what queries get of their ranges, and log2 of the sum of their weights.

    Written are the parts `first` .. `first` + `splits`, of which each stands for `least` slots or more: of an
    empty one the logarithm is -inf, and its output undefined.
    """
    kernels = _kernels(q_QHd)
    if kernels is None:
        _plain_partial(q_QHd, k_SKd, v_SKd, ranges, parts_QHPd, logs_QHP, first)
        return
    (_, heads, head_dim), kv_heads, scales = q_QHd.shape, k_SKd.shape[1], ranges.scales
    assert ranges.most_queries <= queries_of_a_range(heads, kv_heads), "more queries than a program holds"
    kernels.partial_attention_kernel[(kv_heads, splits, len(ranges.starts_N))](
        *(q_QHd, *q_QHd.stride()[:2], k_SKd, *k_SKd.stride()[:2], v_SKd, *v_SKd.stride()[:2]),
        *((None,) * 3 if scales is None else (scales.keys_LK, scales.values_LK, scales.means_LKd)),
        *(ranges.lines_N, ranges.starts_N, ranges.used_N, ranges.queries_N1, ranges.order_O),
        *(parts_QHPd, logs_QHP, first, parts_QHPd.shape[2], splits, least, kv_heads, head_dim),
        1 / (math.sqrt(head_dim) * math.log(2)),
        GROUP=heads // kv_heads,
        ROWS=power_of_two(heads // kv_heads * ranges.most_queries, FEWEST_ROWS),
        WIDTH=power_of_two(head_dim, 16),
        # within the shared memory of small GPUs
        KEYS=KEYS if q_QHd.itemsize < 4 and head_dim <= WIDE_HEAD else max(FEWEST_ROWS, KEYS // 2),
        num_warps=4,
        num_stages=3 if q_QHd.itemsize < 4 else 2,
    )


def merged(parts_QHPd: Tensor, logs_QHP: Tensor, dtype: torch.dtype, sinks_H: Tensor | None = None) -> Tensor:
    """(Q, H, d) the sum of the parts, each by its share of the weights, in which sinks have theirs."""
    kernels = _kernels(parts_QHPd)
    if kernels is None:
        totals_QHP = logs_QHP * math.log(2)
        if sinks_H is not None:
            sinks_QH1 = sinks_H.to(totals_QHP.dtype).expand(len(totals_QHP), -1)[..., None]
            totals_QHP = torch.cat([totals_QHP, sinks_QH1], dim=-1)
        shares = totals_QHP.softmax(-1).nan_to_num(0)  # of a query without ranges
        weights_QHP = shares[..., : logs_QHP.shape[-1]]
        parts_QHPd = parts_QHPd.masked_fill((weights_QHP == 0)[..., None], 0)  # which are undefined
        return torch.einsum("qhp,qhpd->qhd", weights_QHP, parts_QHPd).to(dtype)
    queries, heads, count, head_dim = parts_QHPd.shape
    out_QHd = torch.empty(queries, heads, head_dim, dtype=dtype, device=parts_QHPd.device)
    kernels.merge_kernel[(queries, heads)](
        *(parts_QHPd, logs_QHP, sinks_H, count, out_QHd, *out_QHd.stride()[:2], heads, head_dim),
        PARTS=power_of_two(count),
        WIDTH=power_of_two(head_dim),
        num_warps=4,
    )
    return out_QHd


def _splits(ranges: Ranges, kv_heads: int) -> tuple[int, int]:
    """In how many splits ranges are cut, and how many slots each has at least.

    By what is known when a step is captured: a long range beside short ones is to be cut finely.
    """
    count = len(ranges.starts_N) * kv_heads
    least = next(keys for most, keys in LEAST_KEYS if count <= most)
    splits = min(MOST_SPLITS, max(1, MOST_PROGRAMS // count), -(-ranges.longest // least))
    return splits, least


def _plain_partial(
    q_QHd: Tensor,
    k_SKd: Tensor,
    v_SKd: Tensor,
    ranges: Ranges,
    parts_QHPd: Tensor,
    logs_QHP: Tensor,
    part: int,
) -> None:
    """The same, a range at a time and whole."""
    group, scale = q_QHd.shape[1] // k_SKd.shape[1], 1 / math.sqrt(q_QHd.shape[2])
    queries = ranges.queries_N1.tolist()
    for n, (start, used) in enumerate(zip(ranges.starts_N.tolist(), ranges.used_N.tolist(), strict=True)):
        asked_Q = torch.arange(queries[n], queries[n + 1], device=q_QHd.device)
        seen_Q = used - len(asked_Q) + 1 + torch.arange(len(asked_Q), device=q_QHd.device)
        if ranges.order_O is not None:
            asked_Q, seen_Q = ranges.order_O[asked_Q].long(), torch.full_like(asked_Q, used)
        if not len(asked_Q):
            continue
        k_TKd, v_TKd = (x[start : start + used] for x in (k_SKd, v_SKd))
        if ranges.scales is not None and ranges.lines_N is not None:
            k_TKd, v_TKd = dequantised(k_TKd, v_TKd, ranges.scales, int(ranges.lines_N[n]))
        k_TKd, v_TKd = k_TKd.to(parts_QHPd.dtype), v_TKd.to(parts_QHPd.dtype)
        q_QKGd = q_QHd[asked_Q].to(k_TKd.dtype).unflatten(1, (-1, group))
        scores_QKGT = torch.einsum("qkgd,tkd->qkgt", q_QKGd, k_TKd) * scale
        unseen_QT = torch.arange(used, device=q_QHd.device) >= seen_Q[:, None]
        scores_QHT = scores_QKGT.masked_fill_(unseen_QT[:, None, None], -math.inf).flatten(1, 2)
        logs_QHP[asked_Q, :, part] = scores_QHT.logsumexp(-1) / math.log(2)
        attended_QKGd = torch.einsum(
            "qkgt,tkd->qkgd", scores_QHT.softmax(-1).unflatten(1, (-1, group)), v_TKd
        )
        parts_QHPd[asked_Q, :, part] = attended_QKGd.flatten(1, 2)


def dequantised(k_TKd: Tensor, v_TKd: Tensor, scales: Fp8Scales, line: int | Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in float32 of their float8 values; all are of one line, or each of its own, (T,)."""
    keys = k_TKd.float() * scales.keys_LK[line][..., None] + scales.means_LKd[line]
    return keys, v_TKd.float() * scales.values_LK[line][..., None]


def _kind(q_QHd: Tensor) -> tuple[torch.device, torch.dtype, int]:
    return q_QHd.device, q_QHd.dtype, q_QHd.shape[-1]


def _kernels(x: Tensor) -> Any | None:
    """The module of Triton kernels where they can run on this tensor, else None."""
    if x.dtype == torch.float64 or _kind(x) in _REFUSED:
        return None
    return kernels_for(x, "triton_decoding")
