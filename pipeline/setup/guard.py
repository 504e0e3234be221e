"""Which documents a profile does not speak for: they run dense, and their rows say why.

A profile was verified on documents of some tasks and lengths. A document of another task, one that is far
longer, and one whose attention is so flat that the method keeps more of it than of those that were verified
are not like them. What a method kept is compared only with documents of which it could leave out as much: by
length, and attention only where its blocks were chosen.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from pipeline.records import Answer, EncodedDocument
from pipeline.setup.profile import FAR_BEYOND, Profile

# how much of a document a method worked on, in layers, feed-forward networks and attention
ATTENTION = "attention_ratio"
SHARES = ("kept_ratio", "ffn_ratio", ATTENTION)
DENSE = "dense"
SLACK = 0.1  # of what is left to all of it, beyond the most that was verified
PARTS = 2  # of an octave of lengths, for each of which a profile stores the most that was verified

# kinds of reasons, with which each begins; the last is known only behind the prefill
TASK, LENGTH, FLAT = "task", "length", "flat attention"


def kind_of(reason: str) -> str:
    """Which of `TASK`, `LENGTH` and `FLAT` a reason is."""
    return reason.partition(":")[0]


@dataclass(frozen=True, kw_only=True)
class ShareBounds:
    """The most that was verified of a share, as it falls with the length of the prompt."""

    tokens: tuple[int, ...]  # of prompts, ascending, at least one
    shares: tuple[float, ...]  # at these lengths, none above the one before

    @classmethod
    def of(cls, most: Mapping[int, float]) -> Self:
        """Of shares by prompt tokens, at least one. What a longer prompt had, a shorter one may have too."""
        lengths, falling = sorted(most), 0.0
        shares: list[float] = []
        for tokens in reversed(lengths):
            falling = max(falling, most[tokens])
            shares.append(falling)
        return cls(tokens=tuple(lengths), shares=tuple(reversed(shares)))

    def at(self, tokens: int) -> float:
        """The bound for a prompt of so many tokens; above 1 where all of a prompt may be kept.

        Between two lengths it follows the logarithm of the length, and beyond the longest it stays. Below the
        shortest it allows the same number of tokens, which for short prompts is all of them: methods that
        keep a fixed number, or protect some, cannot leave out more.
        """
        place = bisect_left(self.tokens, tokens)
        if place == len(self.tokens):
            return self.shares[-1]
        longer, share = self.tokens[place], self.shares[place]
        if place == 0:
            return share * (longer / tokens)
        shorter, above = self.tokens[place - 1], self.shares[place - 1]
        part = math.log(tokens / shorter) / math.log(longer / shorter)
        return max(share, above + part * (share - above))


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What a profile speaks for."""

    tasks: frozenset[str]  # none: of whatever task
    longest: int | None  # prompt tokens
    most: Mapping[str, Mapping[int, float]]  # of each share: the most at so many prompt tokens
    by_octave: bool = False  # the lengths of `most` begin octaves, and not all attention was block-sparse

    @classmethod
    def of(cls, profile: Profile) -> Self:
        told = profile.about.get("guard", {})
        shares = {"shares": told["shares"]} if "shares" in told else {"most": told}
        return cls.from_dict({"tasks": told.get("tasks", ()), "longest": profile.longest, **shares})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What `as_dict` gave, also that of earlier versions."""
        by_octave = "shares" not in plain
        return cls(
            tasks=frozenset(plain["tasks"]),
            longest=plain["longest"],
            most=_by_length(plain["most" if by_octave else "shares"]),
            by_octave=by_octave,
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        most = {name: {str(n): share for n, share in each.items()} for name, each in self.most.items()}
        return {
            "tasks": sorted(self.tasks),
            "longest": self.longest,
            "most" if self.by_octave else "shares": most,
        }

    @cached_property
    def bounds(self) -> dict[str, ShareBounds]:
        """Of each share that was verified."""
        seen = self.most
        if self.by_octave:
            seen = {name: _from_octaves(name, each) for name, each in seen.items()}
        return {name: ShareBounds.of(each) for name, each in seen.items() if each}

    def before(self, document: EncodedDocument) -> str | None:
        """Why a document is to run dense, if it is; what can be told before it runs."""
        task = document.source.task
        if task is not None and self.tasks and task not in self.tasks:
            return f"{TASK}: the profile was not verified on {task!r}"
        if self.longest is not None and document.prompt_tokens > FAR_BEYOND * self.longest:
            return (
                f"{LENGTH}: {document.prompt_tokens:,} tokens are far beyond the {self.longest:,} that the "
                "profile was calibrated on"
            )
        return None

    def after(self, answer: Answer, sparse_tokens: int = 0) -> str | None:
        """Why a document is to run again, dense, if it is: by what the method kept of it.

        Its first `sparse_tokens` had blocks of attention chosen; where that is 0, attention is not compared.
        """
        if answer.method == DENSE:  # with others about the same document
            return None
        for name, tokens, share in _kept(answer, sparse_tokens):
            if name not in self.bounds:
                continue
            bound = self.bounds[name].at(tokens)
            if share > bound + SLACK * max(0.0, 1 - bound):
                return f"{FLAT}: {name} is {share:.2f}, and at most {bound:.2f} was calibrated on"
        return None


def _kept(answer: Answer, sparse_tokens: int) -> Iterator[tuple[str, int, float]]:
    """What was kept of a document: name, length and value of each share that can be compared."""
    tokens = answer.prompt_tokens
    for name in SHARES:
        share = getattr(answer, name)
        if tokens is None or share is None:
            continue
        if name != ATTENTION:
            yield name, tokens, share
        elif sparse_tokens:
            yield name, sparse_tokens, _without_rest(share, tokens, sparse_tokens)


def _without_rest(share: float, tokens: int, sparse_tokens: int) -> float:
    """Of the pairs of a prompt's first `sparse_tokens` those that were computed.

    `share` is that of all pairs, of which those of the other tokens' queries were computed throughout.
    """
    if sparse_tokens == tokens:
        return share
    part = sparse_tokens * (sparse_tokens + 1) / (tokens * (tokens + 1))
    return 1 - (1 - share) / part


def _by_length(told: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    return {name: {int(n): share for n, share in told.get(name, {}).items()} for name in SHARES}


def _from_octaves(name: str, most: Mapping[int, float]) -> dict[int, float]:
    """What profiles of before hold, as shares at the ends of each octave.

    Attention that was whole tells nothing of attention whose blocks were chosen.
    """
    told = {start: share for start, share in most.items() if name != ATTENTION or share < 1}
    return {tokens: share for start, share in told.items() for tokens in (start, 2 * start - 1)}


def spoken_for(tasks: Iterable[str], scores: Iterable[Any], *, sparse_from: int | None) -> dict[str, Any]:
    """What `Guard.of` reads in a profile, of the rows that settings were verified on.

    Each of `scores` has prompt tokens and the shares by their names. From `sparse_from` prompt tokens on
    blocks of attention were chosen; None: never.
    """
    every = list(scores)
    sparse = [score for score in every if sparse_from is not None and score.prompt_tokens >= sparse_from]
    shares = {}
    for name in SHARES:
        compared = sparse if name == ATTENTION else every
        shares[name] = _most((score.prompt_tokens, getattr(score, name)) for score in compared)
    return {"tasks": sorted(set(tasks)), "shares": shares}


def _most(shares: Iterable[tuple[int, float]]) -> dict[str, float]:
    """Of lengths that are about equal the most, at the shortest and the longest of them."""
    parts: dict[int, list[tuple[int, float]]] = {}
    for tokens, share in shares:
        parts.setdefault(int(PARTS * math.log2(tokens)), []).append((tokens, share))
    most: dict[str, float] = {}
    for _, each in sorted(parts.items()):
        highest = math.ceil(max(share for _, share in each) * 1e4) / 1e4
        most |= {str(tokens): highest for tokens, _ in (min(each), max(each))}
    return most
