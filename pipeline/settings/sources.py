"""Where settings come from: flag over environment over `--config` file over `--profile` over default."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, did_you_mean
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.settings.check_settings import CheckConfig
from pipeline.settings.console_settings import BatchSwitches, CalibrateSwitches, CheckSwitches
from pipeline.settings.data_settings import ASKED
from pipeline.settings.method_settings import MethodSettings
from pipeline.settings.option import Renamed, Setting, Settings, renamed_of, settings_of
from pipeline.settings.parse import NEEDLES
from pipeline.settings.row_settings import OF_NEEDLES
from pipeline.settings.run_settings import BatchConfig
from pipeline.texts.redaction import redacted
from pipeline.texts.toml import toml_key, toml_value

PREFIX = "MARSINFER_"
# together they have every setting that a file or the environment may hold
CONFIGURED = (BatchConfig, CheckConfig, CalibrateConfig)
# and of these commands what is said on the command line alone
SWITCHES = (BatchSwitches, CheckSwitches, CalibrateSwitches)
# of these, what a stronger place sets takes back what a weaker one has set for the other
EXCLUSIVE = (
    *combinations(ASKED, 2),
    ("resume", "overwrite"),
    ("prompt_template", "template_arg"),
)
Note = Callable[[str], None]


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from several places, weakest first."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _take_back(merged, layer)
        parameters = {**merged.get("settings", {}), **layer.get("settings", {})}
        merged |= layer
        if parameters:
            merged["settings"] = parameters
    for name in _of_no_use(merged).difference(*layers[-1:]):
        merged.pop(name, None)
    return merged


def _of_no_use(merged: Mapping[str, Any]) -> set[str]:
    """Settings that weaker places make for runs that have needles, or rows of INPUT."""
    suites = merged.get("suite", ())
    names = set() if NEEDLES in suites else {name for name in merged if name.startswith(OF_NEEDLES)}
    return names | {"shard", "sample"} if suites and not merged.get("input") else names


def _take_back(merged: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for pair in EXCLUSIVE:
        for name, other in (pair, pair[::-1]):
            if layer.get(name) and other not in layer:
                merged.pop(other, None)
    if layer.get("suite") and "reference_column" not in {**merged, **layer}:
        _take_back_rows(merged, layer)
    if "method" in layer and layer["method"] != merged.get("method", MethodSettings.method):
        merged.pop("settings", None)  # another method's parameters


def _take_back_rows(merged: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """A suite takes the place of rows that a weaker place names; needles that of their questions."""
    rows = (*ASKED, "id_column", "task_column")
    for name in rows if set(layer["suite"]) == {NEEDLES} else (*rows, "input"):
        merged.pop(name, None)


def read_config(path: str) -> dict[str, Any]:
    """The settings of a TOML file, of whatever command; `path` may also be a pipe.

    Raises ConfigError with the file's name.
    """
    place, known, alone = f"--config {path}", _known(), _switches()
    values: dict[str, Any] = {}
    for key, value in read_toml(place, path).items():
        name = key.replace("-", "_")
        if name in alone:
            raise ConfigError(f"{place}: {key}: {alone[name]} can be given on the command line alone")
        if name not in known:
            taken_today = [name for name, each in known.items() if isinstance(each, Setting)]
            hint = did_you_mean(name, taken_today) or f"; known are {', '.join(taken_today)}"
            raise ConfigError(f"{place}: unknown key {key!r}{hint}")
        if name in values:
            raise ConfigError(f"{place}: {name} is set twice, with dashes and with underscores")
        values[name] = known[name].kind.of_toml(f"{place}: {key}", value)
    refuse_code(place, values)
    return values


def refuse_code(place: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError where what a file says at `place` would run code that is not ours."""
    for cls in CONFIGURED:
        for each in settings_of(cls):
            if each.name in values:
                each.refuse_code(f"{place}: {each.name.replace('_', '-')}", values[each.name])


