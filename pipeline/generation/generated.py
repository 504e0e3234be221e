"""Answers while they grow, token by token, and where they end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.generation.decode_batch import NOTHING
from pipeline.generation.guide import Guide
from pipeline.generation.reasoning import answer_start
from pipeline.generation.sampling import NOT_FINITE
from pipeline.generation.stopping import StopTexts
from pipeline.records import Reasoning
from pipeline.structured.matchers import Visit


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When an answer ends."""

    max_new_tokens: int
    token_ids: frozenset[int] = frozenset()  # never part of the answer
    texts: StopTexts | None = None

    def reason(self, tokens: Sequence[int], start: int | None = 0) -> str | None:
        """Why the answer ends with its newest token: `stop`, `stop_text`, `length`, or None.

        `start` is its first token, behind the model's reasoning; None while the model reasons.
        """
        if tokens[-1] in self.token_ids:
            return "stop"
        if self.texts is not None and self.texts.found(tokens, start):
            return "stop_text"
        return "length" if len(tokens) >= self.max_new_tokens else None


@dataclass(kw_only=True, eq=False)
class Generated:
    """One row's answer in tokens, without the stop token, while it grows and when it is done."""

    rules: StopRules
    tokens: list[int] = field(default_factory=list)
    # as `StopRules.reason` says it, or `not_finite`, or `stuck` where no token can follow in its form
    finish_reason: str | None = None
    finished_at: float = 0.0  # time.perf_counter()
    queued: int = 1  # tokens that are there or will be at least: that of the prefill, and one a step
    drafts: int | None = None  # that were verified, where any are looked up
    accepted: int = 0  # of them, which are part of the answer
    skipped_ffns: list[int] = field(default_factory=list)  # of each step, where a method leaves any out
    reasoning: Reasoning | None = None  # what its prompt says of it
    guide: Guide | None = None  # that holds it to a form, if it is to have one
    logprobs: list[float] = field(default_factory=list)  # of its tokens, where they are wanted
    weighs: str | None = None  # why it ended, while the choices beside it are still weighed
    start: int | None = field(init=False)  # the token from which stop texts count; None: from none so far

    def __post_init__(self) -> None:
        self.start = None if self.reasoning is Reasoning.BEGUN else 0

    @property
    def grows(self) -> bool:
        """Whether tokens that come are the answer's."""
        return self.finish_reason is None and self.weighs is None

    @property
    def unqueued(self) -> int:
        """How many more tokens than are there, or queued, the answer may have, or visits."""
        if self.weighs is not None and self.guide is not None:
            return len(self.guide.visits)
        return self.rules.max_new_tokens - self.queued

    @property
    def is_queued(self) -> bool:
        """Whether it needs no more steps: all its tokens are on their way, and none can be refused."""
        return self.unqueued <= 0 and not (self.guide is not None and self.guide.guesses)

    def refuses(self, token: int) -> bool:
        """Whether the newest token, which no mask was asked for, may not follow in the answer's form."""
        guide = self.guide
        return guide is not None and guide.guesses and self.grows and token >= 0 and not guide.allows(token)

    def take(self, token: int, scores: Sequence[float] = ()) -> None:
        """Add a token, and end the answer where it ends.

        `scores` are the token's log-probability and the logits of the tokens that its guide asked for, where
        they are wanted.
        """
        if token == NOT_FINITE:
            self.finish_reason, self.finished_at = "not_finite", time.perf_counter()
            return
        self.tokens.append(token)
        self.logprobs += scores[:1]
        rules = self.rules
        if self.guide is not None:
            self.guide.take(self.tokens, scores[1:])
        elif self.reasoning is not None and rules.texts is not None:
            self.start = answer_start(self.tokens, self.start, self.reasoning, rules.texts.tokenizer)
        reason = rules.reason(self.tokens, self.start)
        self.finish_reason = reason if self.guide is None else self.guide.reason(reason)
        if self.finish_reason is None:
            return
        self.finished_at = time.perf_counter()
        if reason == "stop":
            del self.tokens[-1:], self.logprobs[-1:]
        if self.guide is not None and len(scores) > 1 and self.finish_reason == "stop":
            self.guide.plan_visits(rules.max_new_tokens - 1)
            if self.guide.visits:
                self.weighs, self.finish_reason = self.finish_reason, None

    def take_visit(self, visit: Visit, logits: Sequence[float]) -> None:
        """Learn what came of a visit, the last of which ends the answer."""
        assert self.guide is not None
        self.guide.weigh(visit, logits)
        if not self.guide.unweighed:
            self.end_visits()

    def end_visits(self) -> None:
        """End an answer that is there, whatever is still to be visited."""
        self.finish_reason, self.finished_at = self.weighs, time.perf_counter()

    def take_step(self, drafts: int, tokens: Sequence[int], scores: Sequence[float] = ()) -> int:
        """Add what a step made, up to where the answer ends; returns how many drafts are among it.

        `scores` are as many log-probabilities as there are `tokens`, and the logits that were asked for.
        """
        before = len(self.tokens)
        for number, token in enumerate(tokens):
            if token == NOTHING or self.finish_reason is not None:
                break
            self.take(token, (*scores[number : number + 1], *scores[len(tokens) :]))
        accepted = min(drafts, max(0, len(self.tokens) - before - 1))
        if self.drafts is not None:
            self.drafts, self.accepted = self.drafts + drafts, self.accepted + accepted
        return accepted
