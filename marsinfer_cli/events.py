"""What is said on stderr: lines, or with `--log-format json` one JSON object a line.

Light, for errors before anything is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from pipeline.texts.redaction import redacted
from pipeline.texts.shown import printable


def say(text: str) -> None:
    """Print a line."""
    print(f"marsinfer: {printable(text)}", file=sys.stderr)


def saying(*, quiet: bool) -> Callable[[str], None]:
    """`say`, or what says nothing."""
    return (lambda text: None) if quiet else say


def note(text: str, *, in_events: bool = False) -> None:
    """What is to be known, and is no error; also when quiet, for it may change what a result means."""
    if in_events:
        print_event("note", message=text)
    else:
        say(f"note: {text}")


def complain(message: str, code: int, *, in_events: bool) -> int:
    """Say what ends the command; returns its exit code."""
    message = " ".join(message.split())
    if in_events:
        print_event("error", message=message, exit_code=code)
    else:
        say(f"error: {message}")
    return code


def print_event(event: str, **fields: Any) -> None:
    """Print one event, with its time in UTC."""
    moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    told = {"event": event, "time": moment, **redacted(fields)}
    print(json.dumps(told, default=lambda value: redacted(str(value))), file=sys.stderr, flush=True)


def wants_events(words: Sequence[str]) -> bool:
    """Whether a command line asks for events, even one that cannot be parsed."""
    flags = [word for word in words if word.startswith("--log-format=")]
    flags += [f"{word}={value}" for word, value in pairwise(words) if word == "--log-format"]
    return "--log-format=json" in flags
