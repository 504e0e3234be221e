"""Where an answer's tokens end inside a character, whose bytes are spread over several of them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from pipeline.generation.stopping import LONGEST_CHARACTER, NO_CHARACTER, last_written, special_tokens

FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # what SentencePiece calls a token of one byte
# what GPT-2 calls bytes: those that can be printed by their characters, the others by what follows 255
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = {
    chr(name): byte
    for name, byte in chain(
        ((byte, byte) for byte in PRINTED),
        enumerate((byte for byte in range(256) if byte not in PRINTED), start=256),
    )
}


def whole_characters(tokens: Sequence[int], tokenizer: Any) -> str:
    """The text of `tokens`, special ones left out, without the bytes of a character that is not complete.

    A replacement character that the tokens spell, or that stands for bytes that none could complete, stays.
    """
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    if not text.endswith(NO_CHARACTER):
        return text
    written = last_written(tokens, len(tokens), special_tokens(tokenizer))
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(written[-LONGEST_CHARACTER:])]
    bytes_left = pending(chain.from_iterable(map(_bytes_of, names)))
    if not bytes_left:
        return text
    if FALLBACK.fullmatch(names[-1]):  # each such byte is written as a character of its own
        return str(tokenizer.decode(written[:-bytes_left], skip_special_tokens=True))
    return text.removesuffix(NO_CHARACTER)


def pending(values: Iterable[int]) -> int:
    """How many bytes at the end begin a character in UTF-8 and do not complete it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(bytes(values))
    return len(decoder.getstate()[0])


def _bytes_of(name: str) -> bytes:
    """What a token stands for: the bytes that its name spells, or else the name itself."""
    if fallback := FALLBACK.fullmatch(name):
        return bytes.fromhex(fallback[1])
    if all(character in BYTES for character in name):
        return bytes(BYTES[character] for character in name)
    return name.encode()
