"""What shells are offered for a value that is being typed. Light: it runs at every press of Tab."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.checkpoints.names import local_models
from pipeline.pruning.registry import method_names

Complete = Callable[[str], list[str]]


def methods(incomplete: str) -> list[str]:
    """Registered methods; where none fits, shells go on with files, such as a FILE.py:Class."""
    return _beginning(method_names(), incomplete)


def models(incomplete: str) -> list[str]:
    """The embedded model and those in the hub's cache; where none fits, shells go on with files."""
    return _beginning(local_models(), incomplete)


def one_of(choices: Sequence[str]) -> Complete:
    """A fixed set of words."""

    def complete(incomplete: str) -> list[str]:
        return _beginning(choices, incomplete)

    return complete


def _beginning(words: Sequence[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
