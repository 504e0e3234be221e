"""Prompt look-up decoding: what follows in a row's own text is drafted, and verified by the next step.

Answers about a document often quote it. Where the newest tokens of a row stand earlier in its prompt or its
answer, the tokens that followed there are guessed to follow again (A. Saxena, Prompt Lookup Decoding, 2023),
and a step runs them behind the newest token. Of those that the model would have chosen itself all stay, and
one of its own comes behind them: the answer is what it is without drafts, also where tokens are drawn, since
a draw depends on nothing but the row's own numbers.

All of it happens on the device, at fixed addresses, so that a step can be captured. Letters: C columns of the
batch, T tokens of a row's text, N drafts of a row at most, Q queries of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

USUAL_DRAFTS = 8  # of a row and step, where the user gives no number
# queries of a step, up to which drafts are added: so many a device computes in hardly more time than it needs
# to read the weights
MOST_QUERIES = {"cpu": 16, "cuda": 256}
LONGEST_MATCH = 4  # newest tokens that are looked for
SHORTEST_MATCH = 2  # of them, that must be found
# with `auto`, drafts that a row may still have verified: in a full step each costs one, and each that is
# accepted brings more
FIRST_CREDIT = 16.0
MOST_CREDIT = 32.0
CREDIT_OF_ACCEPTED = 5.0
CREDIT_OF_STEP = 0.125
# with `auto`, what decides whether steps verify drafts at all
LEAST_GAIN = 0.5  # tokens more, of a row and of a full step, which takes about that much longer
TRIAL_STEPS = 8  # after rows have joined
REST_STEPS = 32  # without drafts, before the next trial of
SHORT_TRIAL_STEPS = 2
NEWEST_SHARE = 0.2  # of the newest step in the mean of gains


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """At most `drafts` tokens of a row and step; `adaptive` drafts fewer where they are refused."""

    drafts: int
    adaptive: bool

    def queries(self, columns: int, device: torch.device) -> int:
        """Of a step with drafts for so many columns; as many as columns where it would have none."""
        return max(columns, min(columns * (1 + self.drafts), MOST_QUERIES[device.type]))

    def cost(self, columns: int, device: torch.device) -> float:
        """What drafts cost in a step for so many columns, from 0, nothing, to 1, in one full of queries."""
        return min(1.0, columns * (1 + self.drafts) / MOST_QUERIES[device.type])


def drafts_of(lookup: Lookup | None) -> int:
    """Of a row and step at most; none without `lookup`."""
    return 0 if lookup is None else lookup.drafts


class Texts:
    """The tokens of each column's row, prompt and answer, and the drafts that they make."""

    def __init__(self, lookup: Lookup, capacity: int, longest: int, device: torch.device) -> None:
        """No row has more than `longest` tokens."""
        self._lookup = lookup
        width = longest + lookup.drafts + 1  # behind the newest token a step writes what it may not keep
        self._tokens_CT = torch.zeros((capacity, width), dtype=torch.int32, device=device)
        self._place_T = torch.arange(width, dtype=torch.int32, device=device)
        self._draft_N = torch.arange(lookup.drafts, device=device)
        self._newest_C = torch.zeros(capacity, dtype=torch.int64, device=device)  # its place in the text
        self._credit_C = torch.zeros(capacity, dtype=torch.float32, device=device)

    def join(self, column: int, prompt: Tensor, newest: int) -> None:
        """A row begins, whose first token follows its prompt."""
        self._newest_C[column] = len(prompt)
        self._tokens_CT[column, : len(prompt)] = prompt.to(self._tokens_CT.device, torch.int32)
        self._tokens_CT[column, len(prompt)] = newest
        self._credit_C[column] = FIRST_CREDIT

    def keep(self, order_B: Tensor) -> None:
        """Go on with these columns, in this order."""
        for values in (self._tokens_CT, self._newest_C, self._credit_C):
            values[: len(order_B)] = values.index_select(0, order_B)

    def drafts(self, moving_C: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """(C, N) tokens, and (C,) how many of them are drafts; of all columns together at most `most`.

        `moving_C` is 1 for a column that has a row, and 0 for others.
        """
        columns = len(moving_C)
        tokens_CT, newest_C1 = self._tokens_CT[:columns], self._newest_C[:columns, None]
        after_C1 = _after_last_match(tokens_CT, self._place_T, newest_C1)
        at_CN = after_C1 + self._draft_N
        drafts_CN = tokens_CT.gather(1, at_CN.clamp(max=tokens_CT.shape[1] - 1))
        count_C = (newest_C1 + 1 - after_C1)[:, 0].clamp(0, self._lookup.drafts).int() * moving_C
        if self._lookup.adaptive:
            count_C = torch.minimum(count_C, self._credit_C[:columns].int())
        return drafts_CN, _within(count_C, self._lookup.drafts, most)

    def take(self, next_CK: Tensor, made_C: Tensor, verified_C: Tensor, accepted_C: Tensor) -> None:
        """Learn what a step made: of each column the first `made_C` of the tokens in `next_CK`."""
        columns, count = next_CK.shape
        at_CK = self._newest_C[:columns, None] + 1 + self._place_T[:count]
        at_CK.clamp_(max=self._tokens_CT.shape[1] - 1)
        self._tokens_CT[:columns].scatter_(1, at_CK, next_CK.clamp(min=0).int())
        self._newest_C[:columns] += made_C
        credit_C, cost = self._credit_C[:columns], self._lookup.cost(columns, next_CK.device)
        credit_C += CREDIT_OF_ACCEPTED * accepted_C - cost * verified_C + CREDIT_OF_STEP
        credit_C.clamp_(0, MOST_CREDIT)


def _after_last_match(tokens_CT: Tensor, place_T: Tensor, newest_C1: Tensor) -> Tensor:
    """(C, 1) where the text goes on behind the newest tokens' longest match, of several the last one.

    Without any it is the place behind the newest token, which stands at `newest_C1`.
    """
    first, width = LONGEST_MATCH - 1, tokens_CT.shape[1]
    ends_E = place_T[first:]  # of a match
    length_CE = torch.zeros((len(tokens_CT), width - first), dtype=torch.int32, device=tokens_CT.device)
    so_far_CE = ends_E < newest_C1
    for back in range(LONGEST_MATCH):
        wanted_C1 = tokens_CT.gather(1, (newest_C1 - back).clamp(min=0))
        so_far_CE = so_far_CE & (tokens_CT[:, first - back : width - back] == wanted_C1)
        length_CE += so_far_CE
    best_C1 = torch.where(length_CE >= SHORTEST_MATCH, length_CE * width + ends_E, -1).amax(1, keepdim=True)
    return torch.where(best_C1 < 0, newest_C1, best_C1.long() % width) + 1


def _within(count_C: Tensor, drafts: int, most: int) -> Tensor:
    """(C,) counts of which each was cut to the same bound, the largest with which their sum is in `most`."""
    bounds_M = torch.arange(1, drafts + 1, device=count_C.device)
    sums_M = torch.minimum(count_C[:, None], bounds_M).sum(0)
    return torch.minimum(count_C, (sums_M <= most).sum().int())


class DraftPace:
    """Whether the next step verifies drafts: always, or as long as that pays.

    Decided by what steps made and not by their time, so that a run can be repeated.
    """

    def __init__(self, lookup: Lookup) -> None:
        self._adaptive = lookup.adaptive
        self._gain = 0.0
        self._trial, self._rest = TRIAL_STEPS, 0

    def joined(self) -> None:
        """New rows are there, of which nothing is known."""
        self._trial = max(self._trial, TRIAL_STEPS)

    def drafts(self, cost: float) -> bool:
        """Decide on a step, in which drafts have this `Lookup.cost`."""
        if not self._adaptive or self._gain >= LEAST_GAIN * cost:
            return True
        if not self._trial and self._rest >= REST_STEPS:
            self._trial = SHORT_TRIAL_STEPS
        drafts = self._trial > 0
        self._trial -= drafts
        self._rest = 0 if drafts else self._rest + 1
        return drafts

    def made(self, rows: int, accepted: int) -> None:
        """Learn of a step with drafts."""
        self._gain += NEWEST_SHARE * (accepted / rows - self._gain)


class Spread(NamedTuple):
    """Places that are given to owners in turn, to each as many as it asks for.

    Places behind the last one that was asked for are the last owner's, with an index beyond its count.
    """

    bounds_N1: Tensor  # int32: of each owner's places
    owner_Q: Tensor
    index_Q: Tensor  # among its owner's
    spare_Q: Tensor  # whether nobody asked for it

    @classmethod
    def of(cls, count_N: Tensor, places: int) -> Self:
        bounds_N1 = torch.zeros(len(count_N) + 1, dtype=torch.int32, device=count_N.device)
        torch.cumsum(count_N, 0, dtype=torch.int32, out=bounds_N1[1:])
        place_Q = torch.arange(places, dtype=torch.int32, device=count_N.device)
        owner_Q = torch.searchsorted(bounds_N1[1:], place_Q, right=True).clamp(max=len(count_N) - 1)
        return cls(
            bounds_N1=bounds_N1,
            owner_Q=owner_Q,
            index_Q=place_Q - bounds_N1[owner_Q],
            spare_Q=place_Q >= bounds_N1[-1],
        )
