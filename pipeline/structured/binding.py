"""Forms of answers bound to a model's tokenizer, whose tokens an answer is made of."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from functools import cached_property
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from pipeline.errors import ConfigError
from pipeline.records import OPENS, ResponseFormat
from pipeline.structured.grammars import cause, choices_of, grammar_of, llguidance
from pipeline.structured.matchers import (
    ChoiceMatcher,
    ChoiceNode,
    GrammarMatcher,
    GrammarTokens,
    Matcher,
    begins_another,
    choice_tree,
    lengths,
    mask_of,
    most_asked,
)

MOST_FORMS = 256  # different ones that are held
# of the tokens, for llguidance to allow or leave out as a whole: those of white space, and by their length
# those without quotes and escapes. A string that may have few characters more wants short ones: with these a
# mask takes a fifth less time than with the library's own, of up to 10 and up to 30
LENGTHS = (3, 6, 10, 15, 30)
PLAIN = r'[^"\\\x00-\x1F\x7F]'
SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{PLAIN}{{1,{length}}}" for length in LENGTHS), f"{PLAIN}+"]
COMMON = "a7"  # a letter and a digit
# of llguidance, by the model's: each takes a second to make
_made: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class BoundForms:
    """Makes the matchers of answers by a model with this tokenizer."""

    def __init__(self, tokenizer: Any, vocab: int, stops: Collection[int]) -> None:
        """The model knows `vocab` tokens, of which `stops` end an answer."""
        self._tokenizer, self.vocab = tokenizer, vocab
        self.stops = frozenset(token for token in stops if token < vocab)
        self._tokens: GrammarTokens | None = None
        self._begun: dict[ResponseFormat, Any] = {}  # the library's matchers, at their beginning
        self._trees: dict[tuple[ResponseFormat, bool], ChoiceNode] = {}

    @property
    def words(self) -> int:
        """Of 32 bits, in a mask, which has a bit for each token of the tokenizer and of the model."""
        return -(-max(self.vocab, len(self._tokenizer)) // 32)

    @cached_property
    def stops_W(self) -> np.ndarray:
        """The mask of the tokens that end an answer."""
        return mask_of(self.stops, self.words)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    @cached_property
    def opener(self) -> int | None:
        """The token by which an answer may begin with reasoning; None where no single one does."""
        token = self._tokenizer.get_added_vocab().get(OPENS)
        return token if token is not None and token < self.vocab else None

    def check(self, form: ResponseFormat, place: str, most: int) -> None:
        """Raise ConfigError, in a line that begins with `place`, for a form that this model cannot write.

        So it does for choices of more than `most` tokens.
        """
        try:
            if form.kind == "choices":
                length, choice = max(
                    each for parts in (False, True) for each in lengths(self._tree(form, parts))
                )
                if length > most:
                    raise ConfigError(f"{choice!r} has {length} tokens, more than --max-new-tokens {most}")
            else:
                self.matcher(form)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error

    def matcher(self, form: ResponseFormat, after: int | None = None) -> Matcher:
        """That of an answer, behind a prompt whose last token is `after`. Raises ConfigError."""
        if form.kind == "choices":
            return ChoiceMatcher(self._tree(form, self._parts_by_space(after)), self.stops)
        if self._tokens is None:
            self._tokens = self._grammar_tokens()
        if form not in self._begun:
            if len(self._begun) >= MOST_FORMS:
                self._begun.clear()
            self._begun[form] = self._matcher(form, self._tokens)
        return GrammarMatcher(self._begun[form].deep_copy(), self._tokens)

    def most_asked(self, form: ResponseFormat) -> int:
        """How many tokens may follow at most at any place of an answer; 0 where that is not counted."""
        if form.kind != "choices":
            return 0
        return max(most_asked(self._tree(form, parts), len(self.stops)) for parts in (False, True))

    def _grammar_tokens(self) -> GrammarTokens:
        library = _library_tokenizer(self._tokenizer, 32 * self.words)
        space = self._tokenizer.encode(" a", add_special_tokens=False)
        decoded = self._tokenizer.decode(space, skip_special_tokens=True)
        return GrammarTokens(
            library=library,
            stops=self.stops,
            stops_W=self.stops_W,
            known_W=~mask_of({*library.eos_tokens, *range(self.vocab, 32 * self.words)}, self.words),
            drops_first_space=library.decode_str(space) == f" {decoded}",
            common=tuple(chain.from_iterable(map(library.tokenize_str, COMMON))),
        )

    def _matcher(self, form: ResponseFormat, tokens: GrammarTokens) -> Any:
        grammar = grammar_of(form, may_begin_with_space=tokens.drops_first_space)
        matcher = llguidance("a form").LLMatcher(tokens.library, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(cause(matcher.get_error()))
        return matcher

    def _parts_by_space(self, after: int | None) -> bool:
        """Whether an answer behind this token begins with the space that parts two words."""
        if after is None or after in self._added:
            return False
        text = str(self._tokenizer.decode([after]))
        return bool(text) and not text[-1].isspace()

    def _tree(self, form: ResponseFormat, parts_by_space: bool) -> ChoiceNode:
        key = form, parts_by_space
        if key not in self._trees:
            self._trees[key] = self._grown(choices_of(form), parts_by_space)
        return self._trees[key]

    def _grown(self, choices: list[str], parts_by_space: bool) -> ChoiceNode:
        tokens_of = {choice: self._choice_tokens(choice, parts_by_space) for choice in choices}
        by_tokens: dict[tuple[int, ...], str] = {}
        for choice, tokens in tokens_of.items():
            other = by_tokens.setdefault(tokens, choice)
            if other is not choice:
                raise ConfigError(f"the model's tokenizer writes {other!r} and {choice!r} alike")
        root = choice_tree(tokens_of)
        if not self.stops and (beginning := begins_another(root)):
            raise ConfigError(
                f"{beginning!r} begins another choice, and the model has no token to end it with"
            )
        return root

    def _choice_tokens(self, choice: str, parts_by_space: bool) -> tuple[int, ...]:
        """As the tokenizer writes it: one that puts a space in front of a text needs none of ours."""
        tokens = self._encoded(choice)
        if parts_by_space and not str(self._tokenizer.convert_ids_to_tokens(tokens[0])).startswith("▁"):
            tokens = self._encoded(f" {choice}")
        beyond = [token for token in tokens if token >= self.vocab or token == self._tokenizer.unk_token_id]
        if beyond:
            raise ConfigError(f"the model has no tokens for {choice!r}")
        return tuple(tokens)

    def _encoded(self, text: str) -> list[int]:
        tokens = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if not tokens:
            raise ConfigError(f"the model has no tokens for {text!r}")
        return list(tokens)


def _library_tokenizer(tokenizer: Any, size: int) -> Any:
    """The tokenizer of llguidance for masks of so many bits."""
    made = _made.get(tokenizer)
    if made is None or made.vocab_size != size:
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        library = llguidance("a form")
        try:
            made = library.LLTokenizer(
                backend.to_str(), n_vocab=size, eos_token=tokenizer.eos_token_id, slices=SLICES
            )
        except ValueError as error:
            raise ConfigError(f"llguidance cannot use the model's tokenizer: {cause(str(error))}") from error
        _made[tokenizer] = made
    return made
