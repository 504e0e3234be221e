"""When a run is to end: after so long, at a time of day, or at a date and time. Imports nothing heavy."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta

from pipeline.errors import ConfigError

_UNITS = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_PART = r"(\d+(?:\.\d+)?)([dhms])"
_DATE_AND_TIME = re.compile(r"\d{4}-?\d{2}-?\d{2}[T ].+", re.IGNORECASE)


def parse_deadline(text: str, flag: str = "--deadline") -> timedelta | time | datetime:
    """`8h` or `1h30m` as so long, `06:00` as a time of day, `2026-11-28T06:00` as a moment."""
    word = text.strip()
    try:
        if re.fullmatch(f"(?:{_PART})+", word.lower()):
            parts = [{_UNITS[unit]: float(number)} for number, unit in re.findall(_PART, word.lower())]
            return sum((timedelta(**part) for part in parts), timedelta())
        if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", word):
            hour, minute, second = map(int, f"{word}:00".split(":")[:3])
            return time(hour, minute, second)
        if _DATE_AND_TIME.fullmatch(word):
            return datetime.fromisoformat(word)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{flag} {text!r}: {error}") from error
    raise ConfigError(
        f"{flag} {text!r}: give how long, such as 8h or 90m, a time of day such as 06:00, or a date and time "
        "such as 2026-11-28T06:00"
    )


def deadline_after(text: str, began: datetime) -> datetime:
    """The moment that a deadline means for a run that began then, which has a time zone.

    A time of day is the next one; without a zone it is that of the machine. Raises ConfigError for a moment
    that no calendar has.
    """
    wanted = parse_deadline(text)
    local = began.astimezone()
    try:
        if isinstance(wanted, timedelta):
            return local + wanted
        if isinstance(wanted, datetime):
            return wanted.astimezone()
        today = datetime.combine(local.date(), wanted)
        is_over = today <= local.replace(tzinfo=None)
        return (today + timedelta(days=is_over)).astimezone()
    except (OverflowError, ValueError) as error:
        raise ConfigError(f"--deadline {text!r} is a moment that no calendar has: {error}") from error


def moment_told(moment: datetime) -> str:
    """`2026-11-28 06:00`, in the time of the machine."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M" + (":%S" if moment.second else ""))
