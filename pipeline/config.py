"""Every setting of a run, checked in one place before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.pruning.registry import check_method_name

ON_OVERLONG = ("error", "skip", "split", "truncate-left", "truncate-right", "truncate-middle")
ORDERS = ("input", "completion")
GUARD = ("auto", "off")
GROUP = ("auto", "off")
ENGINES = ("local", "ray")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LINEAR_DTYPES = ("auto", "fp8", "mixed")
ATTENTION_DTYPES = ("auto", "fp8")
ATTENTION = ("auto", "fa3", "flash", "cudnn", "varlen", "sdpa")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The settings of `marsinfer batch`, named as its flags, whose --help explains them.

    `input` are files, globs, folders or URLs, `output` a file or a URL; a question comes from `question`,
    `question_column` or a `prompt_template`. Counts are tokens (`max_new_tokens`, `pack_tokens`) or rows
    (`limit`, `sample`), `kv_memory` is in bytes, `row_timeout` in seconds; `shard` is text such as 2/8,
    `max_errors` text such as 20 or 5%. `settings` are the parameters of `method`, as numbers or as text.

    Raises ConfigError, which names the flag, for a setting that cannot work; imports nothing heavy.
    """

    input: tuple[str, ...]
    output: str
    # reading
    text_column: str = "text"
    question_column: str | None = None
    questions_column: str | None = None  # a list of questions a row
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
    split_overlap: int = 128  # tokens that a part shares with the one before
    combine_template: str | None = None  # a file
    # model
    model: str = "smollm2-135m"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    linear_dtype: str = "auto"  # fp8: all linear layers but the head; mixed: most of a document's work
    attention: str = "auto"
    attention_dtype: str = "auto"  # fp8: queries, keys and values of the prefill
    rope_scaling: str | None = None  # yarn:FACTOR, or yarn:FACTOR:ORIGINAL
    trust_remote_code: bool = False
    # method
    method: str = "marsinfer"
    settings: Mapping[str, Any] = field(default_factory=dict)
    sparse_attention: float | None = None  # the same parameter of whatever method
    profile: str | None = None  # a file that calibrate made, whose settings the others stand above
    guard: str = "auto"  # dense for documents that the profile does not speak for, or off
    task_column: str | None = None  # of the kind of task, which the guard looks at
    # answers
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    # running and writing
    engine: str = "local"  # or ray: workers on as many GPUs and machines as there are
    ray_address: str | None = None  # of a cluster, HOST:PORT or auto; None: a Ray of the run's own, here
    workers: str = "all"  # or a count
    gpus_per_worker: int | None = None  # 0 or 1; None: 1 where there are GPUs
    pack_tokens: int | None = None  # None: from free memory
    in_flight: int | None = None  # rows that are decoded together; None: 256 on a GPU, 16 on a CPU
    kv_memory: int | None = None  # bytes of K/V on the device, beyond which blocks of them are offloaded
    group: str = "auto"  # rows about the same document: answered together where that is cheaper
    sort_by_document: bool = False  # so that such rows are near each other, wherever they stand
    order: str = "input"
    save_selection: bool = False  # which tokens each layer computed, and their text: see tiers.py
    overwrite: bool = False
    resume: bool = False
    retry_errors: bool = False
    max_errors: str | None = None  # a count, or a share of the finished rows as P%
    row_timeout: float | None = None  # seconds a row may take: its pack's prefill, and its own steps

    def __post_init__(self) -> None:
        check_choice("--on-overlong", self.on_overlong, ON_OVERLONG)
        check_choice("--group", self.group, GROUP)
        check_choice("--order", self.order, ORDERS)
        check_choice("--guard", self.guard, GUARD)
        check_choice("--dtype", self.dtype, DTYPES)
        check_choice("--linear-dtype", self.linear_dtype, LINEAR_DTYPES)
        check_choice("--attention", self.attention, ATTENTION)
        check_choice("--attention-dtype", self.attention_dtype, ATTENTION_DTYPES)
        self._check_engine()
        check_at_least("--max-new-tokens", self.max_new_tokens, 1)
        check_at_least("--seed", self.seed, 0)
        check_at_least("--split-overlap", self.split_overlap, 0)
        if self.combine_template is not None and self.on_overlong != "split":
            raise ConfigError("--combine-template needs --on-overlong split")
        if self.rope_scaling is not None:
            parse_rope_scaling(self.rope_scaling)
        for flag in ("pack_tokens", "in_flight", "kv_memory", "limit", "sample"):
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

    def _check_engine(self) -> None:
        check_choice("--engine", self.engine, ENGINES)
        if self.engine == "local":
            given = (self.ray_address, self.gpus_per_worker, None if self.workers == "all" else self.workers)
            for flag, value in zip(("--ray-address", "--gpus-per-worker", "--workers"), given, strict=True):
                if value is not None:
                    raise ConfigError(f"{flag} needs --engine ray")
            return
        parse_workers(self.workers)
        if self.gpus_per_worker not in (None, 0, 1):
            raise ConfigError(f"--gpus-per-worker {self.gpus_per_worker}: choose from 0, 1")
        if self.ray_address is not None and "://" in self.ray_address:
            raise ConfigError(
                f"--ray-address {self.ray_address!r}: give HOST:PORT or auto, on a machine of the cluster"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"--device {self.device!r}: Ray gives each worker its GPU; choose from auto, cpu, cuda"
            )
        if (self.device, self.gpus_per_worker) in (("cpu", 1), ("cuda", 0)):
            raise ConfigError(
                f"--device {self.device} and --gpus-per-worker {self.gpus_per_worker} exclude each other"
            )

    def _check_questions(self) -> None:
        for flag, other in combinations(("question", "question_column", "questions_column"), 2):
            if getattr(self, flag) is not None and getattr(self, other) is not None:
                names = (f"--{name.replace('_', '-')}" for name in (flag, other))
                raise ConfigError(f"{' and '.join(names)} exclude each other")
        if self.question is not None and not self.question.strip():
            raise ConfigError("--question is empty")
        asked = (self.question, self.question_column, self.questions_column)
        if asked == (None,) * 3 and self.prompt_template is None:
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

    def combine_text(self) -> str | None:
        """The text of the template that combines the answers of parts, read from its file."""
        return read_template(self.combine_template, "--combine-template")

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, for the output's metadata."""
        return asdict(self)


