"""A feed-forward network of experts, of which each token passes a few.

Letters beside those of segments.py: E experts, A of them for each token, S = T * A places, F inner width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pipeline.kernels.fused import gated

CAPABILITY = (8, 0)  # of the first GPUs for which torch has grouped products


class Experts:
    """A router's and its experts' weights, which stay the model's own."""

    def __init__(
        self,
        router_ED: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        *,
        per_token: int,
        sum_to_one: bool,
        gate: str,
    ) -> None:
        """`gate` is as in `gated`; with `sum_to_one` the weights of a token's experts do."""
        self._router_ED = router_ED.detach()
        self._gate_up_E2FD, self._down_EDF = gate_up_E2FD.detach(), down_EDF.detach()
        self._per_token, self._sum_to_one, self._gate = per_token, sum_to_one, gate

    def __call__(self, x_TD: Tensor) -> Tensor:
        """(T, D) the weighted sum of what each token's experts make of it.

        Nothing waits for the device where `grouped_product` does not.
        """
        weights_TA, expert_TA = self._choose(x_TD)
        order_S = expert_TA.flatten().argsort(stable=True)
        expert_S = expert_TA.flatten()[order_S]
        experts = torch.arange(len(self._router_ED), device=x_TD.device)
        ends_E = torch.searchsorted(expert_S, experts, right=True).int()
        x_SD = x_TD.index_select(0, order_S // self._per_token)
        gated_SF = gated(grouped_product(x_SD, self._gate_up_E2FD, ends_E), self._gate)
        made_SD = grouped_product(gated_SF, self._down_EDF, ends_E)
        # back in the tokens' order, so that each sum is over the same experts in the same order in any pack
        back_SD = torch.empty_like(made_SD).index_copy_(0, order_S, made_SD)
        return (back_SD.unflatten(0, weights_TA.shape) * weights_TA[..., None]).sum(1).to(x_TD.dtype)

    def _choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, A) the weights of each token's experts, and which they are."""
        shares_TE = linear(x_TD, self._router_ED).softmax(-1, dtype=torch.float32)
        weights_TA, expert_TA = shares_TE.topk(self._per_token, dim=-1)
        if self._sum_to_one:
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        return weights_TA.to(x_TD.dtype), expert_TA


def grouped_product(x_SD: Tensor, weight_END: Tensor, ends_E: Tensor) -> Tensor:
    """(S, N): the rows up to ends_E[0] times the first matrix, those up to ends_E[1] the next, and so on.

    By torch's grouped product in bfloat16 on a GPU, which does not wait for it; elsewhere one by one.
    """
    if x_SD.dtype == torch.bfloat16 and _has_grouped_product(x_SD.device):
        product: Any = torch.nn.functional.grouped_mm
        return product(x_SD, weight_END.transpose(1, 2), offs=ends_E)
    ends = ends_E.tolist()
    out_SN = x_SD.new_empty(len(x_SD), weight_END.shape[1])
    for weight_ND, start, end in zip(weight_END, [0, *ends[:-1]], ends, strict=True):
        if end > start:
            torch.mm(x_SD[start:end], weight_ND.t(), out=out_SN[start:end])
    return out_SN


@cache
def _has_grouped_product(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
