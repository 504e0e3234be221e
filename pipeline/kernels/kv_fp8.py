"""Keys and values in e4m3: a scale for each row and key head, and keys without the row's mean key.

Keys of some families, Qwen2's for one, have biases that are far larger than what tells one key from another:
without their mean (as in SageAttention, arXiv 2410.02367) e4m3's three bits of mantissa are left for the
difference. A constant added to all keys of a row changes no weight of its softmax; where a row attends to
several ranges, each with a mean of its own, the kernel adds what it counts to the range's log-sum-exp.

Letters beside those of decoding.py: L lines of scales, one for each row or document, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.decoding import Fp8Scales, dequantised
from pipeline.kernels.fused import FP8, FP8_MAX, SMALLEST_SCALE
from pipeline.kernels.modules import kernels_for, power_of_two
from pipeline.kernels.segments import Segments

TOKENS = 128  # that a program quantises at a time
HEADROOM = 2.0  # generated tokens may be so much larger than the prompt's before they are cut off


class KvTarget(NamedTuple):
    """Where a step puts keys and values: slots of a buffer, in its type."""

    keys_SKd: Tensor
    values_SKd: Tensor
    places_B: Tensor
    scales: Fp8Scales | None = None  # of a buffer in e4m3
    lines_B: Tensor | None = None  # in the scales, of each token's row

    def put(self, k_BKd: Tensor, v_BKd: Tensor) -> None:
        """Store a token of each row."""
        if self.scales is not None and self.lines_B is not None:
            k_BKd, v_BKd = quantised(k_BKd, v_BKd, self.scales, self.lines_B.long())
        put_rows(self.keys_SKd, self.places_B, k_BKd)
        put_rows(self.values_SKd, self.places_B, v_BKd)


def put_rows(buffer_SKd: Tensor, places_T: Tensor, rows_TKd: Tensor) -> None:
    """Write rows to their places; float8 as bytes, which is how torch can copy it by index."""
    if buffer_SKd.dtype == FP8:
        buffer_SKd, rows_TKd = buffer_SKd.view(torch.uint8), rows_TKd.to(FP8).view(torch.uint8)
    buffer_SKd.index_copy_(0, places_T, rows_TKd.to(buffer_SKd.dtype))


def put_prompts(k_TKd: Tensor, v_TKd: Tensor, segments: Segments, target: KvTarget) -> None:
    """Store a pack's prompts in e4m3, each from its place at the `target` on, with scales in its line."""
    if not segments.total:  # of a layer whose keys and values a method leaves out: there is no mean
        return
    keys_SKd, values_SKd, starts_B, scales, lines_B = target
    assert scales is not None
    assert lines_B is not None
    kernels = _kernels(k_TKd)
    if kernels is None:
        own = scales_of(k_TKd, v_TKd, segments)
        scales.keys_LK[lines_B], scales.values_LK[lines_B] = own.keys_LK, own.values_LK
        scales.means_LKd[lines_B] = own.means_LKd
        places_T = starts_B[segments.document_T] + segments.index_in_document_T
        k8_TKd, v8_TKd = quantised(k_TKd, v_TKd, own, segments.document_T)
        put_rows(keys_SKd, places_T, k8_TKd)
        put_rows(values_SKd, places_T, v8_TKd)
        return
    kv_heads, head_dim = k_TKd.shape[1:]
    kernels.put_prompts_kernel[(len(segments), kv_heads, 2)](
        *(k_TKd, *k_TKd.stride()[:2], v_TKd, *v_TKd.stride()[:2], segments.cu_seqlens),
        *(keys_SKd, *keys_SKd.stride()[:2], values_SKd, *values_SKd.stride()[:2], starts_B),
        *(scales.keys_LK, scales.values_LK, scales.means_LKd, lines_B, kv_heads, head_dim, HEADROOM),
        TOKENS=TOKENS,
        WIDTH=power_of_two(head_dim),
        num_warps=8,
    )


def scales_of(k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> Fp8Scales:
    """Scales and mean keys of a pack's prompts, a line each."""
    documents = [(k_TKd[a:b].float(), v_TKd[a:b].float()) for a, b in segments.ranges()]
    means_BKd = torch.stack([keys.mean(0) for keys, _ in documents])
    # one token is its own mean, by which those that follow would all be cut off: its size is what there is
    keys = [
        keys - mean_Kd if len(keys) > 1 else keys
        for (keys, _), mean_Kd in zip(documents, means_BKd, strict=True)
    ]
    return Fp8Scales(
        keys_LK=_scale_of(keys), values_LK=_scale_of([values for _, values in documents]), means_LKd=means_BKd
    )


def _scale_of(documents: Sequence[Tensor]) -> Tensor:
    """(B, K) by which the largest magnitude of each becomes e4m3's largest, less the headroom."""
    largest_BK = torch.stack([x_TKd.abs().amax((0, 2)) for x_TKd in documents])
    return (largest_BK * (HEADROOM / FP8_MAX)).clamp_(min=SMALLEST_SCALE)


def quantised(k_TKd: Tensor, v_TKd: Tensor, scales: Fp8Scales, line_T: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in e4m3, each token's by a line of the scales."""
    keys = (k_TKd.float() - scales.means_LKd[line_T]) / scales.keys_LK[line_T][..., None]
    values = v_TKd.float() / scales.values_LK[line_T][..., None]
    return keys.clamp(-FP8_MAX, FP8_MAX).to(FP8), values.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def rounded(k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """What is left of keys and values, in their own type, once they have been in e4m3."""
    scales, line_T = scales_of(k_TKd, v_TKd, segments), segments.document_T
    keys, values = dequantised(*quantised(k_TKd, v_TKd, scales, line_T), scales, line_T)
    return keys.to(k_TKd.dtype), values.to(v_TKd.dtype)


def _kernels(x: Tensor) -> Any | None:
    """The module of Triton kernels where they can run on this tensor, else None."""
    return kernels_for(x, "triton_kernels")
