"""Every setting of a run, checked in one place before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.pruning.registry import check_method_name

ON_OVERLONG = ("error", "skip", "truncate-left", "truncate-right", "truncate-middle")
ORDERS = ("input", "completion")
DTYPES = ("auto", "bfloat16", "float16", "float32")
ATTENTION = ("auto", "fa3", "flash", "cudnn", "varlen", "sdpa")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The settings of `marsinfer batch`, named as its flags. Raises ConfigError for one that cannot work."""

    input: tuple[str, ...]
    output: str
    # reading
    text_column: str = "text"
    question_column: str | None = None
    question: str | None = None
    id_column: str | None = None
    keep_columns: str | None = None
    # prompts
    system: str | None = None
    prompt_template: str | None = None  # a file
    on_overlong: str = "error"
    # model
    model: str = "smollm2-135m"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    trust_remote_code: bool = False
    # method
    method: str = "marsinfer"
    settings: Mapping[str, Any] = field(default_factory=dict)
    # answers
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    # running and writing
    pack_tokens: int | None = None  # None: from free memory
    order: str = "input"
    overwrite: bool = False

    def __post_init__(self) -> None:
        _check_choice("--on-overlong", self.on_overlong, ON_OVERLONG)
        _check_choice("--order", self.order, ORDERS)
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--attention", self.attention, ATTENTION)
        _check_at_least("--max-new-tokens", self.max_new_tokens, 1)
        _check_at_least("--seed", self.seed, 0)
        if self.pack_tokens is not None:
            _check_at_least("--pack-tokens", self.pack_tokens, 1)
        _check_between("--temperature", self.temperature, 0, 100)
        _check_between("--top-p", self.top_p, 0, 1, open_low=True)
        check_method_name(self.method)
        self._check_questions()
        if not self.input:
            raise ConfigError("no input: give a file, a glob or a folder")
        if "" in self.stop:
            raise ConfigError("--stop takes a text that is not empty")

    def _check_questions(self) -> None:
        if self.question is not None and self.question_column is not None:
            raise ConfigError("--question and --question-column exclude each other")
        if self.question is not None and not self.question.strip():
            raise ConfigError("--question is empty")
        if self.question is None and self.question_column is None and self.prompt_template is None:
            raise ConfigError(
                "no question: give --question TEXT for all rows, --question-column NAME, "
                "or a --prompt-template FILE that says what to do with each document"
            )

    def template_text(self) -> str | None:
        """The prompt template's text, read from its file."""
        if self.prompt_template is None:
            return None
        try:
            return Path(self.prompt_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-template {self.prompt_template} cannot be read: {error}") from error

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, for the output's metadata."""
        return asdict(self)


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """`["eta=0.95", "window=50"]` as a mapping; the method converts the values."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ConfigError(f"--set {pair!r}: write it as NAME=VALUE, for example --set eta=0.95")
        settings[name.strip()] = value.strip()
    return settings


def parse_count(flag: str, text: str) -> int:
    """A count that may end in k or m, in thousands and millions of 1,024: `32k` is 32,768."""
    digits, factor = text.strip().lower(), 1
    if digits and digits[-1] in "km":
        factor = 1024 if digits[-1] == "k" else 1024 * 1024
        digits = digits[:-1]
    if not digits.isdecimal():
        raise ConfigError(f"{flag} {text!r}: give a whole number such as 8192, 32k or 1m")
    return int(digits) * factor


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} {value!r}: choose from {', '.join(choices)}")


def _check_at_least(flag: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{flag} {value}: must be a whole number of at least {low}")


def _check_between(flag: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not (low < value <= high if open_low else low <= value <= high):
        bounds = f"above {low} and at most {high}" if open_low else f"between {low} and {high}"
        raise ConfigError(f"{flag} {value}: must be {bounds}")
