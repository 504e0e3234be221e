"""Which words of two texts differ."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import takewhile
from operator import eq

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # writing in which each character counts as a word
_WORD = re.compile(rf"[{_UNSPACED}]\s*|[^\s{_UNSPACED}]+\s*")

Marked = list[tuple[str, bool]]  # pieces of a text, and whether the other text has other words there


def marked(first: str, second: str) -> tuple[Marked, Marked]:
    """Both texts, stripped, in pieces; white space never differs."""
    words = _WORD.findall(first), _WORD.findall(second)
    sides: tuple[Marked, Marked] = ([], [])
    for is_equal, *ranges in _steps(*([word.strip() for word in side] for side in words)):
        for side, own, (start, stop) in zip(sides, words, ranges, strict=True):
            side += _piece("".join(own[start:stop]), differs=not is_equal)
    return sides


def _steps(first: list[str], second: list[str]) -> Iterator[tuple[bool, tuple[int, int], tuple[int, int]]]:
    """Runs of words that are equal or not, as half-open ranges of each list.

    A common beginning is found here: of long lists difflib passes over words that come often.
    """
    shared = sum(takewhile(bool, map(eq, first, second)))
    yield True, (0, shared), (0, shared)
    for tag, *ends in SequenceMatcher(None, first[shared:], second[shared:]).get_opcodes():
        start, stop, start_there, stop_there = (end + shared for end in ends)
        yield tag == "equal", (start, stop), (start_there, stop_there)


def _piece(text: str, *, differs: bool) -> Marked:
    inner = text.rstrip() if differs else text
    return [(part, mark) for part, mark in ((inner, differs), (text[len(inner) :], False)) if part]
