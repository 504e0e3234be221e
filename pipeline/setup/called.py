"""Settings that a program gives to a function: as keywords, paths and objects."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, did_you_mean
from pipeline.settings.kinds import PARAMETERS
from pipeline.settings.method_settings import AUTO
from pipeline.settings.option import Setting, Settings, settings_of
from pipeline.settings.sources import Note, renewed
from pipeline.setup.profile import with_profile

if TYPE_CHECKING:
    from pipeline.model.loading import Model
    from pipeline.pruning.base import PruningMethod

StrPath = str | os.PathLike[str]


def inputs_of(input: StrPath | Sequence[StrPath]) -> tuple[str, ...]:
    """The setting `input` of one place or several."""
    places = (input,) if isinstance(input, str | os.PathLike) else input
    return tuple(os.fspath(place) for place in places)


def with_objects(
    options: Mapping[str, Any], model: StrPath | Model, method: str | PruningMethod | None
) -> dict[str, Any]:
    """`options` and the settings that name a model and a method, each of which may be an object.

    Where no method is given, and `profile` is among the options, its settings are added.
    """
    options = {**options, "model": os.fspath(model) if isinstance(model, str | os.PathLike) else model.name}
    if method is None or method == AUTO:
        return with_profile(options)
    if isinstance(method, str):
        return {**options, "method": method}
    place = f"{type(method).__module__}:{type(method).__qualname__}"
    return {**options, "method": place, "settings": asdict(method)}


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
