"""What each token adds to a text, so that a reader can show tokens without their tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MOST_OF_ONE = 8  # tokens that may make one character; a longer wait means that the text itself is broken
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def token_pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds, behind the one before it; joined, they are the decoded text.

    A character of several tokens is the last one's, and the others add nothing. Each token is decoded with
    those since the last whole character, for some tokenizers drop the space of a text's first word.
    """
    pieces = []
    start = done = 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:done]), decode(ids[start:end])
        if now.endswith(_BROKEN) and end - done < MOST_OF_ONE and end < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        start, done = done, end
    return pieces
