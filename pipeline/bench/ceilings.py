"""What the device can do at best, measured in the same run as what is compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.bench.flops import Passes, attention_flops, passes_flops
from pipeline.kernels.segments import Segments
from pipeline.model.loading import LoadedModel
from pipeline.model.shape import ModelShape

LONGEST_TRIAL_S = 1.0
FEWEST_TRIALS = 3


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Operations a second of the model's largest matrix product and of its attention, of one length."""

    tokens: int
    matrix: float
    attention: float

    def floor_ms(self, shape: ModelShape, passes: Passes) -> float:
        """Milliseconds that a document's operations take at these rates, with nothing between them."""
        in_attention = sum(attention_flops(shape, tokens) for layers in passes for tokens, _, _ in layers)
        in_matrices = passes_flops(shape, passes) - in_attention
        return (in_matrices / self.matrix + in_attention / self.attention) * 1e3

    def as_dict(self) -> dict[str, float]:
        return {
            "tokens": self.tokens,
            "matrix_tflops": self.matrix / 1e12,
            "attention_tflops": self.attention / 1e12,
        }


@torch.inference_mode()
def measure_ceilings(model: LoadedModel, tokens: int) -> Ceilings:
    """The best of several trials each: an FFN projection of all tokens, and causal attention over them."""
    shape, adapter = model.adapter.shape, model.adapter
    options: Any = {"device": adapter.device, "dtype": adapter.dtype}
    x_TD, w_DF = torch.randn(tokens, shape.hidden, **options), torch.randn(shape.hidden, shape.ffn, **options)
    matrix_s = _best_seconds(lambda: x_TD @ w_DF, adapter.device)
    q, k, v = (
        torch.randn(tokens, heads, shape.head_dim, **options)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    segments = Segments.of([tokens], adapter.device)
    attention_s = _best_seconds(lambda: model.attention.prefill(q, k, v, segments), adapter.device)
    return Ceilings(
        tokens=tokens,
        matrix=2 * tokens * shape.hidden * shape.ffn / matrix_s,
        attention=attention_flops(shape, tokens) / attention_s,
    )


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    best, began, trials = float("inf"), time.perf_counter(), 0
    run()
    while trials < FEWEST_TRIALS or (time.perf_counter() - began < LONGEST_TRIAL_S and trials < 50):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - started)
        trials += 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
