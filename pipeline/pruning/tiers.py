"""Which tokens each layer of a prefill computed, and how, as a few bytes: the output's column `selection`.

One entry for each layer that ran, in that order. An entry is zlib's stream of a tag byte and bit planes, one
behind the other, each padded to whole bytes, the first token in the lowest bit. The tag says which planes
there are:

    1   which of the tokens that entered the layer go on to the next; without it, all of them
    2   which of the tokens that entered passed the feed-forward network; without it, those that go on
    4   which of the tokens that passed it did so in fp8; without it, none of them
    8   no plane: all tokens that passed it did so in fp8
    16  no plane: here the prefill began anew with the tokens that go on; the next entry is layer 0 again
    32  no layer: the tokens that go on are those that a draft model chose before the first one

So a token that has left costs nothing, nor does a layer that computes all tokens in one precision.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# bits of a mark, one byte for each token that entered a layer
LIVE, FFN, FP8 = 1, 2, 4

# states of a token in a layer, for those who read
GONE, SKIPPED, IN_FP8, IN_FULL = range(4)

_HAS_LIVE, _HAS_FFN, _HAS_FP8, _ALL_FP8, _RESTARTS, _CHOOSES = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True)
class LayerStates:
    """One layer of one pass; `states` has a byte for each token of the prompt."""

    number: int  # the pass, from 0
    layer: int
    states: np.ndarray  # (T,) uint8: GONE, SKIPPED, IN_FP8 or IN_FULL


def pack_layer(marks: np.ndarray, *, restarts: bool = False) -> bytes:
    """An entry, of the (n,) uint8 marks of the tokens that entered the layer."""
    live, ffn, fp8 = ((marks & bit).astype(bool) for bit in (LIVE, FFN, FP8))
    of_ffn = fp8[ffn]
    tag, planes = _RESTARTS if restarts else 0, []
    if not live.all():
        tag, planes = tag | _HAS_LIVE, [live]
    if not np.array_equal(ffn, live):
        tag, planes = tag | _HAS_FFN, [*planes, ffn]
    if len(of_ffn) and of_ffn.all():
        tag |= _ALL_FP8
    elif of_ffn.any():
        tag, planes = tag | _HAS_FP8, [*planes, of_ffn]
    content = b"".join(np.packbits(plane, bitorder="little").tobytes() for plane in planes)
    return zlib.compress(bytes([tag]) + content)


def pack_choice(chosen: np.ndarray) -> bytes:
    """An entry before all layers, of the (n,) bool tokens of a prompt that a draft model has chosen."""
    return zlib.compress(bytes([_CHOOSES | _HAS_LIVE]) + np.packbits(chosen, bitorder="little").tobytes())


def unpack_layers(entries: Sequence[bytes], tokens: int) -> list[LayerStates]:
    """All layers of a prompt of so many tokens. Raises ValueError for bytes that are no such entries."""
    alive = np.arange(tokens)
    unpacked, number, layer = [], 0, 0
    for entry in entries:
        tag, live, ffn, fp8 = _planes(entry, len(alive))
        if tag & _CHOOSES:
            alive = alive[live]
            continue
        states = np.full(tokens, GONE, np.uint8)
        states[alive] = np.where(ffn, np.where(fp8, IN_FP8, IN_FULL), SKIPPED)
        unpacked.append(LayerStates(number, layer, states))
        alive = alive[live]
        number, layer = (number + 1, 0) if tag & _RESTARTS else (number, layer + 1)
    return unpacked


def _planes(entry: bytes, entered: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """The tag, and as (n,) bools of the tokens that entered: who goes on, passes the FFN, and that in fp8."""
    try:
        content = _unpacked(entry, most=1 + 3 * ((entered + 7) // 8))
    except zlib.error as error:
        raise ValueError(f"no selection of a layer: {error}") from error
    tag, at = content[0], 1

    def plane(count: int) -> np.ndarray:
        nonlocal at
        size = (count + 7) // 8
        bits = np.unpackbits(
            np.frombuffer(content[at : at + size], np.uint8), count=count, bitorder="little"
        ).astype(bool)
        at += size
        return bits

    live = plane(entered) if tag & _HAS_LIVE else np.ones(entered, bool)
    ffn = plane(entered) if tag & _HAS_FFN else live
    fp8 = ffn & bool(tag & _ALL_FP8)
    if tag & _HAS_FP8:
        fp8[ffn] = plane(int(ffn.sum()))
    if at != len(content):
        raise ValueError("a layer's selection is of another prompt")
    return tag, live, ffn, fp8


def _unpacked(entry: bytes, *, most: int) -> bytes:
    """A tag and planes of `most` bytes at most; the file may have packed more than any memory."""
    stream = zlib.decompressobj()
    content = stream.decompress(entry, most + 1)
    if len(content) > most:
        raise ValueError("a layer's selection is of another prompt")
    if not content or not stream.eof:
        raise ValueError("no selection of a layer: it is cut")
    return content
