"""How alike two answers are: by characters with rapidfuzz where that is installed, else by words."""

from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher

from pipeline.errors import ConfigError
from pipeline.suites.similarity import edit_similarity


def likeness() -> tuple[Callable[[str, str], float], str]:
    """A measure of two texts, 1 for equal ones, and what it is called."""
    try:
        edit_similarity("", "")
    except ConfigError:
        return by_words, "share of matching words (difflib)"
    return edit_similarity, "edit similarity of characters (rapidfuzz)"


def by_words(first: str, second: str) -> float:
    """Twice the matching words over the words of both: characters would take too long without a package."""
    if first == second:
        return 1.0
    return SequenceMatcher(None, first.split(), second.split(), autojunk=False).ratio()
