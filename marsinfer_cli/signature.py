"""Commands whose arguments and flags are the fields of settings, and what a call makes of them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from marsinfer_cli.events import note
from pipeline.checkpoints.names import local_models
from pipeline.errors import ConfigError
from pipeline.pruning.registry import method_names
from pipeline.settings import sources
from pipeline.settings.method_settings import MethodSettings
from pipeline.settings.option import PANELS, Renamed, Setting, Settings, renamed_of, settings_of

Body = Callable[..., Any]
BARE = {each.flag: each.about for cls in sources.CONFIGURED for each in settings_of(cls) if each.about.bare}


class Command(TyperCommand):
    """A command some of whose flags may stand without a value, for the one that `bare` says."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_valued(args)))


def _valued(args: Sequence[str]) -> Iterator[str]:
    """The same words, with a value behind each flag that has none; what follows -- are no flags."""
    for number, word in enumerate(args):
        if word == "--":
            yield from args[number:]
            return
        about = BARE.get(word)
        following = args[number + 1] if number + 1 < len(args) else None
        if about is None or following in (about.choices or ()):
            yield word
        else:
            yield f"{word}={about.bare}"


# what shells offer for a value that is being typed; where none fits, they go on with files
OFFERED = {"methods": method_names, "models": local_models}


def takes(*classes: type[Settings]) -> Callable[[Body], Body]:
    """A command that is given one object of each class: what the user set of their fields, and defaults."""

    def decorate(body: Body) -> Body:
        def command(context: typer.Context, **_: Any) -> Any:
            return body(*resolve(context, classes))

        parameters = list(_parameters(classes))
        command.__name__, command.__doc__ = body.__name__, body.__doc__
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameters(classes: Sequence[type[Settings]]) -> Iterator[inspect.Parameter]:
    """What Typer makes arguments and flags of."""
    yield _parameter("context", typer.Context, inspect.Parameter.empty)
    every = {each.name: each for cls in classes for each in settings_of(cls)}
    renamed = {each.name: each for cls in classes for each in renamed_of(cls) if each.name not in every}
    for each in sorted(every.values(), key=_place):
        yield _parameter(each.name, _annotated(each), _default(each))
    for old in renamed.values():
        yield _parameter(old.name, _hidden(old), None if old.kind.flag_type is not bool else False)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def _place(setting: Setting) -> int:
    """Arguments first, then panel by panel."""
    return -1 if setting.about.panel is None else PANELS.index(setting.about.panel)


def _annotated(setting: Setting) -> Any:
    about, kind = setting.about, setting.kind.flag_type
    optional = kind if kind is bool else kind | None
    if about.panel is None:
        argument = typer.Argument(
            metavar=about.metavar, help=about.help, autocompletion=_completion(setting), show_default=False
        )
        return Annotated[optional, argument]
    names = f"{setting.flag}/--no-{setting.flag[2:]}" if setting.default is True else setting.flag
    option = typer.Option(
        names,
        metavar=about.metavar,
        help=about.help,
        autocompletion=_completion(setting),
        show_default=True if _default(setting) is not None else setting.shown_default,
        rich_help_panel=about.panel,
    )
    return Annotated[optional, option]


def _hidden(old: Renamed) -> Any:
    kind = old.kind.flag_type
    option = typer.Option(old.flag, metavar=old.metavar, help=f"Now {old.now}.", hidden=True)
    return Annotated[kind if kind is bool else kind | None, option]


def _default(setting: Setting) -> Any:
    """What Typer shows as the default, if a value of the setting says it: nothing is read from there."""
    kind, default = setting.kind.flag_type, setting.default
    if isinstance(default, str | int | float):
        return default if isinstance(default, kind) else setting.kind.shown(default)
    return None


def _completion(setting: Setting) -> Callable[[str], list[str]] | None:
    """The words that begin as a value does; read at every press of Tab."""
    about = setting.about
    if about.choices is None and about.offered is None:
        return None

    def complete(incomplete: str) -> list[str]:
        words = about.choices or OFFERED[str(about.offered)]()
        return [word for word in words if word.startswith(incomplete)]

    return complete


def resolve(context: typer.Context, classes: Sequence[type[Settings]]) -> list[Settings]:
    """One object of each class: a flag stands over the environment, `--config`, `--profile`, the default."""
    given = {name: value for name, value in context.params.items() if _was_given(context, name)}
    notes: list[str] = []
    path = given.get("config")
    is_configured = any(each.about.in_file for cls in classes for each in settings_of(cls))
    file = sources.read_config(path) if path is not None else {}
    environment = sources.read_environment(os.environ) if is_configured else {}
    made = []
    for cls in classes:
        flags = _flags(cls, given)
        words = _words(cls, flags)
        elsewhere = (sources.taken(cls, layer, notes.append) for layer in (file, environment))
        values = sources.merge(*elsewhere, sources.renewed(cls, flags, notes.append))
        if words is not None:
            values |= _places(words, values, path)
        if issubclass(cls, MethodSettings) and values.get("profile") is not None:
            from pipeline.setup.profile import with_profile

            values = with_profile(values)
        made.append(cls(**values))
    # once all is known to be right: what is refused is told in one line
    for text in dict.fromkeys(notes):
        note(text, in_events=given.get("log_format") == "json")
    return made


def _was_given(context: typer.Context, name: str) -> bool:
    # by name: Typer brings a copy of Click, whose enum is not the installed package's
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _flags(cls: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says, by the names of fields, and by those of the version before."""
    known: dict[str, Setting | Renamed] = {each.name: each for each in renamed_of(cls)}
    known |= {each.name: each for each in settings_of(cls)}
    return {name: known[name].kind.of_flag(known[name].flag, given[name]) for name in given if name in known}


def _words(cls: type[Settings], flags: dict[str, Any]) -> list[str] | None:
    """The words that name input and output, taken out of `flags`; None for a class that has no output."""
    if "output" not in {each.name for each in settings_of(cls)}:
        return None
    last = flags.pop("output", None)
    return [*flags.pop("input", ()), *([] if last is None else [last])]


def _places(words: list[str], file: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    """INPUT and OUTPUT; one word alone is the one that the file lacks."""
    if len(words) > 1 and "output" in file:
        # to take the last word for it could overwrite what was meant to be read
        raise ConfigError(
            f"the output is named twice: {file['output']!r} in {path}, and {words[-1]!r}, the last of "
            f"{len(words)} words; leave one of them out"
        )
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
