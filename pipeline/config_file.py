"""Settings from a TOML file and from the environment, and a configuration back as TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipeline.config import BatchConfig, parse_bytes, parse_count
from pipeline.errors import ConfigError
from pipeline.toml import toml_key, toml_value

PREFIX = "MARSINFER_"
# kind of each field, as it is annotated: "str | None" and "str" are both str
KINDS = {field.name: str(field.type).removesuffix(" | None") for field in fields(BatchConfig)}
DEFAULT_METHOD = next(field.default for field in fields(BatchConfig) if field.name == "method")
NOT_IN_ENVIRONMENT = ("input", "output", "settings")
# of these, what a stronger place sets takes back what a weaker one has set for the other
EXCLUSIVE = (
    ("question", "question_column"),
    ("question", "questions_column"),
    ("question_column", "questions_column"),
    ("resume", "overwrite"),
)
BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "tuple[str, ...]": "a text or a list of texts",
    "Mapping[str, Any]": "a table, [settings]",
}


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `BatchConfig` from several places, weakest first."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _take_back(merged, layer)
        settings = {**merged.get("settings", {}), **layer.get("settings", {})}
        merged |= {**layer, "settings": settings}
    return merged


def _take_back(merged: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for pair in EXCLUSIVE:
        for name, other in (pair, pair[::-1]):
            if layer.get(name) and other not in layer:
                merged.pop(other, None)
    if layer.get("sparse_attention") is not None:
        merged["settings"] = {k: v for k, v in merged.get("settings", {}).items() if k != "sparse_attention"}
    if "sparse_attention" in layer.get("settings", {}):
        merged.pop("sparse_attention", None)
    if "method" in layer and layer["method"] != merged.get("method", DEFAULT_METHOD):
        merged.pop("settings", None)  # another method's parameters


def read_config(path: str) -> dict[str, Any]:
    """The settings of a TOML file; `path` may also be a pipe. Raises ConfigError with the file's name."""
    try:
        table = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path} is no TOML: {error}") from error
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in KINDS:
            raise ConfigError(f"--config {path}: unknown key {key!r}{_hint(name)}")
        if name in values:
            raise ConfigError(f"--config {path}: {name} is set twice, with dashes and with underscores")
        values[name] = _of_toml(f"--config {path}: {key}", name, value)
    return values


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings named `MARSINFER_*`.

    A name that resembles a setting's is refused as a slip; any other is somebody else's, as are those that
    a container platform derives from a service called marsinfer.
    """
    values = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in NOT_IN_ENVIRONMENT:
            raise ConfigError(f"{variable}: {name} cannot be set by the environment; give it as an argument")
        if name in KINDS:
            values[name] = _of_text(variable, name, text)
        elif close := get_close_matches(name, KINDS, n=1, cutoff=0.8):
            raise ConfigError(f"{variable} is no setting; did you mean {PREFIX}{close[0].upper()}?")
    return values


# settings that a text may give with a unit
SIZES: dict[str, Callable[[str, str], int]] = {"pack_tokens": parse_count, "kv_memory": parse_bytes}


def to_toml(config: BatchConfig) -> str:
    """A configuration in the form that `read_config` reads; settings without a value are left out."""
    values = {name: getattr(config, name) for name in KINDS if name != "settings"}
    lines = [f"{name} = {toml_value(value)}" for name, value in values.items() if value is not None]
    lines += ["", "[settings]"] if config.settings else []
    lines += [f"{toml_key(name)} = {toml_value(value)}" for name, value in config.settings.items()]
    return "\n".join(lines) + "\n"


def _of_toml(place: str, name: str, value: Any) -> Any:
    kind = KINDS[name]
    if name in SIZES and isinstance(value, str):
        return SIZES[name](place, value)
    if name in ("max_errors", "workers") and type(value) is int:
        return str(value)
    if kind == "tuple[str, ...]":
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return tuple(texts)
    elif kind == "Mapping[str, Any]" and isinstance(value, dict):
        return {key: _setting(f"{place}.{key}", each) for key, each in value.items()}
    elif kind == "float" and type(value) is int:
        return float(value)
    elif type(value).__name__ == kind:
        return value
    raise ConfigError(f"{place} = {value!r}: must be {EXPECTED[kind]}")


def _setting(place: str, value: Any) -> Any:
    """A method's parameter: one value, or one a layer."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) for each in values):
        raise ConfigError(f"{place} = {value!r}: must be a number, a text, or a list of one a layer")
    return tuple(value) if isinstance(value, list) else value


def _of_text(variable: str, name: str, text: str) -> Any:
    kind = KINDS[name]
    if kind == "tuple[str, ...]":
        return (text,)
    if name in SIZES:
        return SIZES[name](variable, text)
    parsers: dict[str, Callable[[str], Any]] = {
        "bool": lambda text: BOOLEANS[text.strip().lower()],
        "int": int,
        "float": float,
        "str": str,
    }
    try:
        return parsers[kind](text)
    except (ValueError, KeyError):
        expected = "1, 0, true or false" if kind == "bool" else EXPECTED[kind]
        raise ConfigError(f"{variable}={text}: must be {expected}") from None


def _hint(name: str) -> str:
    close = get_close_matches(name, KINDS, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f"; known are {', '.join(KINDS)}"