def read_toml(place: str, path: str) -> dict[str, Any]:
    """What a TOML file holds. Raises ConfigError, which begins with `place`."""
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place} is not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{place} is no TOML: {error}") from error


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings named `MARSINFER_*`, of whatever command.

    A name that resembles a setting's is refused as a slip; any other is somebody else's, as are those that
    a container platform derives from a service called marsinfer.
    """
    known, alone = _known(), _switches()
    values = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in known:
            values[name] = _of_environment(variable, known[name], text)
        elif name in alone:
            raise ConfigError(f"{variable}: {alone[name]} can be given on the command line alone")
        elif close := get_close_matches(name, known, n=1, cutoff=0.8):
            raise ConfigError(f"{variable} is no setting; did you mean {PREFIX}{close[0].upper()}?")
    return values


def _of_environment(variable: str, known: Setting | Renamed, text: str) -> Any:
    if isinstance(known, Setting) and not known.about.in_environment:
        raise ConfigError(
            f"{variable}: {known.name} cannot be set by the environment; give it as an argument"
        )
    value = known.kind.of_text(variable, text)
    if isinstance(known, Setting):
        known.refuse_code(variable, value)
    return value


def _known() -> dict[str, Setting | Renamed]:
    """All that a file may hold, with names of the version before."""
    known: dict[str, Setting | Renamed] = {each.name: each for cls in CONFIGURED for each in renamed_of(cls)}
    every = (each for cls in CONFIGURED for each in settings_of(cls))
    return known | {each.name: each for each in every if each.about.in_file}


def _switches() -> dict[str, str]:
    """The flags that neither a file nor the environment may hold, by the names that they would have there."""
    flags = [each.flag for cls in SWITCHES for each in settings_of(cls) if not each.about.in_file]
    return {flag.removeprefix("--").replace("-", "_"): flag for flag in flags}


def taken(wanted: type[Settings], values: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Of the settings of a file or the environment those that `wanted` takes from there, renewed."""
    names = {each.name for each in settings_of(wanted)} - set(wanted.on_command_line_alone)
    current = renewed(wanted, values, note)
    return {name: value for name, value in current.items() if name in names}


def renewed(wanted: type[Settings], values: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Settings under their names of today; `note` is told of each that had one of the version before."""
    names = {each.name for each in settings_of(wanted)}
    old = [each for each in renamed_of(wanted) if each.name in values and each.name not in names]
    current = {name: value for name, value in values.items() if name not in {each.name for each in old}}
    for each in old:
        note(each.note)
        for name, value in each.values(values[each.name]).items():
            current[name] = _joined(each, current.get(name), value)
    return current


def _joined(old: Renamed, now: Any, value: Any) -> Any:
    """What a name of the version before stands for, beside what is given under the name of today."""
    if isinstance(value, tuple):  # may be given again and again
        return (*(now or ()), *value)
    if now is None or (isinstance(now, Mapping) and not set(now) & set(value)):
        return {**(now or {}), **value} if isinstance(value, Mapping) else value
    raise ConfigError(f"{old.flag} and {old.now} exclude each other: they are one setting")


def to_toml(config: Settings) -> str:
    """A configuration as `read_config` reads it, named as the flags; what has no value is left out.

    URLs are shown without their secrets. What a file may not say, as it would run code, stands there as a
    comment, with the parameters of such a method.
    """
    values = {
        each.name: redacted(getattr(config, each.name))
        for each in settings_of(type(config))
        if each.about.in_file
    }
    code = {each.name for each in settings_of(type(config)) if each.brings_code(values.get(each.name))}
    parameters = values.pop("settings", {})
    lines = [
        f"{'# ' if name in code else ''}{name.replace('_', '-')} = {toml_value(value)}"
        for name, value in values.items()
        if value is not None
    ]
    mark = "# " if "method" in code else ""
    lines += ["", f"{mark}[settings]"] if parameters else []
    lines += [f"{mark}{toml_key(name)} = {toml_value(value)}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"
