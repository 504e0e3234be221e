"""Choosing the next token: greedy, or drawn with a seed of each row's own.

The order is that of transformers' logits processors: the repetition penalty on the logits of tokens that the
prompt or the answer has, temperature, top-k, top-p of what top-k leaves, and min-p. vLLM applies min-p before
top-k, so that there top-p is a share of what both leave; each alone, and top-k with either, is the same.

Tokens are chosen on the device, and nothing here waits for it. Letters: B rows, V vocabulary, N new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeGuard

import numpy as np
import torch
from torch import Tensor

from pipeline.settings.answer_settings import COLDEST

NOT_FINITE = -1  # in place of a token
LEAST_TOP_P = 1e-30  # of a smaller one float32 makes 0, which leaves no token
ROWS_AT_ONCE = 32  # of those that draw: each step of a draw takes a float32 of the whole vocabulary


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings; a temperature below `COLDEST` is greedy, and of the others only the penalty then acts."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def sorts(self) -> bool:
        """Whether the vocabulary must be sorted for a draw."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1)

    @property
    def has_floor(self) -> bool:
        """Whether a draw leaves out tokens by their probability."""
        return not self.is_greedy and self.min_p > 0

    @property
    def penalises(self) -> bool:
        """Whether tokens that were there before change their logits."""
        return self.repetition_penalty != 1

    def uniforms(self, row: int, tokens: int, answer: int = 0) -> Tensor:
        """(N,) numbers in [0, 1) for the draws of one of a row's answers.

        They depend on nothing but the seed, the row's number and the answer's, which counts from 0.
        """
        # mixed, so that seeds 0 and 1 do not share the streams of neighbouring rows
        mixed = self.seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9 + answer * 0x94D049BB133111EB
        mixed += (self.seed >> 32) * 0xD6E8FEB86659FD93  # of the sum torch takes the lowest 32 bits alone
        return torch.rand(tokens, generator=torch.Generator().manual_seed(mixed % 2**63))

    def draws(self, row: int, tokens: int, answer: int = 0) -> RowDraws | None:
        """What a row of this number chooses at most so many tokens by; None: by the largest logits alone."""
        if self.is_greedy and not self.penalises:
            return None
        return RowDraws(self, self.uniforms(row, 0 if self.is_greedy else tokens, answer))


class RowDraws(NamedTuple):
    """What one row chooses its tokens by, where that is more than the largest logits."""

    sampling: Sampling
    uniform_N: Tensor  # empty where it is greedy


class Draws(NamedTuple):
    """What the tokens of B rows are drawn by, on the device."""

    settings_4B: Tensor  # temperature (0: the row is greedy), top-k (0: all tokens), top-p and min-p
    uniform_B: Tensor
    sorts: bool  # whether a row needs the vocabulary sorted
    floors: bool  # whether a row has a min-p

    @classmethod
    def first(cls, rows: Sequence[RowDraws | None], device: torch.device) -> Self:
        """By which rows draw their first tokens."""
        drawn = [row.sampling for row in rows if is_drawn(row)]
        uniforms = [float(row.uniform_N[0]) if is_drawn(row) else 0.0 for row in rows]
        settings = torch.tensor([settings_of(row) for row in rows], dtype=torch.float32)
        return cls(
            settings_4B=settings.T.to(device),
            uniform_B=torch.tensor(uniforms, dtype=torch.float32).to(device),
            sorts=any(sampling.sorts for sampling in drawn),
            floors=any(sampling.has_floor for sampling in drawn),
        )

    def part(self, start: int, end: int) -> Draws:
        """Those of some rows."""
        return self._replace(settings_4B=self.settings_4B[:, start:end], uniform_B=self.uniform_B[start:end])


def settings_of(row: RowDraws | None) -> tuple[float, float, float, float]:
    """A row's column of the settings in `Draws`; None: it is greedy."""
    sampling = Sampling() if row is None else row.sampling
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p


def is_drawn(row: RowDraws | None) -> TypeGuard[RowDraws]:
    """Whether a row's tokens are drawn; if not, they are the likeliest ones."""
    return row is not None and not row.sampling.is_greedy


def penalty_of(row: RowDraws | None) -> float:
    """A row's repetition penalty; 1 is none."""
    return 1.0 if row is None else row.sampling.repetition_penalty


def next_tokens(logits_BV: Tensor, draws: Draws | None) -> Tensor:
    """(B,) tokens, `NOT_FINITE` where the model's output is; None: all rows are greedy."""
    greedy_B = most_likely(logits_BV)
    if draws is None:
        return greedy_B
    drawn = [
        _draw(logits_BV[start : start + ROWS_AT_ONCE], draws.part(start, start + ROWS_AT_ONCE))
        for start in range(0, len(logits_BV), ROWS_AT_ONCE)
    ]
    stays_B = (draws.settings_4B[0] == 0) | (greedy_B == NOT_FINITE)
    return torch.where(stays_B, greedy_B, torch.cat(drawn))


