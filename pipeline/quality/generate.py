"""Greedy answers under one method, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.model.decode import StopRules, decode
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack, prefill
from pipeline.pruning.base import PruningMethod
from pipeline.records import EncodedDocument


@dataclass(frozen=True, kw_only=True, slots=True)
class GreedyAnswer:
    """One document's answer."""

    tokens: list[int]  # without the stop token
    first: int  # the first token, even if it is a stop token

    @property
    def not_empty(self) -> list[int]:
        """The tokens; of an answer that is empty its stop token."""
        return self.tokens or [self.first]


def generate(
    model: LoadedModel,
    method: PruningMethod,
    documents: Sequence[EncodedDocument],
    rules: StopRules,
    check: Callable[[], None] = lambda: None,
) -> list[GreedyAnswer]:
    """Answer one pack. `check` is called between layers and steps, and may raise to give up."""
    pack = Pack.of(documents, model.device)
    prefilled = prefill(model.adapter, model.attention, method, pack, rules.max_new_tokens, check)
    first = prefilled.logits_BV.argmax(-1).tolist()
    answers = decode(model.adapter, model.attention, prefilled, rules, first=first, check=check)
    return [GreedyAnswer(tokens=a.tokens, first=token) for a, token in zip(answers, first, strict=True)]
