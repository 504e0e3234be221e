"""Whether a draft model can read the prompts of another one: it is given their tokens as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.errors import ConfigError
from pipeline.pruning.shape import ModelShape

FLAG = "--draft-model"


class TokenReader(NamedTuple):
    """What it takes to read a prompt's tokens."""

    name: str  # of a model
    vocabulary: Mapping[str, int]  # numbers by tokens
    shape: ModelShape


def check_draft_reads(model: TokenReader, draft: TokenReader) -> None:
    """Raise ConfigError unless a draft gives tokens the numbers that the model does, and reads as far.

    A prompt has no token beyond the model's own table of embeddings, which may be smaller than its tokenizer.
    Attention of layers with a sliding window says little of a whole prompt, so that none may have one.
    """
    if model.vocabulary != draft.vocabulary:
        raise ConfigError(
            f"{FLAG} {draft.name} has another tokenizer than {model.name}: {_difference(model, draft)}; "
            "take a smaller model of the same family"
        )
    known = min(model.shape.vocab, max(model.vocabulary.values(), default=-1) + 1)
    if draft.shape.vocab < known:
        raise ConfigError(
            f"{FLAG} {draft.name} knows {draft.shape.vocab:,} tokens, and prompts for {model.name} may have "
            f"{known:,}; take a draft whose weights belong to its tokenizer"
        )
    if draft.shape.context < model.shape.context:
        raise ConfigError(
            f"{FLAG} {draft.name} reads {draft.shape.context:,} tokens, fewer than the "
            f"{model.shape.context:,} of {model.name}"
        )
    if draft.shape.slides:
        raise ConfigError(f"{FLAG} {draft.name} cannot be a draft: some of its layers have sliding windows")


def _difference(model: TokenReader, draft: TokenReader) -> str:
    theirs, own = draft.vocabulary, model.vocabulary
    if len(theirs) != len(own):
        return f"{len(theirs):,} tokens, not {len(own):,}"
    token = next(each for each, number in own.items() if theirs.get(each) != number)
    other = theirs.get(token)
    there = "which it does not have" if other is None else f"and there {other:,}"
    return f"{token!r} is token {own[token]:,}, {there}"
