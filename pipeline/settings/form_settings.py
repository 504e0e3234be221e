"""The form that answers must have, and how sure the model was of them."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.outputs.own_columns import CHOICE_LOGPROBS, LOGPROB_NAMES
from pipeline.records import ResponseFormat
from pipeline.settings.kinds import WORDS
from pipeline.settings.option import ANSWERS, Settings, option
from pipeline.structured.grammars import choices_format, json_schema_format
from pipeline.values.schemas import read_schema

FORMS = ("json_schema", "regex", "choices")


class FormSettings(Settings, panel=ANSWERS):
    """What an answer must be like, whatever the model would rather write."""

    json_schema: str | None = option(
        None,
        metavar="FILE",
        help="Answers are JSON under this schema: a file, or the schema itself, {...}.",
    )
    regex: str | None = option(
        None, metavar="PATTERN", help="Answers match this regular expression, from beginning to end."
    )
    choices: tuple[str, ...] | None = option(
        None, metavar="A,B[,...]", help="Answers are one of these texts.", kind=WORDS
    )
    logprobs: bool = option(
        False,
        help="Columns mean_logprob and min_logprob, how likely an answer's tokens were; with --choices also "
        "choice_logprobs.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) > 1:
            flags = " and ".join(_flag(name) for name in given[:2])
            raise ConfigError(f"{flags} exclude each other: an answer has one form")
        for choice in self.choices or ():
            if choice != choice.strip():
                raise ConfigError(f"--choices: {choice!r} has white space around it")
            if self.choices and self.choices.count(choice) > 1:
                raise ConfigError(f"--choices: {choice!r} is given twice")
        if self.choices is not None and len(self.choices) < 2:
            raise ConfigError("--choices needs at least two texts, with commas between them")

    @property
    def form_flag(self) -> str | None:
        """The flag that gives the form, with its value where that is short; None without a form."""
        name = next((name for name in FORMS if getattr(self, name) is not None), None)
        if name is None:
            return None
        value = getattr(self, name)
        is_told = isinstance(value, str) and len(value) <= 80 and not value.lstrip().startswith("{")
        return f"{_flag(name)} {value}" if is_told else _flag(name)

    @property
    def logprob_columns(self) -> frozenset[str]:
        """The columns that an output has for log-probabilities."""
        if not self.logprobs:
            return frozenset()
        return frozenset((*LOGPROB_NAMES, *(() if self.choices is None else (CHOICE_LOGPROBS,))))

    def response_format(self) -> ResponseFormat | None:
        """The form, a schema read from its file. Raises ConfigError."""
        if self.json_schema is not None:
            return json_schema_format(read_schema(self.json_schema))
        if self.regex is not None:
            return ResponseFormat("regex", self.regex)
        return None if self.choices is None else choices_format(self.choices)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