@torch.inference_mode()
def first_tokens(
    logits_BV: Tensor, draws: Sequence[RowDraws | None] = (), prompts: Sequence[np.ndarray] = ()
) -> list[int]:
    """The first token of each prompt, `NOT_FINITE` among them; waits for the device.

    `draws` says what each is chosen by, None for the largest logit; without it all are so. `prompts` are
    their token ids, which a penalty is for.
    """
    if not any(draws):
        return next_tokens(logits_BV, None).tolist()
    logits_BV = with_penalties(logits_BV, draws, prompts)
    return next_tokens(logits_BV, Draws.first(draws, logits_BV.device)).tolist()


def most_likely(logits_BV: Tensor) -> Tensor:
    """(B,) the greedy tokens; `NOT_FINITE` where the model's output is not."""
    best_B, token_B = logits_BV.max(-1)
    return token_B.masked_fill(~best_B.isfinite(), NOT_FINITE)


def penalised(logits_BV: Tensor, penalty_B: Tensor, seen_BV: Tensor) -> Tensor:
    """(B, V) in float32 or wider, those of tokens that were seen made lower by a penalty above 1.

    They are divided by it, or multiplied where they are negative (N. S. Keskar et al., CTRL, 2019).
    """
    out_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32), copy=True)
    for start in range(0, len(out_BV), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part_BV, penalty_B1 = out_BV[rows], penalty_B[rows, None]
        lower_BV = torch.where(part_BV < 0, part_BV * penalty_B1, part_BV / penalty_B1)
        part_BV.copy_(torch.where(seen_BV[rows], lower_BV, part_BV))
    return out_BV


def with_penalties(
    logits_BV: Tensor, rows: Sequence[RowDraws | None], prompts: Sequence[np.ndarray]
) -> Tensor:
    """(B, V) logits of first tokens, with the rows' penalties on the tokens of their prompts."""
    penalties = list(map(penalty_of, rows))
    if all(penalty == 1 for penalty in penalties):
        return logits_BV
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for seen_V, prompt in zip(seen_BV, prompts, strict=True):
        mark_seen(seen_V, prompt)
    return penalised(logits_BV, torch.tensor(penalties, device=logits_BV.device), seen_BV)


def mark_seen(seen_V: Tensor, tokens: np.ndarray) -> None:
    """Write True for each of the tokens, among which one may come often."""
    seen_V.index_fill_(0, torch.from_numpy(tokens).to(seen_V.device, torch.int64), True)


def _draw(logits_BV: Tensor, draws: Draws) -> Tensor:
    """Inversion: the first token at which the mass of those up to it exceeds the row's number.

    They are taken in the order of the vocabulary, or with top-k or top-p, which must sort them, the likely
    ones first: a row of one kind draws the same whether there is one of the other kind or not.
    """
    temperature_B, top_k_B, top_p_B, min_p_B = draws.settings_4B
    # the largest is 0 before it is divided, so that nothing becomes infinite but what has no chance anyway
    below_BV = logits_BV.float() - logits_BV.float().amax(-1, keepdim=True)
    mass_BV = (below_BV / temperature_B.clamp(min=COLDEST)[:, None]).softmax(-1)
    whole_B, tokens_BV = (top_k_B == 0) & (top_p_B >= 1), None
    if draws.sorts:
        ordered_BV, tokens_BV = mass_BV.sort(dim=-1, descending=True, stable=True)
        mass_BV = torch.where(whole_B[:, None], mass_BV, _likeliest(ordered_BV, top_k_B, top_p_B))
    if draws.floors:
        floor_B1 = min_p_B[:, None] * mass_BV.amax(-1, keepdim=True)
        mass_BV = mass_BV.masked_fill(mass_BV < floor_B1, 0)
    chosen_B = _inverted(mass_BV.cumsum(-1), draws.uniform_B)
    if tokens_BV is None:
        return chosen_B
    return torch.where(whole_B, chosen_B, tokens_BV.gather(1, chosen_B[:, None]).flatten())


def _likeliest(ordered_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """(B, V) masses, the largest first, with 0 for what top-k leaves out, and then top-p.

    Tokens as likely as the k-th stay.
    """
    has_top_k_B, vocab = top_k_B > 0, ordered_BV.shape[1]
    last_B = torch.where(has_top_k_B, top_k_B, vocab).clamp(max=vocab).long() - 1
    kept_BV = ordered_BV.masked_fill(ordered_BV < ordered_BV.gather(1, last_B[:, None]), 0)
    total_B = torch.where(has_top_k_B, kept_BV.sum(-1), 1.0)
    share_B = torch.where(top_p_B < 1, top_p_B.clamp(min=LEAST_TOP_P) * total_B, torch.inf)
    return kept_BV.masked_fill(kept_BV.cumsum(-1) - kept_BV >= share_B[:, None], 0)


def _inverted(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """(B,) where a cumulated mass, of whatever total, first exceeds its share `uniform_B`."""
    total_B = mass_BV[:, -1]
    # a product may be rounded up to the total, beyond which no token lies
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return (mass_BV <= target_B[:, None]).sum(-1)
