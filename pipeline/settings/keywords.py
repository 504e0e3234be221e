"""Settings that a program gives to a function, as keywords and paths."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError, did_you_mean
from pipeline.settings.kinds import PARAMETERS
from pipeline.settings.option import Setting, Settings, settings_of
from pipeline.settings.sources import Note, renewed

StrPath = str | os.PathLike[str]


def inputs_of(input: StrPath | Sequence[StrPath]) -> tuple[str, ...]:
    """The setting `input` of one place or several."""
    places = (input,) if isinstance(input, str | os.PathLike) else input
    return tuple(os.fspath(place) for place in places)


def called_with(
    function: str,
    cls: type[Settings],
    options: Mapping[str, Any],
    note: Note,
    *,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """The settings of `cls` among a function's keywords, by their names of today.

    A path becomes a text, a list what the setting has in its place, and a text with a unit (32k, 4GiB) a
    number, as in a file of settings. `without` are settings of `cls` that the function does not take.
    Raises ConfigError for a keyword that is no setting, with the one that it resembles, and for a value of
    another type.
    """
    known = {each.name: each for each in settings_of(cls) if each.name not in without}
    values = {}
    for name, value in renewed(cls, options, note).items():
        if name not in known:
            but = f" but {', '.join(sorted(without))}" if without else ""
            raise ConfigError(
                f"{function} has no option {name!r}{did_you_mean(name, known)}; it takes those of "
                f"{cls.__name__}{but}"
            )
        values[name] = _value(known[name], value)
    return values


def _value(setting: Setting, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, list | tuple):
        value = [os.fspath(each) if isinstance(each, os.PathLike) else each for each in value]
    if setting.kind is PARAMETERS or (value is None and not setting.default):
        return value
    return setting.kind.of_toml(setting.name, value)
