"""Numbers as they stand in messages and tables."""

from __future__ import annotations

import math


def counted(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`; of nouns whose plural has an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent_of(share: float | None) -> str:
    """`12.5%`, or a dash for a share that is not known."""
    return "-" if share is None or not math.isfinite(share) else f"{share:.1%}"
