"""What holds an answer to a form: the tokens that may follow in it, behind reasoning that has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.generation.reasoning import answer_start
from pipeline.records import ChoiceLogprob, Reasoning
from pipeline.structured.matchers import ChoiceMatcher, Matcher, Visit, fill_masks, mask_of


@dataclass(kw_only=True, eq=False)
class Guide:
    """Of one row. Masks have a bit a token, see `fill_masks`."""

    matcher: Matcher
    tokenizer: Any  # the model's
    stops_W: np.ndarray  # of the tokens that end an answer
    reasoning: Reasoning | None = None  # what the prompt says of it
    opener: int | None = None  # the token by which the model may begin to reason
    start: int | None = field(init=False)  # the answer's first token; None while the model reasons
    # once the answer is there: places at which its other choices are still to be weighed, and how many of
    # these, and of those that are on their way, are not weighed yet
    visits: list[Visit] = field(default_factory=list)
    unweighed: int = 0
    can_go_back: bool = False  # whether the row can, from a token that may not follow
    guesses: bool = False  # whether the next token is chosen without a mask, and asked about afterwards
    _taken: int = 0

    def __post_init__(self) -> None:
        self.start = None if self.reasoning is Reasoning.BEGUN else 0

    @property
    def may_open(self) -> bool:
        """Whether the next token may be the one by which the model begins to reason."""
        return not self._taken and self.reasoning is Reasoning.POSSIBLE and self.opener is not None

    @property
    def asked(self) -> list[int]:
        """The tokens whose logits tell how likely each choice is."""
        matcher = self.matcher
        return matcher.asked if isinstance(matcher, ChoiceMatcher) and self.start is not None else []

    @property
    def is_open(self) -> bool:
        """Whether nearly anything may follow: a mask is then dear, and what is likely is seldom refused."""
        return self.start is not None and not self.may_open and self.matcher.is_open

    def allows(self, token: int) -> bool:
        """Whether a token may follow where the guide `is_open`."""
        return self.matcher.allows(token)

    def take(self, tokens: Sequence[int], logits: Sequence[float] = ()) -> None:
        """Go on with the newest of the tokens that there are; `logits` are of those `asked`, if any are."""
        newest, asked = tokens[-1], self.asked
        opens = self.may_open and newest == self.opener
        self._taken += 1
        if opens:
            self.start = None
        elif self.start is None:
            self.start = answer_start(tokens, None, Reasoning.BEGUN, self.tokenizer)
        else:
            if isinstance(self.matcher, ChoiceMatcher) and logits:
                self.matcher.weigh(logits[: len(asked)])
            self.matcher.take(newest)

    def plan_visits(self, most: int) -> None:
        """Note what is to be visited so that all choices are weighed, within so many tokens of the answer."""
        if isinstance(self.matcher, ChoiceMatcher) and self.start is not None:
            self.visits = [
                visit._replace(length=self.start + visit.length)
                for visit in self.matcher.visits(most - self.start)
            ]
            self.unweighed = len(self.visits)

    def asked_at(self, visit: Visit) -> list[int]:
        """The tokens whose logits are wanted of a visit."""
        assert isinstance(self.matcher, ChoiceMatcher)
        return self.matcher.asked_at(visit.node)

    def weigh(self, visit: Visit, logits: Sequence[float]) -> None:
        """Learn what came of a visit."""
        assert isinstance(self.matcher, ChoiceMatcher)
        self.matcher.weigh(logits[: len(self.asked_at(visit))], visit.node)
        self.unweighed -= 1

    @property
    def choice_logprobs(self) -> list[ChoiceLogprob] | None:
        """Of each choice; None where the form is no choice."""
        return self.matcher.logprobs if isinstance(self.matcher, ChoiceMatcher) else None

    def reason(self, otherwise: str | None) -> str | None:
        """Why the answer ends with what was taken: `stuck`, `stop`, or `otherwise`."""
        if self.matcher.error is not None:
            return "stuck"
        return "stop" if self.start is not None and self.matcher.is_ended else otherwise

    @property
    def is_complete(self) -> bool:
        """Whether the answer has its form."""
        return self.start is not None and self.matcher.is_complete


def fill_guided(guides: Sequence[Guide | None], mask_BW: np.ndarray) -> None:
    """Write the tokens that each row may go on with; None stands for one that may go on with any.

    While a model reasons, these are all but those that end an answer.
    """
    mask_BW[:] = -1
    guided = [(row, guide) for row, guide in enumerate(guides) if guide is not None]
    fill_masks({row: guide.matcher for row, guide in guided if guide.start is not None}, mask_BW)
    for row, guide in guided:
        if guide.start is None:
            mask_BW[row] = ~guide.stops_W
        elif guide.may_open:
            assert guide.opener is not None
            mask_BW[row] |= mask_of([guide.opener], mask_BW.shape[1])
