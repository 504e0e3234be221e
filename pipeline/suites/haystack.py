"""Haystacks: sentences of the user's own documents, in random order of documents, of a wanted length."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TokenCounter = Callable[[Sequence[str]], Sequence[int]]

_PARAGRAPHS = re.compile(r"\s*\n\s*\n\s*")
_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。\uff01\uff1f])\s*|\s*\n\s*")
_LONGEST_SENTENCE = 400  # characters; a longer one is cut, for tables and code have no sentences
_WORD = re.compile(r"[\w-]+")


def token_counter(tokenizer: PreTrainedTokenizerFast) -> TokenCounter:
    """How many tokens each of some texts has by itself, without special tokens."""

    def count(texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    return count


@dataclass(frozen=True, slots=True)
class Pool:
    """All sentences that haystacks are made of, each counted once."""

    sentences: tuple[str, ...]  # with the space or blank line before each
    tokens: tuple[int, ...]
    documents: tuple[range, ...]  # the sentences of each document, at least one
    words: frozenset[str]  # in them, in lower case
    count_tokens: TokenCounter

    @classmethod
    def of(
        cls, texts: Sequence[str], characters: int, count_tokens: TokenCounter, rng: random.Random
    ) -> Pool:
        """Sentences of documents in random order, `characters` in all; `InputError` if there are none."""
        sentences: list[str] = []
        documents: list[range] = []
        left = characters
        for text in rng.sample(texts, len(texts)):
            if found := _sentences(text[:left]):
                documents.append(range(len(sentences), len(sentences) + len(found)))
                sentences += found
                left -= sum(map(len, found))
            if left <= 0:
                break
        if not sentences:
            raise InputError("no text in the documents to hide needles in")
        words = frozenset(word for sentence in sentences for word in _WORD.findall(sentence.lower()))
        counts = tuple(count_tokens(sentences))
        return cls(tuple(sentences), counts, tuple(documents), words, count_tokens)

    def draw(self, tokens: int, rng: random.Random) -> list[int]:
        """Indices of a random haystack's sentences: as many as have at most `tokens` together.

        It begins at a random sentence of a random document, goes on with that document to its end and then
        with the others in random order, and begins again where all of them are not enough.
        """
        chosen: list[int] = []
        left = tokens
        for index in self._shuffled(rng):
            if self.tokens[index] > left:
                break
            chosen.append(index)
            left -= max(self.tokens[index], 1)
        return chosen

    def _shuffled(self, rng: random.Random) -> Iterator[int]:
        """All sentences from a random one on, documents in random order, again and again."""
        first, *others = rng.sample(self.documents, len(self.documents))
        start = rng.randrange(len(first))
        return itertools.cycle(itertools.chain(first[start:], *others, first[:start]))


def _sentences(text: str) -> list[str]:
    """Those of a document, each with what goes before it: a blank line before a paragraph, else a space."""
    found = []
    for paragraph in _PARAGRAPHS.split(text):
        before = "\n\n"
        for sentence in _SENTENCES.split(paragraph):
            for piece in _pieces(sentence.strip()):
                found.append(before + piece)
                before = " "
    return found


def _pieces(sentence: str) -> list[str]:
    """A sentence cut at spaces, or else anywhere, into pieces that are not too long."""
    pieces = []
    while len(sentence) > _LONGEST_SENTENCE:
        cut = sentence.rfind(" ", 1, _LONGEST_SENTENCE + 1)
        cut = cut if cut > 0 else _LONGEST_SENTENCE
        pieces.append(sentence[:cut])
        sentence = sentence[cut:].lstrip()
    return [*pieces, sentence] if sentence else pieces
