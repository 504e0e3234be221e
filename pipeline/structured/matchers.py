"""What a row's answer may go on with, token by token, under the form that it is to have.

Letters: B rows, V tokens of the vocabulary, W words of 32 bits, one bit a token, of which the lowest is the
first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.records import ChoiceLogprob
from pipeline.structured.grammars import cause, llguidance


class Matcher(Protocol):
    """An answer that grows under a form, and knows which tokens may follow."""

    error: str | None  # why it cannot go on though it is not complete

    @property
    def is_open(self) -> bool:
        """Whether nearly anything may follow, as in a string."""
        ...

    def allows(self, token: int) -> bool:
        """Whether a token may follow."""
        ...

    def take(self, token: int) -> None:
        """Go on with a token, which must be one of those that may follow."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether what there is has the form."""
        ...

    @property
    def is_ended(self) -> bool:
        """Whether it has the form and nothing may follow, but for a token that ends it."""
        ...

    @property
    def text(self) -> str:
        """What was taken, as a text."""
        ...


class GrammarMatcher:
    """Under a grammar of llguidance."""

    def __init__(self, matcher: Any, tokens: GrammarTokens) -> None:
        """`matcher` is one of the library's, at its beginning."""
        self.error: str | None = None
        self.library, self.tokens = matcher, tokens
        self._taken: list[int] = []

    def allow(self, mask_W: np.ndarray) -> None:
        """Make the tokens that the library allows, of those that the model knows, those that may follow.

        All, where there is an error.
        """
        if self.error is None:
            if self.is_complete:
                mask_W |= self.tokens.stops_W
            if self.library.is_error():
                self.error = cause(self.library.get_error())
            elif not mask_W.any():
                self.error = "the model has no token that can follow"
        if self.error is not None:
            mask_W[:] = -1

    @property
    def is_open(self) -> bool:
        return self.error is None and all(map(self._follows, self.tokens.common))

    def allows(self, token: int) -> bool:
        if token in self.tokens.stops:
            return self.is_complete
        is_known = self.tokens.known_W[token // 32] >> token % 32 & 1
        return bool(is_known) and self._follows(token)

    def _follows(self, token: int) -> bool:
        return bool(self.library.validate_tokens([token]))

    def take(self, token: int) -> None:
        if token in self.tokens.stops:
            return
        if self.error is None and not self.library.consume_token(token):
            self.error = cause(self.library.get_error())
        self._taken.append(token)

    @property
    def is_complete(self) -> bool:
        return self.error is None and bool(self.library.is_accepting())

    @property
    def is_ended(self) -> bool:
        return self.is_complete and bool(self.library.is_stopped())

    @property
    def text(self) -> str:
        text = str(self.tokens.library.decode_str(self._taken))
        return text.removeprefix(" ") if self.tokens.drops_first_space else text


@dataclass(frozen=True, kw_only=True, eq=False)
class GrammarTokens:
    """A model's tokens, as grammars need them."""

    library: Any  # the tokenizer of llguidance
    stops: frozenset[int]  # that end an answer
    stops_W: np.ndarray
    known_W: np.ndarray  # that the model knows, but for what the library takes for an end
    drops_first_space: bool  # of a text that is decoded
    common: tuple[int, ...]  # a few of different kinds, which may follow wherever nearly any may


@dataclass(kw_only=True, eq=False)
class ChoiceNode:
    """A place in the tree of choices: those that begin with the tokens up to here."""

    choices: list[str] = field(default_factory=list)
    ends: str | None = None  # the choice that ends here
    following: dict[int, ChoiceNode] = field(default_factory=dict)  # by the next token


class Visit(NamedTuple):
    """A place of the tree of choices beside the answer, which is to be weighed."""

    token: int  # that leads there
    length: int  # tokens from the beginning up to it
    node: ChoiceNode


class ChoiceMatcher:
    """One of several texts, each by the tokens that the tokenizer gives it.

    Where one of them is the beginning of another, a token that ends the answer chooses it.
    """

    error: str | None = None

    def __init__(self, root: ChoiceNode, stops: Collection[int]) -> None:
        """`stops` are the tokens that end an answer."""
        self._path, self._stops = [root], stops
        self._logprobs = dict.fromkeys(root.choices, 0.0)
        self._unknown = set(root.choices)

    @property
    def _node(self) -> ChoiceNode:
        return self._path[-1]

    @property
    def asked(self) -> list[int]:
        """The tokens that may follow."""
        return self.asked_at(self._node)

    def asked_at(self, node: ChoiceNode) -> list[int]:
        """The tokens that may follow at a place of the tree."""
        return [*node.following, *(self._stops if node.ends is not None else ())]

    @property
    def is_open(self) -> bool:
        return False

    def allows(self, token: int) -> bool:
        return token in self.asked

    def take(self, token: int) -> None:
        if token in self._node.following:
            self._path.append(self._node.following[token])

    def weigh(self, logits: Sequence[float], node: ChoiceNode | None = None) -> None:
        """Learn the logits of the tokens that may follow at a place, by default where the answer is.

        Choices that part here from all others get their share.
        """
        node = node or self._node
        self._unknown.difference_update(node.choices)
        of_token = dict(zip(self.asked_at(node), logits, strict=True))
        total = _log_sum_exp(list(of_token.values()))
        for token, following in node.following.items():
            for choice in following.choices:
                self._logprobs[choice] += of_token[token] - total
            if len(following.choices) > 1:
                self._unknown.update(following.choices)
        if node.ends is not None:
            self._logprobs[node.ends] += _log_sum_exp([of_token[stop] for stop in self._stops]) - total

    def visits(self, most: int) -> list[Visit]:
        """The places beside the answer that are still to be weighed, up to so many tokens from the beginning.

        They are in the order of a walk through the tree, in which each place comes behind those above it.
        """
        found: list[Visit] = []

        def walk(node: ChoiceNode, length: int) -> None:
            for token, following in node.following.items():
                if len(following.choices) > 1 and following not in self._path and length < most:
                    found.append(Visit(token, length + 1, following))
                    walk(following, length + 1)

        for length, node in reversed(list(enumerate(self._path))):
            walk(node, length)
        return found

    @property
    def logprobs(self) -> list[ChoiceLogprob]:
        """Of each choice, in their order, how likely an answer that is drawn among them is this one.

        None where choices begin alike, and the place where they part was not weighed.
        """
        return [
            ChoiceLogprob(choice=choice, logprob=None if choice in self._unknown else logprob)
            for choice, logprob in self._logprobs.items()
        ]

    @property
    def is_complete(self) -> bool:
        return self._node.ends is not None

    @property
    def is_ended(self) -> bool:
        return self.is_complete and not self._node.following

    @property
    def text(self) -> str:
        return self._node.ends or ""


def fill_masks(matchers: Mapping[int, Matcher], mask_BW: np.ndarray) -> None:
    """Write to rows of int32, as bits, the tokens that may follow; tokens that end an answer among them.

    `matchers` are by their row, of one model. Grammars are looked at side by side, on as many cores as the
    library takes.
    """
    grammars = {row: each for row, each in matchers.items() if isinstance(each, GrammarMatcher)}
    going = [(each.library, row) for row, each in grammars.items() if each.error is None]
    if len(going) == 1:
        ((library, row),) = going
        library.unsafe_compute_mask_ptr(mask_BW[row].ctypes.data, mask_BW[row].nbytes)
    elif going:
        _executor().unsafe_compute_mask_ptr(going, mask_BW.ctypes.data, mask_BW[0].nbytes, len(mask_BW))
    if grammars:
        rows = list(grammars)
        mask_BW[rows] &= next(iter(grammars.values())).tokens.known_W
    for row, matcher in matchers.items():
        if isinstance(matcher, ChoiceMatcher):
            mask_BW[row] = mask_of(matcher.asked, mask_BW.shape[1])
        else:
            assert isinstance(matcher, GrammarMatcher)
            matcher.allow(mask_BW[row])


@cache
def _executor() -> Any:
    """The library's threads, those of a process."""
    return llguidance("a form").LLExecutor()


def choice_tree(tokens_of: Mapping[str, Sequence[int]]) -> ChoiceNode:
    """The tree of choices by their tokens, which differ from each other's."""
    root = ChoiceNode()
    for choice, tokens in tokens_of.items():
        node = root
        node.choices.append(choice)
        for token in tokens:
            node = node.following.setdefault(token, ChoiceNode())
            node.choices.append(choice)
        node.ends = choice
    return root


def lengths(node: ChoiceNode, above: int = 0) -> Iterator[tuple[int, str]]:
    """How many tokens each choice of a tree has that lies under so many others."""
    if node.ends is not None:
        yield above, node.ends
    for following in node.following.values():
        yield from lengths(following, above + 1)


def begins_another(node: ChoiceNode) -> str | None:
    """A choice of a tree that is the beginning of another; None where there is none."""
    if node.ends is not None and node.following:
        return node.ends
    return next(filter(None, map(begins_another, node.following.values())), None)


def mask_of(tokens: Collection[int], words: int) -> np.ndarray:
    """(W,) int32 in which these tokens' bits are set."""
    mask_W = np.zeros(words, np.uint32)
    for token in tokens:
        mask_W[token // 32] |= np.uint32(1 << token % 32)
    return mask_W.view(np.int32)


def most_asked(node: ChoiceNode, stops: int) -> int:
    """How many tokens may follow at most, at any place of a tree, where so many tokens end an answer."""
    own = len(node.following) + (stops if node.ends is not None else 0)
    return max([own, *(most_asked(each, stops) for each in node.following.values())])


def _log_sum_exp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values)) if math.isfinite(most) else most
