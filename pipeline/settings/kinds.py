"""What kinds of values settings have: how each is written as a flag, in the environment and in TOML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ConfigError
from pipeline.settings.parse import parse_bytes, parse_count, parse_list, parse_settings, parse_switch


def _as_it_is(place: str, text: str) -> Any:
    return text


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A text as it stands; the other kinds say in what they differ.

    Places are what an error begins with: `--flag`, `MARSINFER_NAME`, or a file and its key.
    """

    expected: str = "a text"
    flag_type: Any = str  # what the command line parses; `list[str]` may be given again and again
    of_text: Callable[[str, str], Any] = _as_it_is  # of a place and a value there; raises ConfigError
    toml_types: tuple[type, ...] = (str,)
    of_other: Callable[[Any], Any] = lambda value: value  # of a value of TOML that is no text
    units: tuple[tuple[int, str], ...] = ()  # in which a default is shown: powers of two, and their names

    def of_flag(self, place: str, value: Any) -> Any:
        """A value of the command line, of type `flag_type`: a text, or what it is already."""
        return self.of_text(place, value) if isinstance(value, str) else value

    def of_toml(self, place: str, value: Any) -> Any:
        """A value of a TOML file. Raises ConfigError."""
        if type(value) not in self.toml_types:
            raise self.refusal(place, value)
        return self.of_text(place, value) if isinstance(value, str) else self.of_other(value)

    def shown(self, value: Any) -> str:
        """A default as `--help` shows it."""
        whole = (f"{value >> power}{unit}" for power, unit in self.units if not value % (1 << power))
        return next(whole, str(value))

    def refusal(self, place: str, value: Any) -> ConfigError:
        """What is wrong with a value of a file."""
        return ConfigError(f"{place} = {value!r}: must be {self.expected}")


def _number(number: type, expected: str, toml_types: tuple[type, ...]) -> Kind:
    def of_text(place: str, text: str) -> Any:
        try:
            return number(text)
        except ValueError:
            raise ConfigError(f"{place}={text}: must be {expected}") from None

    return Kind(expected=expected, flag_type=number, of_text=of_text, toml_types=toml_types, of_other=number)


@dataclass(frozen=True, kw_only=True)
class _List(Kind):
    """Several values: a list of TOML, or a text that `of_text` makes one of."""

    of_item: Callable[[str, str], Any] = _as_it_is
    item_types: tuple[type, ...] = (str,)

    def of_flag(self, place: str, value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, list) else super().of_flag(place, value)

    def of_toml(self, place: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            return super().of_toml(place, value)
        if not all(type(each) in self.item_types for each in value):
            raise self.refusal(place, value)
        return tuple(self.of_item(place, str(each)) for each in value)


def _separated(expected: str, of_item: Callable[[str, str], Any]) -> Kind:
    """Values with commas between them."""

    def of_text(place: str, text: str) -> tuple[Any, ...]:
        return tuple(of_item(place, part) for part in parse_list(place, text))

    return _List(expected=expected, of_text=of_text, of_item=of_item, item_types=(str, int))


class _Parameters(Kind):
    """A method's parameters: NAME=VALUE as a flag, a table of its own in TOML."""

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
WHOLE = _number(int, "a whole number", (int,))
NUMBER = _number(float, "a number", (int, float))
SWITCH = Kind(expected="true or false", flag_type=bool, of_text=parse_switch, toml_types=(bool,))
# a flag that may be given again; the environment holds a single text
TEXTS = _List(expected="a text or a list of texts", flag_type=list[str], of_text=lambda place, text: (text,))
# whole numbers that a text may give with a unit, as in 32k or 1GiB
_SIZE = Kind(expected="a whole number", toml_types=(str, int))
COUNT = replace(_SIZE, of_text=parse_count, units=((10, "k"),))
BYTES = replace(_SIZE, of_text=parse_bytes, units=((30, "GiB"), (20, "MiB")))
# a text that is often but a number, which TOML may leave unquoted: 20 or 5%, 4 or all
TEXT_OR_WHOLE = Kind(toml_types=(str, int), of_other=str)
WORDS = _separated("a text or a list of texts", _as_it_is)
COUNTS = _separated("whole numbers", parse_count)
PARAMETERS = _Parameters(expected="a table, [settings]", flag_type=list[str])

# of a field's annotation; the others name their kind
KINDS = {"str": TEXT, "int": WHOLE, "float": NUMBER, "bool": SWITCH, "tuple[str, ...]": TEXTS}
