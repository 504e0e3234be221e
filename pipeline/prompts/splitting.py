"""Documents longer than the context, cut into parts that fit. No tensors here.

Parts are runs of whole tokens: of those that the document's text has when it is tokenized on its own. Each is
tokenized again as a document, which can give a few tokens more at its edges, and cut shorter until it fits.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.inputs.rows import is_blank
from pipeline.records import Document, EncodedDocument, Row, RowError

if TYPE_CHECKING:
    from pipeline.prompts.builder import PromptBuilder

_NEWLINE = r"(?:\r\n|[\n\v\f\r\x85\u2028\u2029])"
_BLANK = r"[^\S\n\v\f\r\x85\u2028\u2029]"
_SENTENCE = r"[.!?\u2026\u061f\u06d4\u0964][\"'\u2019\u201d\u00bb)\]]{0,3}\s+"
_CJK_SENTENCE = r"[\u3002\uff01\uff1f][\u2019\u201d\u300d\u300f\uff09]{0,3}"
# where a part may end, the best first: behind a paragraph, a sentence, a line, a word. The repetitions within
# are bounded or cannot fail, so that no text makes the search slow.
BOUNDS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_NEWLINE}(?:{_BLANK}*{_NEWLINE})+|[\f\u2029]",
        rf"{_SENTENCE}|{_CJK_SENTENCE}",
        _NEWLINE,
        r"\s+",
    )
)
# of a part: a bound that leaves it shorter, or with fewer tokens that are new, gives way to a lesser one
LEAST_FILLED = 1 / 2
LEAST_NEW = 1 / 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Characters `start` to `end` of a document, and their prompt: None where they are white space."""

    start: int
    end: int
    encoded: EncodedDocument | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitDocument:
    """A row whose document is answered part by part; at least one part has a prompt."""

    source: Row
    parts: tuple[Part, ...]
    document_tokens: int
    tokenize_ms: float

    @property
    def prompts(self) -> list[EncodedDocument]:
        return [part.encoded for part in self.parts if part.encoded is not None]

    @property
    def prompt_tokens(self) -> int:
        """Of all parts together."""
        return sum(prompt.prompt_tokens for prompt in self.prompts)


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """A text and where its tokens begin; positions count tokens, and are first tokens of a character."""

    text: str
    starts_T: np.ndarray  # characters, ascending

    def __len__(self) -> int:
        return len(self.starts_T)

    def char(self, token: int) -> int:
        """The character at which a token begins; for the one behind the last, the end of the text."""
        return int(self.starts_T[token]) if token < len(self) else len(self.text)

    def settle(self, token: int) -> int:
        """The nearest token, not behind this one, that begins a character and does not divide CR and LF."""
        token = self._first_of(self.char(token))
        char = self.char(token)
        if 0 < char < len(self.text) and self.text[char - 1 : char + 1] == "\r\n":
            token = self._first_of(self.char(token - 1))
        return token

    def end_of_part(self, first: int, room: int, least: int) -> int:
        """Where a part ends that begins at token `first`: at the last of the best bounds in reach.

        It has at most `room` tokens, and at least `least` unless that would divide a character.
        """
        if first + room >= len(self):
            return len(self)
        low, high = self.char(first + least), self.char(first + room)
        for pattern in BOUNDS:
            char = max((found.end() for found in pattern.finditer(self.text, low, high)), default=None)
            if char is not None:
                end = self.settle(int(np.searchsorted(self.starts_T, char, "right")) - 1)
                if end >= first + least:
                    return end
        return self.settle(first + room)

    def begin_of_next(self, first: int, end: int, overlap: int) -> int:
        """Where the part begins that follows one of the tokens `first` to `end`; always behind `first`."""
        begin = self.settle(max(end - overlap, 0))
        if begin <= first:  # a character of more tokens than the overlap
            begin = int(np.searchsorted(self.starts_T, self.char(first), "right"))
        return min(begin, end)

    def _first_of(self, char: int) -> int:
        return int(np.searchsorted(self.starts_T, char, "left"))


