"""What the device can do at best, measured in the same run as what is compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.bench.timing import best_seconds
from pipeline.errors import ConfigError
from pipeline.kernels.fp8 import Fp8Weight, fp8_linear
from pipeline.kernels.fused import quantize_rows
from pipeline.kernels.segments import Segments
from pipeline.model.loading import LoadedModel
from pipeline.pruning.operations import (
    Passes,
    attended_flops,
    attention_flops,
    ffn_flops,
    fp8_tokens,
    passes_flops,
    projections_flops,
)
from pipeline.pruning.shape import ModelShape

MOST_TOKENS = 131_072  # that rates are measured at: trials of more take minutes, at the same rates


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Tera-operations a second of the model's largest matrix product and of its attention, for one pack."""

    tokens: int  # of all documents
    matrix_tflops: float
    attention_tflops: float
    fp8_matrix_tflops: float | None = None  # where the device can

    def floor_ms(self, shape: ModelShape, passes: Passes, linears_in_fp8: bool = False) -> float:
        """Milliseconds that a document's operations take at these rates, with nothing between them."""
        works = [work for layers in passes for work in layers]
        in_attention = sum(attended_flops(shape, work) for work in works)
        in_fp8 = sum(fp8_tokens(passes, everywhere=linears_in_fp8)) * ffn_flops(shape)
        if linears_in_fp8:
            in_fp8 += sum(projections_flops(shape, work) for work in works)
        in_matrices = passes_flops(shape, passes) - in_attention - in_fp8
        picoseconds = in_matrices / self.matrix_tflops + in_attention / self.attention_tflops
        return (picoseconds + in_fp8 / (self.fp8_matrix_tflops or self.matrix_tflops)) / 1e9


@torch.inference_mode()
def measure_ceilings(model: LoadedModel, lengths: Sequence[int]) -> Ceilings:
    """The best of several trials each: an FFN projection of all tokens, and causal attention over them.

    `lengths` are the documents', each of which attends within itself; of long ones a part stands for all.
    """
    shape, decoder, all_tokens = model.decoder.shape, model.decoder, sum(lengths)
    lengths = [min(length, max(1, MOST_TOKENS // len(lengths))) for length in lengths]
    tokens = sum(lengths)
    options: Any = {"device": decoder.device, "dtype": decoder.dtype}
    x_TD, w_DF = torch.randn(tokens, shape.hidden, **options), torch.randn(shape.hidden, shape.ffn, **options)
    matrix_s = best_seconds(lambda: x_TD @ w_DF, decoder.device)
    q, k, v = random_qkv(shape, tokens, **options)
    tera_operations = 2 * tokens * shape.hidden * shape.ffn / 1e12
    try:
        model.check_fp8()
    except ConfigError:
        fp8_tflops = None
    else:
        weight, quantised = Fp8Weight.of(w_DF.T.contiguous()), quantize_rows(x_TD)
        fp8_tflops = tera_operations / best_seconds(lambda: fp8_linear(*quantised, weight), decoder.device)
    segments = Segments.of(lengths, decoder.device)
    attention_s = best_seconds(lambda: model.attention.prefill(q, k, v, segments), decoder.device)
    return Ceilings(
        tokens=all_tokens,
        matrix_tflops=tera_operations / matrix_s,
        attention_tflops=sum(attention_flops(shape, length) for length in lengths) / attention_s / 1e12,
        fp8_matrix_tflops=fp8_tflops,
    )


def random_qkv(shape: ModelShape, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries (T, H, d), keys and values (T, K, d), the same each time."""
    options: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device, "dtype": dtype}
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [torch.randn(tokens, each, shape.head_dim, **options) for each in heads]
