"""Where each setting comes from: flag over environment over `--config` file over `--profile` over default."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import typer

from pipeline.config import BatchConfig, parse_bytes, parse_count, parse_settings
from pipeline.config_file import KINDS, merge, read_config, read_environment
from pipeline.errors import ConfigError
from pipeline.profile import above_profile

CONVERTED: dict[str, Callable[[Any], Any]] = {
    "pack_tokens": lambda text: parse_count("--pack-tokens", text),
    "kv_memory": lambda text: parse_bytes("--kv-memory", text),
    "stop": tuple,
}


def resolve(context: typer.Context) -> BatchConfig:
    """The settings of a call of `marsinfer batch`."""
    given = {name: value for name, value in context.params.items() if _was_given(context, name)}
    path = given.pop("config", None)
    file = read_config(path) if path is not None else {}
    flags = {name: CONVERTED.get(name, lambda value: value)(given[name]) for name in given if name in KINDS}
    if "set" in given:
        flags["settings"] = parse_settings(given["set"])
    output = flags.pop("output", None)
    words = [*(given.get("inputs") or ()), *([] if output is None else [output])]
    flags |= _places(words, file, path)
    return BatchConfig(**above_profile(merge(file, read_environment(os.environ), flags)))


def _was_given(context: typer.Context, name: str) -> bool:
    # by name: Typer brings a copy of Click, whose enum is not the installed package's
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _places(words: list[str], file: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    """INPUT and OUTPUT; one word alone is the one that the file lacks."""
    if len(words) > 1:
        return {"input": tuple(words[:-1]), "output": words[-1]}
    lacking = [name for name in ("input", "output") if name not in file]
    if len(words) == 1 and not lacking:
        # to guess could overwrite what was meant to be read
        raise ConfigError(
            f"--config {path} names input and output, and {words[0]!r} could replace either: "
            "give both or neither"
        )
    if len(lacking) > len(words):
        missing = lacking[len(words)]
        shown = "INPUT..." if missing == "input" else "OUTPUT"
        remedy = f"give it, or a line '{missing} = ...' in {path}" if path else "give it, or --config FILE"
        raise ConfigError(f"Missing argument '{shown}': {remedy}")
    return {lacking[0]: (words[0],) if lacking[0] == "input" else words[0]} if words else {}
