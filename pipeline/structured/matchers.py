"""What a row's answer may go on with, token by token, under the form that it is to have.

Letters: V tokens of the vocabulary, W words of 32 bits, one bit a token, of which the lowest is the first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pipeline.records import ChoiceLogprob
from pipeline.structured.grammars import cause


class Matcher(Protocol):
    """An answer that grows under a form, and knows which tokens may follow."""

    error: str | None  # why it cannot go on though it is not complete

    def fill(self, mask_W: np.ndarray) -> None:
        """Write the tokens that may follow, as bits, to a row of int32; tokens that end it among them."""
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
        self._matcher, self._tokens = matcher, tokens
        self._taken: list[int] = []

    def fill(self, mask_W: np.ndarray) -> None:
        if self.error is None:
            self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
            mask_W &= ~self._tokens.barred_W
            if self.is_complete:
                mask_W |= self._tokens.stops_W
            if self._matcher.is_error():
                self.error = cause(self._matcher.get_error())
            elif not mask_W.any():
                self.error = "the model has no token that can follow"
        if self.error is not None:
            mask_W[:] = -1

    def take(self, token: int) -> None:
        if token in self._tokens.stops:
            return
        if self.error is None and not self._matcher.consume_token(token):
            self.error = cause(self._matcher.get_error())
        self._taken.append(token)

    @property
    def is_complete(self) -> bool:
        return self.error is None and bool(self._matcher.is_accepting())

    @property
    def is_ended(self) -> bool:
        return self.is_complete and bool(self._matcher.is_stopped())

    @property
    def text(self) -> str:
        text = str(self._tokens.library.decode_str(self._taken))
        return text.removeprefix(" ") if self._tokens.drops_first_space else text


@dataclass(frozen=True, kw_only=True, eq=False)
class GrammarTokens:
    """A model's tokens, as grammars need them."""

    library: Any  # the tokenizer of llguidance
    stops: frozenset[int]  # that end an answer
    stops_W: np.ndarray
    barred_W: np.ndarray  # what the library takes for an end, and tokens that the model does not know
    drops_first_space: bool  # of a text that is decoded


@dataclass(kw_only=True, eq=False)
class ChoiceNode:
    """A place in the tree of choices: those that begin with the tokens up to here."""

    choices: list[str] = field(default_factory=list)
    ends: str | None = None  # the choice that ends here
    following: dict[int, ChoiceNode] = field(default_factory=dict)  # by the next token


class ChoiceMatcher:
    """One of several texts, each by the tokens that the tokenizer gives it.

    Where one of them is the beginning of another, a token that ends the answer chooses it.
    """

    error: str | None = None

    def __init__(self, root: ChoiceNode, stops: Collection[int]) -> None:
        """`stops` are the tokens that end an answer."""
        self._node, self._stops = root, stops
        self._logprobs = dict.fromkeys(root.choices, 0.0)
        self._unknown: set[str] = set()

    def fill(self, mask_W: np.ndarray) -> None:
        mask_W[:] = mask_of(self.asked, len(mask_W))

    @property
    def asked(self) -> list[int]:
        """The tokens that may follow."""
        node = self._node
        return [*node.following, *(self._stops if node.ends is not None else ())]

    def take(self, token: int) -> None:
        self._node = self._node.following.get(token, self._node)

    def weigh(self, token: int, logits: Sequence[float]) -> None:
        """Learn the logits of the tokens `asked`, of which `token` was taken, before it is.

        Choices that part here from the one that is being written get their share; those that part together
        cannot be told from each other.
        """
        node, logits = self._node, list(logits)
        total = _log_sum_exp(logits)
        of_token = dict(zip(self.asked, logits, strict=True))
        shares = {next_: of_token[next_] for next_ in node.following}
        for next_, logit in shares.items():
            parted = node.following[next_].choices
            for choice in parted:
                self._logprobs[choice] += logit - total
            if next_ != token and len(parted) > 1:
                self._unknown.update(parted)
        if node.ends is not None:
            self._logprobs[node.ends] += _log_sum_exp([of_token[stop] for stop in self._stops]) - total

    @property
    def logprobs(self) -> list[ChoiceLogprob]:
        """Of each choice, in their order, how likely an answer that is drawn among them is this one.

        None where choices that begin alike were left together: how likely each of them is is not known.
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
