"""The weights of a decoder layer: norms, and linear layers that read the same input as one product."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

from pipeline.errors import ModelError
from pipeline.kernels.fp8 import Fp8Weight, fp8_linear, fp8_product
from pipeline.kernels.fused import Quantised, quantize_rows, rms_norm_quantized
from pipeline.kernels.segments import end_to_end
from pipeline.kernels.step import Product, add_product_normed_

# depths of blocks between which `mixed` has queries, keys and values in fp8: there it costs next to nothing
QKV_DEPTHS = (1 / 3, 2 / 3)


class HeldAs(Enum):
    """In which numbers a linear layer's weight is held."""

    FULL = "the model's dtype"
    FP8 = "fp8"
    BOTH = "both"


@dataclass(frozen=True, kw_only=True)
class LinearPrecision:
    """How a decoder's linear layers are computed, which decides in what forms their weights are held."""

    linears: str = "auto"  # of `LINEAR_DTYPES`
    ffn: bool = False  # the FFN computes some tokens in fp8 and others not

    @property
    def uses_fp8(self) -> bool:
        return self.ffn or self.linears != "auto"

    def form(self, layer: str, depth: float) -> HeldAs:
        """What a layer of this name, as a decoder block's modules are called, is needed in.

        `depth` is that of its block, from 0 to 1.
        """
        in_ffn = ".mlp." in f".{layer}"
        if self.ffn and in_ffn:
            return HeldAs.BOTH
        # experts are most of a model's weights: of them `mixed` holds no second form
        if self.linears == "fp8" or (self.linears == "mixed" and ".experts." in layer):
            return HeldAs.FP8
        of_heads = layer.endswith(("q_proj", "k_proj", "v_proj", "qkv_proj"))
        mixed = self.linears == "mixed" and (QKV_DEPTHS[0] <= depth < QKV_DEPTHS[1] or not of_heads)
        return HeldAs.BOTH if mixed else HeldAs.FULL


IN_FULL = LinearPrecision()


def depth_of(name: str, layers: int) -> float:
    """Of a decoder block's parameter, by its name: from 0, of the first of so many blocks, to below 1."""
    return int(name.split(".layers.")[-1].split(".")[0]) / layers


def matrices(model: Any) -> dict[str, str]:
    """Parameters of a model's decoder blocks that may be held in fp8, by name.

    Linear layers' and experts', each with the name that `LinearPrecision.form` knows it by.
    """
    linear = {
        f"{name}.weight": name
        for name, each in model.named_modules()
        if type(each) is nn.Linear and ".layers." in f".{name}"
    }
    of_experts = {
        name: name for name, each in model.named_parameters() if ".experts." in name and each.dim() == 3
    }
    return linear | of_experts


class Norm:
    """A module's RMSNorm in torch's single fused kernel; its own forward makes six passes over memory."""

    def __init__(self, module: Any, offset: float = 0.0) -> None:
        """With an `offset` the module's weight is what is to be added to it; the sum is kept in float32."""
        self.weight: Tensor = module.weight
        if offset:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self.weight = self.weight.detach().to(wide) + offset
        self.eps: float = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

    def __call__(self, x: Tensor) -> Tensor:
        """In the dtype of `x`, over its last dimension."""
        if x.dtype != self.weight.dtype:
            return rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)
        return rms_norm(x, self.weight.shape, self.weight, self.eps)

    def of_heads(self, x_TNd: Tensor) -> Tensor:
        """Of each head, or over all of them together where the weight is as wide."""
        if self.weight.shape[0] == x_TNd.shape[-1]:
            return self(x_TNd)
        return self(x_TNd.flatten(1)).unflatten(1, x_TNd.shape[1:])

    def quantised(self, x_TD: Tensor) -> Quantised:
        """The same in fp8, a scale a row."""
        if x_TD.dtype != self.weight.dtype:
            return quantize_rows(self(x_TD))
        return rms_norm_quantized(x_TD, self.weight, self.eps)

    def quantised_sum_(self, total_TD: Tensor, product: Product, out: Quantised | None = None) -> Quantised:
        """Add a product to `total_TD` in place, and norm the sum in fp8; written to `out` if there is one."""
        return add_product_normed_(total_TD, product, self.weight, self.eps, out)


