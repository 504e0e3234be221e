"""Every setting of a run, checked in one place before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.pruning.registry import check_method_name

ON_OVERLONG = ("error", "skip", "truncate-left", "truncate-right", "truncate-middle")
ORDERS = ("input", "completion")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LINEAR_DTYPES = ("auto", "fp8")
ATTENTION_DTYPES = ("auto", "fp8")
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
    shard: str | None = None  # I/N: every N-th row, from the I-th on
    sample: int | None = None  # rows drawn with `seed`
    limit: int | None = None
    # prompts
    system: str | None = None
    prompt_template: str | None = None  # a file
    on_overlong: str = "error"
    # model
    model: str = "smollm2-135m"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    linear_dtype: str = "auto"  # fp8: all linear layers but the head
    attention: str = "auto"
    attention_dtype: str = "auto"  # fp8: queries, keys and values of the prefill
    trust_remote_code: bool = False
    # method
    method: str = "marsinfer"
    settings: Mapping[str, Any] = field(default_factory=dict)
    sparse_attention: float | None = None  # the same parameter of whatever method
    profile: str | None = None  # a file that calibrate made, whose settings the others stand above
    # answers
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    # running and writing
    pack_tokens: int | None = None  # None: from free memory
    kv_memory: int | None = None  # bytes of K/V on the device, beyond which blocks of them are offloaded
    order: str = "input"
    save_selection: bool = False  # which tokens each layer computed, and their text: see tiers.py
    overwrite: bool = False
    resume: bool = False
    retry_errors: bool = False
    max_errors: str | None = None  # a count, or a share of the finished rows as P%
    row_timeout: float | None = None  # seconds a row may take in its pack

    def __post_init__(self) -> None:
        check_choice("--on-overlong", self.on_overlong, ON_OVERLONG)
        check_choice("--order", self.order, ORDERS)
        check_choice("--dtype", self.dtype, DTYPES)
        check_choice("--linear-dtype", self.linear_dtype, LINEAR_DTYPES)
        check_choice("--attention", self.attention, ATTENTION)
        check_choice("--attention-dtype", self.attention_dtype, ATTENTION_DTYPES)
        check_at_least("--max-new-tokens", self.max_new_tokens, 1)
        check_at_least("--seed", self.seed, 0)
        for flag in ("pack_tokens", "kv_memory", "limit", "sample"):
            value = getattr(self, flag)
            if value is not None:
                check_at_least(f"--{flag.replace('_', '-')}", value, 1)
        if self.shard is not None:
            parse_shard(self.shard)
        check_between("--temperature", self.temperature, 0, 100)
        check_between("--top-p", self.top_p, 0, 1, open_low=True)
        if self.sparse_attention is not None:
            check_between("--sparse-attention", self.sparse_attention, 0, 1)
            if "sparse_attention" in self.settings:
                raise ConfigError("--sparse-attention and --set sparse_attention exclude each other")
        if self.save_selection and self.output.lower().endswith(".jsonl"):
            raise ConfigError(f"--save-selection writes bytes, which {self.output} cannot hold: use .parquet")
        check_method_name(self.method)
        self._check_questions()
        self._check_continuing()
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

    def _check_continuing(self) -> None:
        if self.resume and self.overwrite:
            raise ConfigError(
                "--resume and --overwrite exclude each other: one continues what the other drops"
            )
        if self.retry_errors and not self.resume:
            raise ConfigError(
                "--retry-errors needs --resume: it runs the failed rows of an earlier run again"
            )
        if self.max_errors is not None:
            parse_max_errors(self.max_errors)
        if self.row_timeout is not None and not self.row_timeout > 0:
            raise ConfigError(f"--row-timeout {self.row_timeout}: must be a number of seconds above 0")

    @property
    def method_settings(self) -> dict[str, Any]:
        """The method's parameters, by whichever flag they were given."""
        sparse = {} if self.sparse_attention is None else {"sparse_attention": self.sparse_attention}
        return {**self.settings, **sparse}

    def template_text(self) -> str | None:
        """The prompt template's text, read from its file."""
        return read_template(self.prompt_template)

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, for the output's metadata."""
        return asdict(self)


def read_template(path: str | None) -> str | None:
    """The text of the prompt template in a file."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-template {path} cannot be read: {error}") from error


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


_BYTES = {"": 1, "b": 1}
_BYTES |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_BYTES |= {f"{letter}{tail}": 1024**power for power, letter in enumerate("kmgt", 1) for tail in ("", "ib")}


def parse_bytes(flag: str, text: str) -> int:
    """A size such as `1GiB`, `1.5G` (both in powers of 1,024) or `800MB` (in powers of 1,000)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(float(found[1]) * _BYTES[found[2]]) if found and found[2] in _BYTES else 0
    if size < 1:
        raise ConfigError(f"{flag} {text!r}: give a size such as 1GiB or 800MB")
    return size


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8): the second of eight parts."""
    part, slash, parts = text.partition("/")
    if not (slash and part.strip().isdecimal() and parts.strip().isdecimal()):
        raise ConfigError(f"--shard {text!r}: write it as I/N, for example 1/4 for the first of four parts")
    chosen, count = int(part), int(parts)
    if not 1 <= chosen <= count:
        raise ConfigError(f"--shard {text!r}: the part must be between 1 and {count}")
    return chosen, count


def parse_max_errors(text: str) -> tuple[float, bool]:
    """`20` as (20.0, False), a count of rows; `5%` as (5.0, True), per cent of the finished rows."""
    digits = str(text).strip()
    is_share = digits.endswith("%")
    digits = digits.removesuffix("%").strip()
    if not (re.fullmatch(r"\d+(\.\d+)?", digits) if is_share else digits.isdecimal()):
        raise ConfigError(f"--max-errors {text!r}: give a number of rows such as 20, or a share such as 5%")
    if is_share and float(digits) > 100:
        raise ConfigError(f"--max-errors {text!r}: a share is at most 100%")
    return float(digits), is_share


def check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError for a value that is none of these."""
    if value not in choices:
        raise ConfigError(f"{flag} {value!r}: choose from {', '.join(choices)}")


def check_at_least(flag: str, value: int, low: int) -> None:
    """Raise ConfigError for what is no whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{flag} {value}: must be a whole number of at least {low}")


def check_between(flag: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ConfigError for a number outside of these bounds."""
    if not (low < value <= high if open_low else low <= value <= high):
        bounds = f"above {low} and at most {high}" if open_low else f"between {low} and {high}"
        raise ConfigError(f"{flag} {value}: must be {bounds}")
