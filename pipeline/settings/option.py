"""How a setting is declared: one field of a group, with all that flags, files and the reference say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from inspect import get_annotations
from types import MappingProxyType
from typing import Any, ClassVar, Self, dataclass_transform

from pipeline.errors import ConfigError
from pipeline.settings.kinds import KINDS, Kind
from pipeline.settings.parse import check_at_least, check_between, check_choice, check_size
from pipeline.texts.redaction import redacted

_KEY = "setting"
OF_GROUP = "its group's"  # the panel, where an option does not say another

# panels of --help, in their order
PANELS = (
    MEASURED := "What is measured",
    SOUGHT := "What is sought",
    READING := "Reading",
    SUITES := "Suites",
    PROMPTS := "Prompts",
    MODEL := "Model",
    METHOD := "Pruning method",
    ANSWERS := "Answers",
    GATE := "Gate",
    RUN := "Running and writing",
    FILES := "Files",
    TRYING := "Trying a run first",
    MESSAGES := "Messages",
)


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a setting beside its name, type and default."""

    help: str
    panel: str | None = OF_GROUP  # None: an argument, which is given by its place
    metavar: str | None = None
    shown_default: str = "none"  # where the default itself says nothing to a user
    choices: Sequence[str] | None = None
    offered: str | None = None  # what a shell completes: "methods" or "models"
    least: float | None = None
    most: float | None = None
    above_least: bool = False  # `least` itself is too little
    check: Callable[[str, str], Any] | None = None  # of a text and its flag; raises ConfigError
    kind: Kind | None = None  # None: that of the annotation
    flag: str | None = None  # None: the name with dashes
    bare: str | None = None  # what the flag stands for where it is given without a value
    may_be_empty: bool = False  # a text
    in_file: bool = True
    in_environment: bool = True
    in_profile: bool = False
    # whether code that is not ours would run for a value; files and the environment cannot give such a one
    brings_code: Callable[[Any], bool] | None = None


