"""Choosing the next token: greedy, or by temperature and top-p with a seed of each row's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import RowError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Sampler:
    """Draws for the documents of one pack. A row's draws depend on the seed and its row number alone."""

    def __init__(self, settings: Sampling, rows: Sequence[int]) -> None:
        self.settings = settings
        self.generators = [_generator(settings.seed, row) for row in rows]

    @property
    def is_greedy(self) -> bool:
        return self.settings.temperature == 0

    def draw(self, logits_BV: Tensor, documents: Sequence[int]) -> list[int]:
        """The next token of each of the pack's `documents`, which are the batch at hand.

        Raises RowError when the model's output is not finite, rather than answer with nonsense.
        """
        greedy = finite_tokens(most_likely(logits_BV).tolist())
        if self.is_greedy:
            return greedy
        # one number a row from the host, then inversion on the device: packing changes no draw
        draws = [torch.rand((), generator=self.generators[b]).item() for b in documents]
        uniform_B = torch.tensor(draws, device=logits_BV.device)
        probabilities_BV = (logits_BV / self.settings.temperature).softmax(-1)
        ordered_BV, tokens_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        mass_BV = ordered_BV.cumsum(-1)
        outside_BV = mass_BV - ordered_BV >= self.settings.top_p
        mass_BV = ordered_BV.masked_fill(outside_BV, 0).cumsum(-1)
        target_B1 = (uniform_B * mass_BV[:, -1])[:, None]
        chosen_B1 = (mass_BV <= target_B1).sum(-1, keepdim=True)
        kept_B1 = (~outside_BV).sum(-1, keepdim=True)
        return tokens_BV.gather(1, torch.minimum(chosen_B1, kept_B1 - 1)).flatten().tolist()


def most_likely(logits_BV: Tensor) -> Tensor:
    """(B,) the greedy tokens, on the device; -1 where the model's output is not finite."""
    best_B, token_B = logits_BV.max(-1)
    return token_B.masked_fill(~best_B.isfinite(), -1)


def finite_tokens(tokens: list[int]) -> list[int]:
    """The tokens of `most_likely`, on the host; raises RowError where one is -1."""
    if -1 in tokens:
        raise RowError("not_finite", "the model's output is not finite; try another --dtype or --attention")
    return tokens


def _generator(seed: int, row: int) -> torch.Generator:
    # mixed, so that seeds 0 and 1 do not share the streams of neighbouring rows
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9) % 2**63)
