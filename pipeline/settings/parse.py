"""Texts of settings as values, and values held against what they may be. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import ConfigError, did_you_mean
from pipeline.texts.toml import LARGEST

MOST_DRAFTS = 64  # of a row and step


def read_template(path: str | None, flag: str = "--prompt-template") -> str | None:
    """The text of the prompt template in a file that this flag names."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}") from error


def parse_settings(pairs: Sequence[str], flag: str = "--set") -> dict[str, str]:
    """`["eta=0.95", "window=50"]` as a mapping; the method converts the values."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ConfigError(f"{flag} {pair!r}: write it as NAME=VALUE, for example --set eta=0.95")
        settings[name.strip()] = value.strip()
    return settings


def parse_template_arg(text: str, flag: str = "--template-arg") -> tuple[str, Any]:
    """`enable_thinking=false` as ("enable_thinking", False): a value is JSON where it can be, else a text.

    Words that are written otherwise, such as False and FALSE, count as JSON's.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (equals and name.isidentifier() and value):
        raise ConfigError(f"{flag} {text!r}: write it as NAME=VALUE, for example enable_thinking=false")
    is_bool = value.lower() in ("true", "false")
    word = value.lower() if is_bool else "null" if value == "None" else value
    try:
        return name, json.loads(word, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return name, value


def _no_number(word: str) -> Any:
    """Raise ValueError for NaN and infinities, which JSON lacks."""
    raise ValueError(word)


def as_set(value: Any) -> str:
    """A method's parameter as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(as_set, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def parse_count(flag: str, text: str) -> int:
    """A count that may end in k or m, in thousands and millions of 1,024: `32k` is 32,768."""
    found = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if found is None:
        raise ConfigError(f"{flag} {text!r}: give a whole number such as 8192, 32k or 1m")
    return _whole(flag, found[1], {"": 1, "k": 1024, "m": 1024 * 1024}[found[2]])


def parse_switch(place: str, text: str) -> bool:
    """`1` and `true`, `0` and `false`."""
    words = {"1": True, "true": True, "0": False, "false": False}
    if text.strip().lower() not in words:
        raise ConfigError(f"{place}={text}: must be 1, 0, true or false")
    return words[text.strip().lower()]


def parse_rope_scaling(text: str, flag: str = "--rope-scaling") -> tuple[float, int | None]:
    """`yarn:4` as (4.0, None); `yarn:4:32768` as (4.0, 32768), the context that the model was trained on."""
    found = re.fullmatch(r"yarn:(\d+(?:\.\d+)?)(?::(\d+k?))?", text.strip().lower())
    if found is None:
        raise ConfigError(
            f"{flag} {text!r}: write it as yarn:FACTOR or yarn:FACTOR:ORIGINAL, for example yarn:4"
        )
    factor = float(found[1])
    check_size(flag, factor)
    if factor <= 1:
        raise ConfigError(f"{flag} {text!r}: the factor must be above 1")
    original = None if found[2] is None else parse_count(flag, found[2])
    if original == 0:
        raise ConfigError(f"{flag} {text!r}: the original context must be at least 1 token")
    return factor, original


def parse_regex(text: str, flag: str) -> re.Pattern[str]:
    """A regular expression, as Python's."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{flag} {text!r} is no regular expression: {error}") from error


_BYTES = {"": 1, "b": 1}
_BYTES |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_BYTES |= {f"{letter}{tail}": 1024**power for power, letter in enumerate("kmgt", 1) for tail in ("", "ib")}


def parse_bytes(flag: str, text: str) -> int:
    """A size such as `1GiB`, `1.5G` (both in powers of 1,024) or `800MB` (in powers of 1,000)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = float(found[1]) * _BYTES[found[2]] if found and found[2] in _BYTES else 0.0
    check_size(flag, size)
    if size < 1:
        raise ConfigError(f"{flag} {text!r}: give a size such as 1GiB or 800MB")
    return int(size)


def parse_shard(text: str, flag: str = "--shard") -> tuple[int, int]:
    """`2/8` as (2, 8): the second of eight parts."""
    part, slash, parts = text.partition("/")
    if not (slash and part.strip().isdecimal() and parts.strip().isdecimal()):
        raise ConfigError(f"{flag} {text!r}: write it as I/N, for example 1/4 for the first of four parts")
    chosen, count = _whole(flag, part.strip()), _whole(flag, parts.strip())
    if not 1 <= chosen <= count:
        raise ConfigError(f"{flag} {text!r}: the part must be between 1 and {count}")
    return chosen, count


def parse_workers(text: str, flag: str = "--workers") -> int | None:
    """`4` as 4, `all` as None."""
    if text == "all":
        return None
    count = _whole(flag, text) if text.isdecimal() else 0
    if count < 1:
        raise ConfigError(f"{flag} {text!r}: give a number of at least 1, or all")
    return count


def parse_lookup(text: str, flag: str = "--lookup") -> int | None:
    """`off` as 0, `auto` as None, and else how many tokens are drafted."""
    words = {"off": 0, "auto": None}
    value = text.strip().lower()
    if value in words:
        return words[value]
    if not re.fullmatch(r"\d{1,3}", value) or not 1 <= int(value) <= MOST_DRAFTS:
        raise ConfigError(f"{flag} {text!r}: give auto, off or a number of tokens from 1 to {MOST_DRAFTS}")
    return int(value)


def parse_max_errors(text: str, flag: str = "--max-errors") -> tuple[float, bool]:
    """`20` as (20.0, False), a count of rows; `5%` as (5.0, True), per cent of the finished rows."""
    digits = str(text).strip()
    is_share = digits.endswith("%")
    digits = digits.removesuffix("%").strip()
    if not (re.fullmatch(r"\d+(\.\d+)?", digits) if is_share else digits.isdecimal()):
        raise ConfigError(f"{flag} {text!r}: give a number of rows such as 20, or a share such as 5%")
    check_size(flag, float(digits))
    if is_share and float(digits) > 100:
        raise ConfigError(f"{flag} {text!r}: a share is at most 100%")
    return float(digits), is_share


def check_size(flag: str, value: float) -> None:
    """Raise ConfigError for a number that is none, or larger than any count of bytes, rows or tokens."""
    if not -LARGEST <= value <= LARGEST:
        shown = "a number of many digits" if isinstance(value, int) else value
        raise ConfigError(f"{flag} {shown}: must be a number, and at most {LARGEST:,}")


def _whole(flag: str, digits: str, factor: int = 1) -> int:
    """Decimal digits as a number, times `factor`."""
    if len(digits.lstrip("0")) > len(str(LARGEST)):
        raise ConfigError(f"{flag} {digits[:20]}...: must be a number, and at most {LARGEST:,}")
    value = int(digits) * factor
    check_size(flag, value)
    return value


def check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError for a value that is none of these."""
    if value not in choices:
        raise ConfigError(f"{flag} {value!r}: choose from {', '.join(choices)}")


def check_at_least(flag: str, value: int, low: int) -> None:
    """Raise ConfigError for what is no whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{flag} {value}: must be a whole number of at least {low}")


def check_between(flag: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ConfigError for a number outside of these bounds."""
    if not (low < value <= high if open_low else low <= value <= high):
        bounds = f"above {low} and at most {high}" if open_low else f"between {low} and {high}"
        raise ConfigError(f"{flag} {value}: must be {bounds}")


class Bound(NamedTuple):
    """A largest drop: points of the score, or percent of dense's."""

    value: float
    relative: bool

    @property
    def unit(self) -> str:
        return "%" if self.relative else "pt"

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"


def parse_drop(text: str, flag: str = "--max-drop") -> Bound:
    """`1pt` or `1%`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(pt|%)", text.strip())
    if found is None:
        raise ConfigError(
            f"{flag} {text!r}: write a number and unit, 1pt (points of the score) or 1% (of dense's score)"
        )
    value = float(found.group(1))
    if value > 100:
        raise ConfigError(f"{flag} {text!r}: must be from 0 to 100")
    return Bound(value, found.group(2) == "%")


def parse_list(flag: str, text: str) -> tuple[str, ...]:
    """`a,b` as ("a", "b")."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise ConfigError(f"{flag} {text!r}: write values with commas between them")
    return parts


NEEDLES = "needles"
SUITES = ("leval", "longbench")  # that lie in a folder


@dataclass(frozen=True, slots=True)
class SuiteName:
    """A suite that a user named; `folder` is None for needles, which are hidden in the user's documents."""

    kind: str  # leval, longbench or needles
    folder: Path | None = None

    def __str__(self) -> str:
        return self.kind if self.folder is None else f"{self.kind}:{self.folder}"


def parse_suite(text: str) -> SuiteName:
    """`leval:DIR`, `longbench:DIR` or `needles`. Raises `ConfigError`."""
    kind, colon, folder = text.partition(":")
    if kind == NEEDLES:
        if colon:
            raise ConfigError(
                f"suite {text!r}: needles takes no folder; it hides them in the input's documents"
            )
        return SuiteName(NEEDLES)
    if kind not in SUITES:
        hint = did_you_mean(kind.lower(), [*SUITES, NEEDLES])
        raise ConfigError(f"unknown suite {text!r}{hint}; write leval:DIR, longbench:DIR or needles")
    if not folder.strip():
        raise ConfigError(f"suite {text!r}: name the folder of its files, as {kind}:DIR")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"suite {text!r}: {path} is {'not a folder' if path.exists() else 'not there'}")
    return SuiteName(kind, path)