def option(default: Any = MISSING, *, factory: Any = MISSING, help: str, **about: Any) -> Any:
    """A field of a group of settings; `about` are the fields of `About`."""
    metadata = {_KEY: About(help=help, **about)}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a configuration."""

    name: str
    default: Any  # MISSING where it must be given
    kind: Kind
    about: About

    @property
    def flag(self) -> str:
        return self.about.flag or f"--{self.name.replace('_', '-')}"

    @property
    def shown_default(self) -> str:
        """The default in words; empty for a switch, which is off."""
        if not isinstance(self.default, str | int | float):
            return self.about.shown_default
        return "" if self.default is False else self.kind.shown(self.default)

    def check(self, value: Any) -> None:
        """Raise ConfigError, which names the flag, for a value that cannot be."""
        about = self.about
        if value is None:
            return
        for each in value if isinstance(value, tuple) else (value,):
            self._check_value(each)
        if about.choices is not None:
            check_choice(self.flag, value, about.choices)
        if about.check is not None:
            for each in value if isinstance(value, tuple) else (value,):
                about.check(each, self.flag)
        if about.least is None:
            return
        if about.most is not None:
            check_between(self.flag, value, about.least, about.most, open_low=about.above_least)
        else:
            check_at_least(self.flag, value, int(about.least))

    def brings_code(self, value: Any) -> bool:
        """Whether code that is not ours would run for this value."""
        return value is not None and self.about.brings_code is not None and self.about.brings_code(value)

    def refuse_code(self, place: str, value: Any) -> None:
        """Raise ConfigError where a file or the environment, at `place`, asks for code to be run."""
        if self.brings_code(value):
            shown = f"{self.flag} {value}" if isinstance(value, str) else self.flag
            raise ConfigError(
                f"{place} would run code, and only the command line may ask for that: give {shown} there, if "
                "you trust it"
            )

    def _check_value(self, value: Any) -> None:
        """What no setting can be: an empty text, a number that no machine counts to."""
        place = self.flag if self.about.panel else str(self.about.metavar).removesuffix("...")
        if isinstance(value, str) and not value.strip() and not self.about.may_be_empty:
            raise ConfigError(f"{place} is empty; is a variable of the shell unset?")
        if isinstance(value, int | float):
            check_size(place, value)


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """A flag of the version before: still taken, without being shown, and said to be another now."""

    name: str
    kind: Kind
    now: str  # how it is written today
    values: Callable[[Any], dict[str, Any]]  # the settings that it stands for; may raise ConfigError
    metavar: str | None = None

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def note(self) -> str:
        """What to tell who uses it."""
        return f"{self.flag} is now {self.now}; the next version does not know it any more"


def gone(why: str, harmless: Any = False) -> Callable[[Any], dict[str, Any]]:
    """The `values` of a flag that stands for nothing any more: any value but `harmless` is a ConfigError.

    The error says `why`, with the value where {} stands.
    """

    def values(value: Any) -> dict[str, Any]:
        if value != harmless:
            raise ConfigError(why.format(value))
        return {}

    return values


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What groups and configurations have in common: each subclass is a frozen dataclass.

    A new object raises ConfigError for what cannot work.
    """

    renamed: ClassVar[tuple[Renamed, ...]] = ()
    # what a file or the environment says of these is meant for another command
    on_command_line_alone: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(
        cls, *, panel: str | None = None, defaults: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """`panel` is that of the group's options in --help.

        `defaults` stand for those of the groups, in this configuration alone.
        """
        super().__init_subclass__(**more)
        for each in vars(cls).values():
            if isinstance(each, Field) and each.metadata[_KEY].panel == OF_GROUP:
                about = replace(each.metadata[_KEY], panel=panel)
                each.metadata = MappingProxyType({_KEY: about})
        inherited = {each.name: each for base in cls.__bases__ for each in fields(base)}
        for name, default in (defaults or {}).items():
            known = inherited[name]
            cls.__annotations__ = {**get_annotations(cls), name: known.type}
            setattr(cls, name, field(default=default, metadata=known.metadata))
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for each in settings_of(type(self)):
            each.check(getattr(self, each.name))

    @classmethod
    def of(cls, other: Settings, **values: Any) -> Self:
        """The settings of this kind that `other` has too, but `values` for those that they name."""
        shared = {each.name for each in fields(cls)} & {each.name for each in fields(other)}
        return cls(**{name: getattr(other, name) for name in shared - set(values)}, **values)

    def options_of(self, *groups: type[Settings]) -> dict[str, Any]:
        """The settings of these groups by their names; not `asdict`, which would copy what they hold."""
        return {each.name: getattr(self, each.name) for group in groups for each in settings_of(group)}

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, for what is written and shown: URLs without their secrets."""
        return dict(redacted(asdict(self)))


def settings_of(cls: type[Settings]) -> tuple[Setting, ...]:
    """All settings of a group or a configuration: group by group, in the order in which they are declared."""
    declared = {each.name: each for each in fields(cls)}
    return tuple(_setting(declared[name]) for name in dict.fromkeys(_names(cls)) if name in declared)


def _names(cls: type) -> Iterator[str]:
    """A class's fields behind those of its groups, the first group first; dataclasses have the last first."""
    for base in cls.__bases__:
        yield from _names(base)
    yield from get_annotations(cls)


def _setting(declared: Any) -> Setting:
    about = declared.metadata[_KEY]
    kind = about.kind or KINDS[str(declared.type).removesuffix(" | None")]
    default = declared.default if declared.default_factory is MISSING else declared.default_factory()
    return Setting(name=declared.name, default=default, kind=kind, about=about)


def renamed_of(cls: type[Settings]) -> tuple[Renamed, ...]:
    """The flags of the version before that a configuration still takes."""
    return tuple(each for base in cls.__mro__ for each in base.__dict__.get("renamed", ()))
