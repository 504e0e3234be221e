"""Linear layers in float8_e4m3fn: a scale for each token and for each output channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pipeline.kernels.fused import FP8, quantize_rows

VALUES_AT_ONCE = 1 << 24  # of a weight being quantised: 64 MB as float32
MULTIPLE = 16  # of both sides of a weight, as the tensor cores want them
CAPABILITY = (8, 9)  # of the first GPUs that multiply in float8
ALIGNED = 16  # bytes, where cuBLAS wants scales of rows to begin


@dataclass(frozen=True)
class Fp8Weight:
    """A linear layer's weight: `quantised` (N, D) float8 times `scale` (1, N) float32 by output channel.

    Or those of E experts, (E, N, D) and (E, 1, N).
    """

    quantised: Tensor
    scale: Tensor

    @classmethod
    def joined(cls, weights: Sequence[Fp8Weight]) -> Fp8Weight:
        """Weights of the same number of inputs, end to end."""
        if len(weights) == 1:
            return weights[0]
        quantised_ND = torch.cat([each.quantised for each in weights])
        return cls(quantised_ND, torch.cat([each.scale for each in weights], dim=1))

    def shaped(self, shape: Sequence[int]) -> Fp8Weight:
        """The same rows as a weight of this shape, such as those of one expert after the other."""
        return Fp8Weight(self.quantised.view(*shape), self.scale.view(*shape[:-2], 1, shape[-2]))

    @classmethod
    def of(cls, weight: Tensor) -> Fp8Weight:
        """Quantise a matrix, or those of experts, some rows at a time, which bounds the memory beside it."""
        if weight.dim() == 2:
            return cls._of_matrix(weight)
        experts, outputs, inputs = weight.shape
        quantised_END = torch.empty(experts, outputs, inputs, dtype=FP8, device=weight.device)
        scale_E1N = torch.empty(experts, 1, outputs, dtype=torch.float32, device=weight.device)
        for expert in range(experts):
            own = cls._of_matrix(weight[expert].contiguous())
            quantised_END[expert], scale_E1N[expert] = own.quantised, own.scale
        return cls(quantised_END, scale_E1N)

    @classmethod
    def _of_matrix(cls, weight_ND: Tensor) -> Fp8Weight:
        outputs, inputs = weight_ND.shape
        if outputs % MULTIPLE or inputs % MULTIPLE:
            raise ValueError(f"FP8 needs a weight whose sides divide by {MULTIPLE}, got {outputs} x {inputs}")
        quantised_ND = torch.empty(outputs, inputs, dtype=FP8, device=weight_ND.device)
        scale_1N = torch.empty(1, outputs, dtype=torch.float32, device=weight_ND.device)
        rows = max(1, VALUES_AT_ONCE // inputs)
        _one(weight_ND.device)  # now: made while a CUDA graph is captured, it would be lost with the graph
        for start in range(0, outputs, rows):
            part = slice(start, start + rows)
            values, scale = quantize_rows(weight_ND[part])
            quantised_ND[part], scale_1N[0, part] = values, scale[:, 0]
        return cls(quantised_ND, scale_1N)


def fp8_linear(
    x_fp8_TD: Tensor,
    x_scale_T1: Tensor,
    weight: Fp8Weight,
    bias_N: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out_TN: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias, (T, N), for any number of tokens: rows need no padding.

    Written to `out_TN`, contiguous and of type `out_dtype`, if there is one.
    On a GPU `out_dtype` must be bfloat16, which is all that torch's row-wise scaling gives in every version.
    Fast accumulation keeps sums of products in the tensor cores' own precision, a little below float32.
    """
    into: dict[str, Tensor] = {} if out_TN is None else {"out": out_TN}
    if x_scale_T1.data_ptr() % ALIGNED:  # as that of some rows of a larger tensor may be
        x_scale_T1 = x_scale_T1.clone()
    return torch._scaled_mm(
        x_fp8_TD,
        weight.quantised.t(),
        scale_a=x_scale_T1,
        scale_b=weight.scale,
        bias=None if bias_N is None else bias_N.to(out_dtype),
        out_dtype=out_dtype,
        use_fast_accum=True,
        **into,
    )


def fp8_product(x_fp8_TD: Tensor, weight: Fp8Weight) -> Tensor:
    """x @ weight.T in bfloat16, (T, N), without the scales of either, for whoever applies them later.

    Of few rows torch computes this faster than `fp8_linear`. No sum overflows: 448 * 448 * D is far from
    bfloat16's largest number.
    """
    one = _one(x_fp8_TD.device)
    return torch._scaled_mm(
        x_fp8_TD,
        weight.quantised.t(),
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


@cache
def _one(device: torch.device) -> Tensor:
    """A scale for a whole matrix."""
    return torch.ones((), dtype=torch.float32, device=device)


def fp8_available(device: torch.device, *, slow_cpu: bool = False) -> str | None:
    """None if `fp8_linear` runs on `device`, else why not.

    A CPU can run it, far slower than its own types, so it counts only when `slow_cpu` asks for it.
    """
    if device.type == "cpu":
        return None if slow_cpu else "FP8 needs an NVIDIA GPU, and on a CPU would only be slower"
    if device.type != "cuda" or torch.version.hip:
        return f"FP8 needs an NVIDIA GPU, and {device} is none"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        needed, has = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        return f"FP8 needs a GPU of compute capability {needed} or more; {name} has {has}"
    return None