def cut_parts(
    text: TokenizedText, *, room: int, overlap: int, encode: Callable[[str], EncodedDocument | None]
) -> Iterator[Part]:
    """Parts that cover the text in order, each sharing its first `overlap` tokens with the one before.

    `room` is how many tokens of the text a part may have, at least twice the overlap. `encode` makes the
    prompt of a part; where it raises a `RowError` with excess tokens, the part is made shorter. Raises
    `RowError` where no part would fit.
    """
    first = 0
    while True:
        end, part = _part_that_fits(text, first, room, overlap, encode)
        yield part
        if end == len(text):
            return
        first = text.begin_of_next(first, end, overlap)


def _part_that_fits(
    text: TokenizedText, first: int, room: int, overlap: int, encode: Callable[[str], EncodedDocument | None]
) -> tuple[int, Part]:
    start = text.char(first)
    while room > overlap:
        least = max(math.ceil(room * LEAST_FILLED), min(room, overlap + math.ceil(room * LEAST_NEW)))
        token = text.end_of_part(first, room, least)
        if token <= first:
            break
        end = text.char(token)
        try:
            return token, Part(start=start, end=end, encoded=encode(text.text[start:end]))
        except RowError as error:
            if not error.excess_tokens:
                raise
            room = min(room, token - first) - max(1, error.excess_tokens)
    raise RowError(
        "over_long",
        f"the document cannot be cut at character {start:,}: there is no room for a part of more than"
        f" --split-overlap {overlap}; shorten the question or lower --max-new-tokens",
    )


def groups_that_fit(sizes: Sequence[int], room: int) -> list[range]:
    """Neighbours in groups of together at most `room`; one that is larger stands alone."""
    groups: list[range] = []
    total = 0
    for index, size in enumerate(sizes):
        if groups and total + size <= room:
            groups[-1] = range(groups[-1].start, index + 1)
            total += size
        else:
            groups.append(range(index, index + 1))
            total = size
    return groups


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """Prompts of rows, of which those that are too long are cut; `combine` makes those of a later step."""

    prompts: PromptBuilder
    combine: PromptBuilder
    overlap: int  # tokens
    formed: bool = False  # whether all rows' answers are to have a form

    def encode(self, document: Document) -> EncodedDocument | SplitDocument:
        """As `PromptBuilder.encode`; raises `RowError` where even a part of the document would be."""
        began = time.perf_counter()
        try:
            return self.prompts.encode(document)
        except RowError as error:
            if not error.excess_tokens:
                raise
            return self._split(document, began, error)

    def combining(self, row: Row) -> Row:
        """The row as the prompt that combines has a place for it: perhaps without its question."""
        return replace(row, question=row.question if self.combine.uses_question else None, turns=())

    def _split(self, document: Document, began: float, error: RowError) -> SplitDocument:
        room = self.prompts.room(document.source)
        if room < 1:
            raise error
        if room < 2 * self.overlap:
            raise RowError(
                "over_long",
                f"--split-overlap {self.overlap:,} is more than half of the {room:,} tokens that a part has"
                " room for beside instruction and question; lower it",
            )
        if self.combine.room(self.combining(document.source)) < 1:
            message = "the prompt that combines answers has no room for any; shorten it or the question"
            raise RowError("over_long", message)
        assert error.document_tokens is not None
        text = TokenizedText(document.text, self.prompts.token_starts(document.text))

        def encode(part: str) -> EncodedDocument | None:
            return None if is_blank(part) else self.prompts.encode(replace(document, text=part))

        parts = tuple(cut_parts(text, room=room, overlap=self.overlap, encode=encode))
        if not any(part.encoded for part in parts):
            raise RowError("empty_document", "the document is white space alone")
        ready_at = time.perf_counter()
        return SplitDocument(
            source=document.source,
            parts=tuple(_named(part, n, len(parts), ready_at) for n, part in enumerate(parts, start=1)),
            document_tokens=error.document_tokens,
            tokenize_ms=(ready_at - began) * 1e3,
        )


def _named(part: Part, number: int, count: int, ready_at: float) -> Part:
    """The part with a prompt that says of itself which it is."""
    if part.encoded is None:
        return part
    source = part.encoded.source
    source = replace(source, place=f"{source.place}, part {number} of {count}")
    encoded = replace(part.encoded, source=source, ready_at=ready_at, is_final=False)
    return replace(part, encoded=encoded)
