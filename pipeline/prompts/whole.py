"""Tokens of a whole prompt, and where they stand in its text.

Rows about one document follow each other, and a document takes long to tokenize. Of a prompt that begins as
the one before, only what stands around the document's end is tokenized, from a place before it on, until its
tokens agree with those of the prompt before: from there they would be the same, as no tokenizer looks far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.records import RowError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

REACH = 2048  # characters before the document's end that are tokenized again
LONG = 10_000  # characters, about a millisecond
AGREE = 32  # tokens in a row, which many words have


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of a text the tokens, those from `seam` on from an encoding of its end, which begins at `place`."""

    ids: list[int]
    begun: Encoding
    seam: int
    ended: Encoding | None = None
    place: int = 0

    def span(self, token: int) -> tuple[int, int]:
        """The characters of a token: the first and the one behind the last."""
        if self.ended is None or token < self.seam:
            return _span(self.begun, token)
        start, end = _span(self.ended, token - len(self.ids) + len(self.ended))
        return start + self.place, end + self.place


class WholeTexts:
    """Tokenizes prompts; `encode` may be called from any thread."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._latest: tuple[str, int, Encoding] | None = None

    def encode(self, text: str, shared: int) -> Tokens:
        """Tokens of a text that has its first `shared` characters in common with those that may follow."""
        latest = self._latest  # which another thread may change
        if latest is not None and latest[1] == shared and text.startswith(latest[0]):
            tokens = self._continued(text, shared, latest[2])
            if tokens is not None:
                return tokens
        encoding = encoded(self._backend, text)
        self._latest = (text[:shared], shared, encoding) if shared > 2 * REACH else None
        return Tokens(encoding.ids, encoding, len(encoding))

    def _continued(self, text: str, shared: int, begun: Encoding) -> Tokens | None:
        first = begun.char_to_token(shared - REACH)
        if first is None:
            return None
        place = _span(begun, first)[0]
        ended = encoded(self._backend, text[place:])
        found = _seam(begun, first, ended, place, shared - REACH // 4)
        if found is None:
            return None
        seam, token = found
        return Tokens(begun.ids[:seam] + ended.ids[token:], begun, seam, ended, place)


def _seam(begun: Encoding, first: int, ended: Encoding, place: int, last: int) -> tuple[int, int] | None:
    """The token of each at which both go on alike, past the beginning of the second and before `last`."""
    here, there = first, 0
    alike = 0
    begun_ids, ended_ids = begun.ids, ended.ids
    while here < len(begun) and there < len(ended):
        at, other = _span(begun, here)[0], _span(ended, there)[0] + place
        if at >= last:
            return None
        if at == other and begun_ids[here] == ended_ids[there]:
            alike += 1
            if alike == AGREE:
                return here, there
            here, there = here + 1, there + 1
        else:
            alike = 0
            here, there = here + (at <= other), there + (other <= at)
    return None


def _span(encoding: Encoding, token: int) -> tuple[int, int]:
    span = encoding.token_to_chars(token)
    assert span is not None, "a token that is of no text"
    return span


def encoded(backend: Tokenizer, text: str) -> Encoding:
    """The tokens of a text, without those that a tokenizer puts in front; a `RowError` if it is no text."""
    try:
        if len(text) > LONG:  # alone it would hold up all threads meanwhile, as a batch it does not
            return backend.encode_batch([text], add_special_tokens=False)[0]
        return backend.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeError) as error:
        raise RowError("bad_text", "the text is not valid Unicode (a lone surrogate)") from error
