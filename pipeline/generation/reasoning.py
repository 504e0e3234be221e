"""Where the reasoning ends that a model may write before its answer, while it is written and afterwards."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.generation.characters import whole_characters
from pipeline.records import CLOSES, OPENS, Reasoning

REACH = len(CLOSES) + 4  # tokens that a mark may take, white space around it included


@dataclass(frozen=True, kw_only=True)
class Parted:
    """What a model wrote, in two: its reasoning, without marks, and the answer.

    The answer is a text that shares a token with the closing mark, mostly empty, and the tokens behind it.
    `reasoning` is None where the model did not reason; an answer that never came is empty.
    """

    reasoning: str | None
    head: str
    tokens: Sequence[int]


def parted(tokens: Sequence[int], begins: Reasoning | None, tokenizer: Any) -> Parted:
    """Part what a model wrote; `begins` is what its prompt says of reasoning, None to look for none."""
    text = "" if begins is None else _spelled(tokens, tokenizer)
    opened = begins is Reasoning.BEGUN or text.lstrip().startswith(OPENS)
    if CLOSES in text and (opened or begins is Reasoning.POSSIBLE):
        end = _end(tokens, tokenizer)
        before, _, head = _spelled(tokens[:end], tokenizer).partition(CLOSES)
        return Parted(reasoning=_unmarked(before), head=head, tokens=tokens[end:])
    if opened:
        return Parted(reasoning=_unmarked(whole_characters(tokens, tokenizer)), head="", tokens=[])
    return Parted(reasoning=None, head="", tokens=tokens)


def _end(tokens: Sequence[int], tokenizer: Any) -> int:
    """How many tokens there are up to the first closing mark, itself included; there must be one."""

    def is_behind(end: int) -> bool:
        return CLOSES in _spelled(tokens[:end], tokenizer)

    mark = tokenizer.convert_tokens_to_ids(CLOSES)  # an unknown token where the mark is none
    place = tokens.index(mark) if mark in tokens else 0
    if is_behind(place + 1) and not is_behind(place):
        return place + 1
    return bisect_left(range(len(tokens)), True, key=is_behind)


def answer_start(tokens: Sequence[int], before: int | None, begins: Reasoning, tokenizer: Any) -> int | None:
    """The place of an answer's first token, by the newest token; None while the model reasons.

    `before` is what this said without the newest token: at first None where the prompt has begun the
    reasoning, else 0.
    """
    if before:
        return before
    may_close = before is None or begins is Reasoning.POSSIBLE
    if may_close and CLOSES in _spelled(tokens[-REACH:], tokenizer):
        return len(tokens)
    if before == 0 and len(tokens) <= REACH and _spelled(tokens, tokenizer).lstrip().startswith(OPENS):
        return None
    return before


def _unmarked(text: str) -> str:
    return text.strip().removeprefix(OPENS).strip()


def _spelled(tokens: Sequence[int], tokenizer: Any) -> str:
    """The text with special tokens, which the marks may be."""
    return str(tokenizer.decode(tokens, skip_special_tokens=False))
