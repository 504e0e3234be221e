"""Which documents a profile does not speak for: they run dense, and their rows say why.

A profile was verified on documents of some tasks and lengths. A document of another task, one that is far
longer, and one whose attention is so flat that the method keeps more of it than of any that was verified, is
not like them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pipeline.profile import FAR_BEYOND, Profile
from pipeline.records import Answer, EncodedDocument

# how much of a document a method worked on, in layers, feed-forward networks and attention
SHARES = ("kept_ratio", "ffn_ratio", "attention_ratio")
DENSE = "dense"
SLACK = 0.1  # of what is left to all of it, beyond the most that was verified


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What a profile speaks for."""

    tasks: frozenset[str]  # none: of whatever task
    longest: int | None  # prompt tokens
    most: Mapping[str, Mapping[int, float]]  # of each share: the most at about so many prompt tokens

    @classmethod
    def of(cls, profile: Profile) -> Self:
        told = profile.about.get("guard", {})
        most = {name: {int(n): share for n, share in told.get(name, {}).items()} for name in SHARES}
        return cls(tasks=frozenset(told.get("tasks", ())), longest=profile.longest, most=most)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What `as_dict` gave."""
        most = {name: {int(n): share for n, share in each.items()} for name, each in plain["most"].items()}
        return cls(tasks=frozenset(plain["tasks"]), longest=plain["longest"], most=most)

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"tasks": sorted(self.tasks), "longest": self.longest, "most": _plain(self.most)}

    def before(self, document: EncodedDocument) -> str | None:
        """Why a document is to run dense, if it is; what can be told before it runs."""
        task = document.source.task
        if task is not None and self.tasks and task not in self.tasks:
            return f"task: the profile was not calibrated on {task!r}"
        if self.longest is not None and document.prompt_tokens > FAR_BEYOND * self.longest:
            return (
                f"length: {document.prompt_tokens:,} tokens are far beyond the {self.longest:,} that the "
                "profile was calibrated on"
            )
        return None

    def after(self, answer: Answer) -> str | None:
        """Why a document is to run again, dense, if it is: by what the method kept of it."""
        if answer.method == DENSE:  # with others about the same document
            return None
        for name in SHARES:
            share, most = getattr(answer, name), self.most.get(name)
            if share is None or answer.prompt_tokens is None or not most:
                continue
            bound = most[min(most, key=lambda tokens: abs(_octave(tokens) - _octave(answer.prompt_tokens)))]
            limit = bound + SLACK * (1 - bound)
            if share > limit:
                return f"flat attention: {name} is {share:.2f}, and at most {bound:.2f} was calibrated on"
        return None


def _plain(most: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {name: {str(tokens): share for tokens, share in each.items()} for name, each in most.items()}


def _octave(tokens: int | None) -> int:
    """Lengths in one octave are about equal."""
    return (tokens or 1).bit_length()


def spoken_for(tasks: Iterable[str], scores: Iterable[Any]) -> dict[str, Any]:
    """What `Guard.of` reads in a profile, of the rows that settings were verified on.

    Each of `scores` has prompt tokens and the shares by their names; a length stands for its octave.
    """
    most: dict[str, dict[str, float]] = {name: {} for name in SHARES}
    for score in scores:
        octave = str(1 << (_octave(score.prompt_tokens) - 1))
        for name in SHARES:
            most[name][octave] = max(most[name].get(octave, 0.0), round(getattr(score, name), 4))
    return {"tasks": sorted(set(tasks)), **most}