class Projection:
    """Linear layers that read the same input, as one: their weights lie end to end in one tensor (N, D).

    The model's own modules become views of it, so that nothing is held twice. A module whose weight was
    loaded in fp8 has that form as `fp8`, and no elements in its `weight` if there is no other.
    """

    def __init__(self, *modules: nn.Linear) -> None:
        for module in modules:
            # subclasses too: those of quantisers compute something else from their weights
            if type(module) is not nn.Linear:
                raise ModelError(f"layers of type {type(module).__name__} are not supported (plain ones are)")
        self._modules = modules
        biases = [module.bias for module in modules]
        self.bias: Tensor | None = None if biases[0] is None else torch.cat([b.data for b in biases])
        self.fp8: Fp8Weight | None = self._joined_fp8()
        self.weight: Tensor | None = self._joined_weight()

    def _joined_weight(self) -> Tensor | None:
        weights = [module.weight.data for module in self._modules]
        if not weights[0].numel():
            return None
        joined_ND = end_to_end(weights)
        for module, part in zip(self._modules, joined_ND.split([len(w) for w in weights]), strict=True):
            module.weight = nn.Parameter(part, requires_grad=False)
        return joined_ND

    def _joined_fp8(self) -> Fp8Weight | None:
        """Of all modules, if all were loaded in fp8; they give theirs up."""
        loaded = [module.__dict__.pop("weight_fp8", None) for module in self._modules]
        forms = [each for each in loaded if each is not None]
        return Fp8Weight.joined(forms) if len(forms) == len(loaded) else None

    def __call__(self, x_TD: Tensor, out_TN: Tensor | None = None) -> Tensor:
        """(T, N) in the model's dtype; written to `out_TN` if there is one."""
        assert self.weight is not None, "these weights were given up for their fp8 form"
        if out_TN is None:
            return linear(x_TD, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x_TD, self.weight.t(), out=out_TN)
        return torch.addmm(self.bias, x_TD, self.weight.t(), out=out_TN)

    @property
    def outputs(self) -> int:
        """N."""
        weight_ND = self.weight if self.fp8 is None else self.fp8.quantised
        assert weight_ND is not None
        return len(weight_ND)

    def part(self, outputs: slice) -> Projection:
        """Some of the outputs, as views of these weights."""
        view = object.__new__(Projection)
        view._modules = ()
        view.weight = None if self.weight is None else self.weight[outputs]
        view.bias = None if self.bias is None else self.bias[outputs]
        view.fp8 = (
            None if self.fp8 is None else Fp8Weight(self.fp8.quantised[outputs], self.fp8.scale[:, outputs])
        )
        return view

    def add_to_(self, total_TN: Tensor, x_TD: Tensor) -> None:
        """Add the output in place: the product's own sum is its last step, so nothing is written twice."""
        if self.bias is not None:
            total_TN += self(x_TD)
            return
        assert self.weight is not None, "these weights were given up for their fp8 form"
        total_TN.addmm_(x_TD, self.weight.t())

    def in_fp8(self, x_TD: Tensor, scale_T1: Tensor, out_TN: Tensor | None = None) -> Tensor:
        """(T, N) in bfloat16 of a quantised input; written to `out_TN` if there is one."""
        assert self.fp8 is not None, "these weights were not quantised"
        return fp8_linear(x_TD, scale_T1, self.fp8, self.bias, out_TN=out_TN)

    def write(self, given: Tensor | Quantised, out_TN: Tensor | None = None) -> Tensor:
        """(T, N), in fp8 of what is quantised; written to `out_TN` if there is one."""
        return self(given, out_TN) if isinstance(given, Tensor) else self.in_fp8(*given, out_TN)

    def unscaled(self, x: Quantised) -> Product:
        """(T, N) of a quantised input, without the scales and the bias."""
        assert self.fp8 is not None, "these weights were not quantised"
        x_TD, scale_T1 = x
        return Product(fp8_product(x_TD, self.fp8), scale_T1, self.fp8.scale, self.bias)

    def quantise(self, *, keep: bool) -> None:
        """Make the fp8 form; without `keep` the other one is given up."""
        if self.fp8 is None:
            assert self.weight is not None
            self.fp8 = Fp8Weight.of(self.weight)
        if not keep and self.weight is not None:
            for module in self._modules:
                module.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)
            self.weight = None
