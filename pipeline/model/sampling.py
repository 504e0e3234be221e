"""Choosing the next token: greedy, or by temperature and top-p with a seed of each row's own.

Tokens are chosen on the device, and nothing here waits for it. Letters: B rows, V vocabulary, N new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOT_FINITE = -1  # in place of a token
# a temperature below it is 0: of logits near 16 float32 tells differences of 2e-6 apart, so that a draw would
# only choose among those that rounding made different
COLDEST = 1e-5
ROWS_AT_ONCE = 32  # of those that draw: each step of a draw takes a float32 of the whole vocabulary


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings; a temperature below `COLDEST` is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    def uniforms(self, row: int, tokens: int) -> Tensor:
        """(N,) numbers in [0, 1) for a row's draws: they depend on the seed and the row's number alone."""
        # mixed, so that seeds 0 and 1 do not share the streams of neighbouring rows
        seed = (self.seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9) % 2**63
        return torch.rand(tokens, generator=torch.Generator().manual_seed(seed))


def next_tokens(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None) -> Tensor:
    """(B,) tokens, `NOT_FINITE` where the model's output is; greedy ones need no `uniform_B`."""
    greedy_B = most_likely(logits_BV)
    if sampling.is_greedy:
        return greedy_B
    assert uniform_B is not None, "draws need a number for each row"
    drawn = [
        _draw(logits_BV[start : start + ROWS_AT_ONCE], uniform_B[start : start + ROWS_AT_ONCE], sampling)
        for start in range(0, len(logits_BV), ROWS_AT_ONCE)
    ]
    return torch.where(greedy_B == NOT_FINITE, greedy_B, torch.cat(drawn))


def most_likely(logits_BV: Tensor) -> Tensor:
    """(B,) the greedy tokens; `NOT_FINITE` where the model's output is not."""
    best_B, token_B = logits_BV.max(-1)
    return token_B.masked_fill(~best_B.isfinite(), NOT_FINITE)


def _draw(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Inversion: the first token at which the mass of those up to it exceeds the row's number.

    They are taken in the order of the vocabulary, or with top-p, which must sort them, the likely ones first.
    """
    # the largest is 0 before it is divided, so that nothing becomes infinite but what has no chance anyway
    below_BV = logits_BV.float() - logits_BV.float().amax(-1, keepdim=True)
    mass_BV = (below_BV / sampling.temperature).softmax(-1)
    if sampling.top_p >= 1:
        return _inverted(mass_BV.cumsum(-1), uniform_B)
    ordered_BV, tokens_BV = mass_BV.sort(dim=-1, descending=True, stable=True)
    outside_BV = ordered_BV.cumsum(-1) - ordered_BV >= sampling.top_p
    chosen_B = _inverted(ordered_BV.masked_fill(outside_BV, 0).cumsum(-1), uniform_B)
    return tokens_BV.gather(1, chosen_B[:, None]).flatten()


def _inverted(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """(B,) where a cumulated mass, of whatever total, first exceeds its share `uniform_B`."""
    total_B = mass_BV[:, -1]
    # a product may be rounded up to the total, beyond which no token lies
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return (mass_BV <= target_B[:, None]).sum(-1)