def read_template(path: str | None, flag: str = "--prompt-template") -> str | None:
    """The text of the prompt template in a file that this flag names."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}") from error


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


def parse_rope_scaling(text: str) -> tuple[float, int | None]:
    """`yarn:4` as (4.0, None); `yarn:4:32768` as (4.0, 32768), the context that the model was trained on."""
    found = re.fullmatch(r"yarn:(\d+(?:\.\d+)?)(?::(\d+k?))?", text.strip().lower())
    if found is None:
        raise ConfigError(
            f"--rope-scaling {text!r}: write it as yarn:FACTOR or yarn:FACTOR:ORIGINAL, for example yarn:4"
        )
    factor = float(found[1])
    if factor <= 1:
        raise ConfigError(f"--rope-scaling {text!r}: the factor must be above 1")
    original = None if found[2] is None else parse_count("--rope-scaling", found[2])
    if original == 0:
        raise ConfigError(f"--rope-scaling {text!r}: the original context must be at least 1 token")
    return factor, original


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


def parse_shard(text: str, flag: str = "--shard") -> tuple[int, int]:
    """`2/8` as (2, 8): the second of eight parts."""
    part, slash, parts = text.partition("/")
    if not (slash and part.strip().isdecimal() and parts.strip().isdecimal()):
        raise ConfigError(f"{flag} {text!r}: write it as I/N, for example 1/4 for the first of four parts")
    chosen, count = int(part), int(parts)
    if not 1 <= chosen <= count:
        raise ConfigError(f"{flag} {text!r}: the part must be between 1 and {count}")
    return chosen, count


def parse_workers(text: str) -> int | None:
    """`4` as 4, `all` as None."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--workers {text!r}: give a number of at least 1, or all")
    return int(text)


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
