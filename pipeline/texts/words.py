"""Numbers and nouns that agree, in messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`; of nouns whose plural has an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
