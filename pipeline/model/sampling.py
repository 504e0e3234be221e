"""Choosing the next token: greedy, or by temperature and top-p with a seed of each row's own.

Tokens are chosen on the device, and nothing here waits for it. Letters: B rows, V vocabulary, N new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NOT_FINITE = -1  # in place of a token
# a temperature below it is 0: of logits near 16 float32 tells differences of 2e-6 apart, so that a draw would
# only choose among those that rounding made different
COLDEST = 1e-5
LEAST_TOP_P = 1e-30  # of a smaller one float32 makes 0, which leaves no token
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

    def draws(self, row: int, tokens: int) -> RowDraws | None:
        """What a row of this number draws at most so many tokens by; None where it is greedy."""
        return None if self.is_greedy else RowDraws(self.temperature, self.top_p, self.uniforms(row, tokens))


class RowDraws(NamedTuple):
    """What one row draws its tokens by; there is none of a greedy row."""

    temperature: float
    top_p: float
    uniform_N: Tensor


class Draws(NamedTuple):
    """What the tokens of B rows are drawn by, on the device."""

    temperature_B: Tensor  # 0: the row is greedy
    top_p_B: Tensor
    uniform_B: Tensor
    sorts: bool  # whether a row has a top-p below 1, for which the vocabulary must be sorted

    def part(self, start: int, end: int) -> Draws:
        """Those of some rows."""
        some = slice(start, end)
        return Draws(self.temperature_B[some], self.top_p_B[some], self.uniform_B[some], self.sorts)


def next_tokens(logits_BV: Tensor, draws: Draws | None) -> Tensor:
    """(B,) tokens, `NOT_FINITE` where the model's output is; None: all rows are greedy."""
    greedy_B = most_likely(logits_BV)
    if draws is None:
        return greedy_B
    drawn = [
        _draw(logits_BV[start : start + ROWS_AT_ONCE], draws.part(start, start + ROWS_AT_ONCE))
        for start in range(0, len(logits_BV), ROWS_AT_ONCE)
    ]
    stays_B = (draws.temperature_B == 0) | (greedy_B == NOT_FINITE)
    return torch.where(stays_B, greedy_B, torch.cat(drawn))


def most_likely(logits_BV: Tensor) -> Tensor:
    """(B,) the greedy tokens; `NOT_FINITE` where the model's output is not."""
    best_B, token_B = logits_BV.max(-1)
    return token_B.masked_fill(~best_B.isfinite(), NOT_FINITE)


def _draw(logits_BV: Tensor, draws: Draws) -> Tensor:
    """Inversion: the first token at which the mass of those up to it exceeds the row's number.

    They are taken in the order of the vocabulary, or with top-p, which must sort them, the likely ones first:
    a row of one kind draws the same whether there is one of the other kind or not.
    """
    # the largest is 0 before it is divided, so that nothing becomes infinite but what has no chance anyway
    below_BV = logits_BV.float() - logits_BV.float().amax(-1, keepdim=True)
    mass_BV = (below_BV / draws.temperature_B.clamp(min=COLDEST)[:, None]).softmax(-1)
    if not draws.sorts:
        return _inverted(mass_BV.cumsum(-1), draws.uniform_B)
    ordered_BV, tokens_BV = mass_BV.sort(dim=-1, descending=True, stable=True)
    outside_BV = ordered_BV.cumsum(-1) - ordered_BV >= draws.top_p_B.clamp(min=LEAST_TOP_P)[:, None]
    whole_B = draws.top_p_B >= 1
    mass_BV = torch.where(whole_B[:, None], mass_BV, ordered_BV.masked_fill(outside_BV, 0))
    chosen_B = _inverted(mass_BV.cumsum(-1), draws.uniform_B)
    return torch.where(whole_B, chosen_B, tokens_BV.gather(1, chosen_B[:, None]).flatten())


def _inverted(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """(B,) where a cumulated mass, of whatever total, first exceeds its share `uniform_B`."""
    total_B = mass_BV[:, -1]
    # a product may be rounded up to the total, beyond which no token lies
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return (mass_BV <= target_B[:, None]).sum(-1)
