"""Keys in int8, for products with queries that are rounded likewise: half the bytes, and twice the rate.

Softmax does not see what all keys have in common, which is taken off before (SageAttention, arXiv
2410.02367): here the middle of each channel's range. And some channels are far wider than others, by the bias
of the keys' projection. So a channel's keys are divided, and its queries multiplied, by what gives both the
same range (SmoothQuant, arXiv 2211.10438, with an exponent of a half).

What rounding keys moves scores by, on average, is foretold. A head for which that is too much, as where a few
keys are far larger than all others, has factors that are no numbers, by which whoever attends knows.

Factors depend on the queries given: a document whose queries come in pieces is rounded a little otherwise for
each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.modules import kernels_for, power_of_two

ROUNDED_FROM = 98_304  # tokens: keys and values of a head in 16 bits are 50 MB, which fill the L2 cache
HEAD_DIM = 128  # of keys that are rounded
SEEN_QUERIES = 256  # about so many, of all, tell how wide their channels are
LEAST = 1e-4  # of the widest channel's range, so that none is divided by nothing
MOST_MOVED = 0.25  # nats, root mean square, by which rounded keys may move scores
TOKENS = 128  # of one program


@dataclass(frozen=True)
class RoundedKeys:
    """A document's keys. Their products with queries are scores, but for what all scores of a query share."""

    keys_TKd: Tensor  # int8, contiguous
    factors_Kd: Tensor  # float32: those of the queries, before they are rounded themselves

    @classmethod
    def of(cls, q_QHd: Tensor, k_TKd: Tensor) -> RoundedKeys:
        """Round keys that these queries will attend to.

        A head's factors are no numbers if `MOST_MOVED` would be exceeded, or for all that is known might be:
        a key or a query of it is no number.
        """
        (tokens, kv_heads, head_dim), kernels = k_TKd.shape, _kernels(k_TKd)
        low_Kd, high_Kd = torch.aminmax(k_TKd, dim=0)
        seen_QKgd = q_QHd[:: max(1, len(q_QHd) // SEEN_QUERIES)].unflatten(1, (kv_heads, -1)).float()
        asked_Kd, power_Kd = seen_QKgd.abs().amax((0, 2)), seen_QKgd.square().mean(0).amax(1)
        if kernels is None:
            return cls._plainly(k_TKd, low_Kd, high_Kd, asked_Kd, power_Kd)
        keys_TKd = torch.empty(tokens, kv_heads, head_dim, dtype=torch.int8, device=k_TKd.device)
        factors_Kd = torch.empty(kv_heads, head_dim, dtype=torch.float32, device=k_TKd.device)
        kernels.round_keys_kernel[(-(-tokens // TOKENS), kv_heads)](
            *(k_TKd, *k_TKd.stride()[:2], low_Kd, high_Kd, asked_Kd, power_Kd, keys_TKd, factors_Kd),
            *(tokens, kv_heads),
            LEAST=LEAST,
            MOST_POWER=_most_power(head_dim),
            TOKENS=TOKENS,
            HEAD_DIM=head_dim,
            WIDTH=power_of_two(head_dim, 16),
            num_warps=4,
        )
        return cls(keys_TKd, factors_Kd)

    @classmethod
    def _plainly(
        cls, k_TKd: Tensor, low_Kd: Tensor, high_Kd: Tensor, asked_Kd: Tensor, power_Kd: Tensor
    ) -> RoundedKeys:
        low_Kd, high_Kd = low_Kd.float(), high_Kd.float()
        middle_Kd = (low_Kd + high_Kd) / 2
        reach_Kd, asked_Kd = _bounded((high_Kd - low_Kd) / 2), _bounded(asked_Kd)
        # by their root the widest channel's keys end at 127
        whole_K1 = (reach_Kd * asked_Kd).sqrt().amax(1, keepdim=True) / 127
        factors_Kd = (reach_Kd / asked_Kd).sqrt() * whole_K1 + (middle_Kd - middle_Kd)
        keys_TKd = ((k_TKd.float() - middle_Kd) / factors_Kd + 0.5).floor().to(torch.int8)
        moved_K1 = (factors_Kd.square() * power_Kd).sum(1, keepdim=True)
        return cls(keys_TKd, factors_Kd.masked_fill(~(moved_K1 <= _most_power(k_TKd.shape[2])), math.nan))


def _bounded(range_Kd: Tensor) -> Tensor:
    return torch.maximum(range_Kd, LEAST * range_Kd.amax(1, keepdim=True)).clamp(min=1e-15)


def _most_power(head_dim: int) -> float:
    """What `MOST_MOVED` is of queries times the steps that keys are rounded to, squared and summed.

    An error that is even over a step has a twelfth of its square as variance; scores are divided by a root.
    """
    return MOST_MOVED**2 * 12 * head_dim


def _kernels(x: Tensor) -> Any | None:
    """The module of the kernel where it can run on this tensor, else None."""
    return kernels_for(x, "blocks.triton_rounding")
