"""Putting documents together so that a pack fills the GPU and fits its memory. No tensors here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from pipeline.records import EncodedDocument

WINDOW_DOCUMENTS = 256
WINDOW_TOKENS = 4_000_000

T = TypeVar("T")


def windows(
    items: Iterable[T],
    size: Callable[[T], int],
    *,
    documents: int = WINDOW_DOCUMENTS,
    tokens: int = WINDOW_TOKENS,
) -> Iterator[list[T]]:
    """Cut a stream into runs of at most `documents` items and about `tokens` tokens.

    Packs are formed within a window, so a window bounds both the rows held in memory and how far an
    answer can be from its input order.
    """
    window: list[T] = []
    held = 0
    for item in items:
        window.append(item)
        held += size(item)
        if len(window) >= documents or held >= tokens:
            yield window
            window, held = [], 0
    if window:
        yield window


def make_packs(
    documents: Sequence[EncodedDocument],
    *,
    pack_tokens: int,
    max_bytes: int | None = None,
    planned_bytes: Callable[[Sequence[int]], int] = lambda lengths: 0,
    may_share: Callable[[Sequence[int]], bool] = lambda lengths: True,
) -> list[list[EncodedDocument]]:
    """Packs of documents of like length, longest first, each within the token and byte budgets.

    A document over a budget of its own gets a pack of its own: whether it can run is the engine's to say.
    `may_share` says of the lengths of two or more whether they may be together. Of equal lengths the earlier
    row comes first. `pack_tokens=1` means one document at a time.
    """
    packs: list[list[EncodedDocument]] = []
    lengths: list[int] = []
    for document in sorted(documents, key=lambda d: (-d.prompt_tokens, d.source.row)):
        longer = [*lengths, document.prompt_tokens]
        fits = sum(longer) <= pack_tokens and (max_bytes is None or planned_bytes(longer) <= max_bytes)
        if lengths and fits and may_share(longer):
            packs[-1].append(document)
            lengths = longer
        else:
            packs.append([document])
            lengths = [document.prompt_tokens]
    return packs
