"""Texts that end an answer, which special tokens may be part of, and where they cut it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

NO_CHARACTER = "\ufffd"  # what a tokenizer writes for bytes that are none
LONGEST_CHARACTER = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class StopTexts:
    """`texts`, at least one and none empty, end the answers that `tokenizer` decodes."""

    texts: tuple[str, ...]
    tokenizer: Any

    def found(self, tokens: Sequence[int], start: int | None = 0) -> bool:
        """Whether the newest tokens complete one of the texts in the answer, which begins at `start`.

        Where that is not 0, white space in front of the answer counts for nothing. None: it has not begun.
        """
        if start is None:
            return False
        tokens = self._without_space(tokens[start:]) if start else tokens
        # a token that is written is at least a byte: no text can reach further back than this
        reach = max(len(text.encode()) for text in self.texts) + LONGEST_CHARACTER
        newest = last_written(tokens, reach + 1, self._special)
        is_whole = len(newest) <= reach
        tail = self._decode(newest) if is_whole else self._from_a_character(newest[1:])
        if start and is_whole:
            tail = tail.lstrip()
        spelled = self._spelled(tokens[-reach:]) if self._marked else ""
        return any(text in tail for text in self.texts) or any(text in spelled for text in self._marked)

    def cut(self, tokens: Sequence[int], *, head: str = "", trims: bool = False) -> str | None:
        """The answer, `head` and then these tokens, up to the first of the texts; None if it has none.

        With `trims` white space in front counts for nothing.
        """
        text, by_special = head + self._decode(tokens), self._cut_by_special(tokens)
        before = None if by_special is None else head + by_special
        if trims:
            text, before = text.lstrip(), before and before.lstrip()
        ends = [text[: text.index(stop)] for stop in self.texts if stop in text]
        return min(ends if before is None else [*ends, before], key=len, default=None)

    def _from_a_character(self, tokens: Sequence[int]) -> str:
        """What tokens write, where the first may stand inside a character: from the next character on.

        SentencePiece writes a row of bytes that begins inside one as no characters at all.
        """
        texts = (self._decode(tokens[skipped:]) for skipped in range(LONGEST_CHARACTER))
        return next((text for text in texts if not text.startswith(NO_CHARACTER)), self._decode(tokens))

    def _without_space(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens from the first that writes more than white space."""
        begins = (
            place
            for place, token in enumerate(tokens)
            if token not in self._special and self._decode([token]).strip()
        )
        return tokens[next(begins, len(tokens)) :]

    def _cut_by_special(self, tokens: Sequence[int]) -> str | None:
        """What stands before the first text that special tokens are part of."""
        for place, token in enumerate(tokens):
            name = self._special.get(token)
            for head, rest in self._marked.values() if name is not None else ():
                if not rest.startswith(str(name)) or not self._spelled(tokens[place:]).startswith(rest):
                    continue
                before = self._decode(tokens[:place])
                if before.endswith(head):
                    return before.removesuffix(head)
        return None

    @cached_property
    def _special(self) -> dict[int, str]:
        """The tokens that are left out of answers, with their texts."""
        return special_tokens(self.tokenizer)

    @cached_property
    def _marked(self) -> dict[str, tuple[str, str]]:
        """Of each text with a special token in it, what stands before the first one, and the rest."""
        return {text: parts for text in self.texts for parts in self._parted(text)}

    def _parted(self, text: str) -> Iterator[tuple[str, str]]:
        places = [text.index(name) for name in self._special.values() if name in text]
        if places:
            yield text[: min(places)], text[min(places) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _spelled(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that are left out of a text, with what they are called."""
    return {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def last_written(tokens: Sequence[int], count: int, special: dict[int, str]) -> list[int]:
    """The last `count` tokens, or all there are, that are not special."""
    kept: list[int] = []
    for token in reversed(tokens):
        if len(kept) == count:
            break
        if token not in special:
            kept.append(token)
    return kept[::-1]
