"""Answers under one method, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.model.decode import StopRules, decode, first_tokens
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack, prefill
from pipeline.model.sampling import Sampling
from pipeline.pruning.base import PruningMethod
from pipeline.records import EncodedDocument


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedAnswer:
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
    sampling: Sampling | None = None,
) -> list[GeneratedAnswer]:
    """Answer one pack, greedily without `sampling`, whose draws depend on the rows' numbers.

    `check` is called between layers and steps, and may raise to give up.
    """
    sampling = sampling or Sampling()
    rows = [] if sampling.is_greedy else [document.source.row for document in documents]
    uniforms = [sampling.uniforms(row, rules.max_new_tokens) for row in rows]
    pack = Pack.of(documents, model.device)
    prefilled = prefill(model.adapter, model.attention, method, pack, rules.max_new_tokens, check)
    first = first_tokens(prefilled.logits_BV, sampling, uniforms)
    answers = decode(
        model.adapter,
        model.attention,
        prefilled,
        rules,
        sampling=sampling,
        uniforms=uniforms,
        first=first,
        check=check,
    )
    return [GeneratedAnswer(tokens=a.tokens, first=token) for a, token in zip(answers, first, strict=True)]
