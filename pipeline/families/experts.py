"""A feed-forward network of experts, of which each token passes a few.

Letters are those of kernels/expert_products.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.kernels.expert_products import Groups, clamped_swiglu, grouped_fp8_product, grouped_product
from pipeline.kernels.fp8 import Fp8Weight
from pipeline.kernels.fused import Quantised, gated, gated_quantized, quantize_rows


class ExpertProjection:
    """One matrix of each expert, (E, N, D), which stays the model's own, and their biases, if any.

    A parameter that was loaded in fp8 has that form as `fp8`, and no elements if there is no other.
    """

    def __init__(self, module: Any, name: str, *, inputs_first: bool = False) -> None:
        """Of a module's parameter (E, N, D), or (E, D, N) with `inputs_first`."""
        self._module, self._name = module, name
        parameter = getattr(module, name).data
        self.weight: Tensor | None = None
        if parameter.numel():
            self.weight = parameter.transpose(1, 2) if inputs_first else parameter
        self.fp8: Fp8Weight | None = module.__dict__.pop(f"{name}_fp8", None)
        bias = getattr(module, f"{name}_bias", None)
        self.bias_EN: Tensor | None = None if bias is None else bias.detach()

    def __call__(self, given: Tensor | Quantised, groups: Groups) -> Tensor:
        """(S, N) without the biases, of rows in the order of their experts, in fp8 if they are quantised."""
        if isinstance(given, Tensor):
            assert self.weight is not None, "these weights were given up for their fp8 form"
            return grouped_product(given, self.weight, groups.ends_E)
        assert self.fp8 is not None, "these weights were not quantised"
        return grouped_fp8_product(*given, self.fp8, groups.ends_E)

    def quantise(self, *, keep: bool) -> None:
        """Make the fp8 form; without `keep` the other one is given up."""
        if self.fp8 is None:
            assert self.weight is not None
            self.fp8 = Fp8Weight.of(self.weight)
        if not keep and self.weight is not None:
            setattr(self._module, self._name, nn.Parameter(self.weight.new_empty(0), requires_grad=False))
            self.weight = None


class Experts:
    """A router and its experts."""

    def __init__(
        self,
        router: Any,
        gate_up: ExpertProjection,
        down: ExpertProjection,
        *,
        per_token: int,
        sum_to_one: bool,
        gate: str,
    ) -> None:
        """`router` has a weight (E, D) and perhaps a bias (E,).

        With `sum_to_one` the weights of a token's experts do. `gate` is as in `gated`, or clamped_swiglu, of
        experts with biases; those of the others have none.
        """
        self._router_ED = router.weight.detach()
        bias = getattr(router, "bias", None)
        self._router_bias_E = None if bias is None else bias.detach()
        self.gate_up, self.down = gate_up, down
        self._per_token, self._sum_to_one, self._gate = per_token, sum_to_one, gate

    def __call__(self, x_TD: Tensor, *, fp8: bool) -> Tensor:
        """(T, D) the weighted sum of what each token's experts make of it, by fp8 products if asked.

        Experts without weights in the model's dtype compute in fp8 whatever is asked. Nothing waits for the
        device where the grouped products do not.
        """
        fp8 = fp8 or self.gate_up.weight is None
        weights_TA, expert_TA = self._choose(x_TD)
        groups = Groups.of(expert_TA, len(self._router_ED))
        given: Tensor | Quantised
        if fp8:
            quantised_TD, scale_T1 = quantize_rows(x_TD)
            given = groups.gathered(quantised_TD), groups.gathered(scale_T1)
        else:
            given = groups.gathered(x_TD)
        gated_SF = self._gated(self.gate_up(given, groups), groups, fp8=fp8)
        summed_TD = groups.weighted_sum(self.down(gated_SF, groups), weights_TA)
        if self.down.bias_EN is None:
            return summed_TD
        weights_TE = weights_TA.new_zeros(len(x_TD), len(self._router_ED)).scatter_(1, expert_TA, weights_TA)
        return summed_TD.addmm_(weights_TE, self.down.bias_EN)

    def _gated(self, gate_up_S2F: Tensor, groups: Groups, *, fp8: bool) -> Tensor | Quantised:
        """(S, F), quantised with `fp8`."""
        if self._gate == "clamped_swiglu":
            assert self.gate_up.bias_EN is not None
            gated_SF = clamped_swiglu(gate_up_S2F, self.gate_up.bias_EN, groups.expert_S)
            return quantize_rows(gated_SF) if fp8 else gated_SF
        return gated_quantized(gate_up_S2F, self._gate) if fp8 else gated(gate_up_S2F, self._gate)

    def _choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, A) the weights of each token's experts, and which they are."""
        shares_TE = linear(x_TD, self._router_ED, self._router_bias_E).softmax(-1, dtype=torch.float32)
        weights_TA, expert_TA = shares_TE.topk(self._per_token, dim=-1)
        if self._sum_to_one:
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        return weights_TA.to(x_TD.dtype), expert_TA
