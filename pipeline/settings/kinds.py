"""What kinds of values settings have: how each is written as a flag, in the environment and in TOML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.errors import ConfigError
from pipeline.settings.parse import parse_bytes, parse_count, parse_list, parse_settings


class Kind:
    """A text as it stands; the other kinds say in what they differ.

    Places are what an error begins with: `--flag`, `MARSINFER_NAME`, or a file and its key.
    """

    flag_type: Any = str  # what the command line parses; `list[str]` may be given again and again
    expected = "a text"

    def of_flag(self, place: str, value: Any) -> Any:
        """A value of the command line, of type `flag_type`: a text, or what it is already."""
        return self.of_text(place, value) if isinstance(value, str) else value

    def of_text(self, place: str, text: str) -> Any:
        """A value of the environment. Raises ConfigError."""
        return text

    def of_toml(self, place: str, value: Any) -> Any:
        """A value of a TOML file. Raises ConfigError."""
        if type(value) is not str:
            raise self.refusal(place, value)
        return self.of_text(place, value)

    def shown(self, value: Any) -> str:
        """A default as `--help` shows it."""
        return str(value)

    def refusal(self, place: str, value: Any) -> ConfigError:
        """What is wrong with a value of a file."""
        return ConfigError(f"{place} = {value!r}: must be {self.expected}")


class _Number(Kind):
    def __init__(self, flag_type: type, expected: str) -> None:
        self.flag_type, self.expected = flag_type, expected

    def of_text(self, place: str, text: str) -> Any:
        try:
            return self.flag_type(text)
        except ValueError:
            raise ConfigError(f"{place}={text}: must be {self.expected}") from None

    def of_toml(self, place: str, value: Any) -> Any:
        if type(value) is not int and (type(value) is not float or self.flag_type is int):
            raise self.refusal(place, value)
        return self.flag_type(value)


class _Switch(Kind):
    flag_type = bool
    expected = "true or false"
    WORDS: Mapping[str, bool] = {"1": True, "true": True, "0": False, "false": False}

    def of_text(self, place: str, text: str) -> bool:
        if text.strip().lower() not in self.WORDS:
            raise ConfigError(f"{place}={text}: must be 1, 0, true or false")
        return self.WORDS[text.strip().lower()]

    def of_toml(self, place: str, value: Any) -> bool:
        if type(value) is not bool:
            raise self.refusal(place, value)
        return value


class _Texts(Kind):
    """A flag that may be given again; the environment holds a single text."""

    flag_type = list[str]
    expected = "a text or a list of texts"

    def of_flag(self, place: str, value: Any) -> tuple[str, ...]:
        return tuple(value)

    def of_text(self, place: str, text: str) -> tuple[str, ...]:
        return (text,)

    def of_toml(self, place: str, value: Any) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.refusal(place, value)
        return tuple(texts)


class _Size(Kind):
    """A whole number that a text may give with a unit, as in 32k or 1GiB."""

    expected = "a whole number"

    def __init__(self, parse: Callable[[str, str], int]) -> None:
        self.parse = parse

    def of_text(self, place: str, text: str) -> int:
        return self.parse(place, text)

    def of_toml(self, place: str, value: Any) -> int:
        return value if type(value) is int else super().of_toml(place, value)

    def shown(self, value: int) -> str:
        powers = ((30, "GiB"), (20, "MiB")) if self.parse is parse_bytes else ((10, "k"),)
        return next(
            (f"{value >> power}{unit}" for power, unit in powers if not value % (1 << power)), str(value)
        )


class _TextOrWhole(Kind):
    """A text that is often but a number, which TOML may leave unquoted: 20 or 5%, 4 or all."""

    def of_toml(self, place: str, value: Any) -> str:
        return str(value) if type(value) is int else super().of_toml(place, value)


class _List(Kind):
    """Values with commas between them, or a list of TOML."""

    def __init__(self, parse: Callable[[str, str], Any], expected: str) -> None:
        self.parse, self.expected = parse, expected

    def of_text(self, place: str, text: str) -> tuple[Any, ...]:
        return tuple(self.parse(place, part) for part in parse_list(place, text))

    def of_toml(self, place: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            return super().of_toml(place, value)
        if not all(type(each) in (str, int) for each in value):
            raise self.refusal(place, value)
        return tuple(self.parse(place, str(each)) for each in value)


class _Parameters(Kind):
    """A method's parameters: NAME=VALUE as a flag, a table of its own in TOML."""

    flag_type = list[str]
    expected = "a table, [settings]"

    def of_flag(self, place: str, value: Any) -> dict[str, Any]:
        return dict(parse_settings(value, place))

    def of_toml(self, place: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refusal(place, value)
        return {key: self._parameter(f"{place}.{key}", each) for key, each in value.items()}

    def _parameter(self, place: str, value: Any) -> Any:
        """One value, or one a layer."""
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str | int | float) for each in values):
            raise ConfigError(f"{place} = {value!r}: must be a number, a text, or a list of one a layer")
        return tuple(value) if isinstance(value, list) else value


TEXT = Kind()
WHOLE = _Number(int, "a whole number")
NUMBER = _Number(float, "a number")
SWITCH = _Switch()
TEXTS = _Texts()
COUNT = _Size(parse_count)
BYTES = _Size(parse_bytes)
TEXT_OR_WHOLE = _TextOrWhole()
WORDS = _List(lambda place, text: text, "a text or a list of texts")
COUNTS = _List(parse_count, "whole numbers")
PARAMETERS = _Parameters()

# of a field's annotation; the others name their kind
KINDS = {"str": TEXT, "int": WHOLE, "float": NUMBER, "bool": SWITCH, "tuple[str, ...]": TEXTS}
