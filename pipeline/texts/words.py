"""Numbers and lists as they stand in messages and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`; of nouns whose plural has an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def either(words: Sequence[str]) -> str:
    """`one`, `one or two`, `one, two or three`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def duration(seconds: float) -> str:
    """`80 s`, `12 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:,.0f} s"
    minutes = seconds / 60
    return f"{minutes:,.0f} min" if minutes < 90 else f"{minutes / 60:,.1f} h"


def amount(value: float) -> str:
    """An amount of money, in whatever currency: `1,234.50`; of less than one, three figures."""
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:.3g}"


def figures(value: float) -> str:
    """Three figures, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent_of(share: float | None) -> str:
    """`12.5%`, or a dash for a share that is not known."""
    return "-" if share is None or not math.isfinite(share) else f"{share:.1%}"
