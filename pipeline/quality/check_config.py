"""Every setting of a check, tested in one place before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import (
    ATTENTION,
    ATTENTION_DTYPES,
    DTYPES,
    LINEAR_DTYPES,
    check_at_least,
    check_choice,
    parse_shard,
    read_template,
)
from pipeline.errors import ConfigError, StorageError
from pipeline.pruning.registry import check_method_name
from pipeline.quality.bootstrap import parse_drop
from pipeline.quality.needles import KINDS, check_kinds
from pipeline.quality.samples import part_of
from pipeline.quality.suites import NEEDLES, SuiteName, parse_suite

# of a gate's metric: the name of its measure; the first four need no generated answer
FORCED_METRICS = ("token-accuracy", "nll", "found", "agreement")
GENERATED_METRICS = ("score", "exact-match", "token-f1", "rouge-l", "edit-similarity", "choice")
METRICS = FORCED_METRICS + GENERATED_METRICS
NEEDLE_LENGTHS = (8192, 16384, 30720)


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """The settings of `marsinfer check`, named as its flags. Raises ConfigError for one that cannot work."""

    input: tuple[str, ...] = ()
    # what is asked
    text_column: str = "text"
    question_column: str | None = None
    question: str | None = None
    id_column: str | None = None
    reference_column: str | None = None
    task_column: str | None = None
    suites: tuple[str, ...] = ()  # leval:DIR, longbench:DIR or needles
    needle_kinds: tuple[str, ...] = KINDS
    needle_lengths: tuple[int, ...] | None = None  # None: those of NEEDLE_LENGTHS that the model can take
    needle_count: int = 20
    limit: int | None = None  # first rows of the input, and of each suite, tasks in turn
    limit_per_task: int | None = None
    document_shard: str | None = None  # I/N: of N parts of the documents, by their hash, the I-th
    tasks: tuple[str, ...] = ()  # of the suites and of the input; none: all
    seed: int = 0  # of needles, of --limit-per-task and of the interval
    # prompts
    system: str | None = None
    prompt_template: str | None = None  # a file
    # model
    model: str = "smollm2-135m"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    linear_dtype: str = "auto"  # of the method's side, as attention_dtype
    attention: str = "auto"
    attention_dtype: str = "auto"
    trust_remote_code: bool = False
    # method
    method: str = "marsinfer"
    settings: Mapping[str, Any] = field(default_factory=dict)
    profile: str | None = None  # the file that method, settings and precisions are of
    # answers
    generate: bool = False
    max_new_tokens: int = 128
    # gate
    metric: str | None = None  # None: found, token-accuracy or agreement, by what there is
    max_drop: str | None = None  # None: 1pt, and 1% of nll
    per_task: bool = False
    # files
    baseline: str | None = None
    overwrite_baseline: bool = False
    json: str | None = None
    junit: str | None = None
    markdown: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        check_choice("--dtype", self.dtype, DTYPES)
        check_choice("--linear-dtype", self.linear_dtype, LINEAR_DTYPES)
        check_choice("--attention", self.attention, ATTENTION)
        check_choice("--attention-dtype", self.attention_dtype, ATTENTION_DTYPES)
        check_at_least("--seed", self.seed, 0)
        for flag in ("max_new_tokens", "needle_count", "limit", "limit_per_task"):
            value = getattr(self, flag)
            if value is not None:
                check_at_least(f"--{flag.replace('_', '-')}", value, 1)
        if self.document_shard is not None:
            parse_shard(self.document_shard, "--document-shard")
        check_method_name(self.method)
        self._check_data()
        self._check_metric()
        self._check_files()

    @property
    def suite_names(self) -> list[SuiteName]:
        return [parse_suite(text) for text in self.suites]

    @property
    def has_needles(self) -> bool:
        return NEEDLES in self.suites

    @property
    def asks_rows(self) -> bool:
        """Whether the rows of the input are asked themselves, and not only hide needles."""
        return bool(self.input) and (self.reference_column is not None or not self.suites)

    def takes_document(self, key: str) -> bool:
        """Whether the document with this key is in the shard."""
        if self.document_shard is None:
            return True
        part, parts = parse_shard(self.document_shard, "--document-shard")
        return part_of(key, parts) == part - 1

    @property
    def has_references(self) -> bool:
        return self.reference_column is not None or bool(self.suites)

    @property
    def gate_metric(self) -> str:
        if self.metric is not None:
            return self.metric
        if not self.has_references:
            return "agreement"
        return "found" if set(self.suites) == {NEEDLES} and not self.asks_rows else "token-accuracy"

    @property
    def bound(self) -> tuple[float, bool]:
        """The largest drop allowed: points of the score and False, or percent of dense's and True."""
        default = "1%" if self.gate_metric == "nll" else "1pt"
        return parse_drop(default if self.max_drop is None else self.max_drop)

    @property
    def bound_text(self) -> str:
        value, relative = self.bound
        return f"{value:g}{'%' if relative else 'pt'}"

    def template_text(self) -> str | None:
        """The prompt template's text, read from its file."""
        return read_template(self.prompt_template)

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values; `metric` and `max_drop` as they were understood."""
        return {**asdict(self), "metric": self.gate_metric, "max_drop": self.bound_text}

    def _check_data(self) -> None:
        names = self.suite_names
        for name in self.suites:
            if self.suites.count(name) > 1:
                raise ConfigError(f"--suite {name} is given twice")
        if not self.input and not names:
            raise ConfigError("nothing to check: give DATA or --suite leval:DIR or longbench:DIR")
        if self.has_needles and not self.input and len(names) == 1:
            raise ConfigError("--suite needles hides them in documents: give DATA, or another suite")
        if self.input and not self.asks_rows and not self.has_needles:
            raise ConfigError(
                "DATA is not used beside these suites: give its --reference-column, or leave it out"
            )
        if self.reference_column is not None and not self.input:
            raise ConfigError("--reference-column is a column of DATA, which is not given")
        if not self.asks_rows:
            for flag in ("question", "question_column", "id_column", "task_column"):
                if getattr(self, flag) is not None:
                    raise ConfigError(
                        f"--{flag.replace('_', '-')} is of DATA's own rows, which are asked beside a suite "
                        "only with --reference-column"
                    )
        if self.question is not None and self.question_column is not None:
            raise ConfigError("--question and --question-column exclude each other")
        asks = self.question is not None or self.question_column is not None
        if self.asks_rows and not asks and self.prompt_template is None:
            raise ConfigError(
                "no question: give --question TEXT for all rows, --question-column NAME, "
                "or a --prompt-template FILE that says what to do with each document"
            )
        check_kinds(self.needle_kinds)

    def _check_metric(self) -> None:
        if self.metric is not None:
            check_choice("--metric", self.metric, METRICS)
        if self.generate and not self.has_references:
            raise ConfigError(
                "--generate scores answers against references: give --reference-column or a --suite"
            )
        if self.gate_metric in GENERATED_METRICS and not self.generate:
            raise ConfigError(f"--metric {self.metric} needs generated answers: add --generate")
        if self.gate_metric in ("token-accuracy", "nll", "found") and not self.has_references:
            raise ConfigError(
                f"--metric {self.metric} needs references: give --reference-column or a --suite"
            )
        if self.gate_metric == "nll" and not self.bound[1]:
            raise ConfigError(f"--max-drop {self.max_drop}: nll has no points; give % of dense's, as in 1%")

    def _check_files(self) -> None:
        if self.overwrite_baseline and self.baseline is None:
            raise ConfigError("--overwrite-baseline needs --baseline FILE")
        if self.resume and self.json in (None, "-"):
            raise ConfigError("--resume needs --json FILE: finished rows are kept beside that file")
        named: dict[Path, str] = {}
        for name in ("json", "junit", "markdown", "baseline"):
            path = getattr(self, name)
            if path is None or (name == "json" and path == "-"):
                continue
            _check_place(f"--{name}", Path(path))
            real = Path(path).resolve()
            if real in named:
                raise ConfigError(f"--{name} and {named[real]} name one file, {path}")
            named[real] = f"--{name}"
        for path in self.input:
            if (given := named.get(Path(path).resolve())) is not None:
                raise ConfigError(f"{given} {path} is the input; name another file")


def _check_place(flag: str, path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise StorageError(
            f"{flag} {path} cannot be written: there is no folder {path.parent}; make it first"
        )


def parse_list(flag: str, text: str) -> Sequence[str]:
    """`a,b` as ["a", "b"]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{flag} {text!r}: write values with commas between them")
    return parts
