"""Every setting of a calibration, tested in one place before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import check_at_least, check_between
from pipeline.errors import ConfigError, StorageError
from pipeline.quality.bounds import Bound, Bounds
from pipeline.quality.check_config import CheckConfig
from pipeline.quality.needles import KINDS
from pipeline.quality.suites import NEEDLES

OBJECTIVES = ("ttft",)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """The settings of `marsinfer calibrate`, named as its flags. Raises ConfigError for what cannot work."""

    out: str
    input: tuple[str, ...] = ()
    # what is asked
    text_column: str = "text"
    question_column: str | None = None
    question: str | None = None
    id_column: str | None = None
    reference_column: str | None = None
    task_column: str | None = None
    suites: tuple[str, ...] = ()  # leval:DIR or longbench:DIR
    needles: bool = False  # hidden in the input's documents
    needle_kinds: tuple[str, ...] = KINDS
    needle_lengths: tuple[int, ...] | None = None
    needle_count: int = 20
    limit: int = 500  # first rows of the input, and of each suite, tasks in turn
    document_shard: str | None = None  # I/N: of N parts of the documents, by their hash, the I-th
    tasks: tuple[str, ...] = ()  # of the suites and of the input; none: all
    seed: int = 0
    # prompts
    system: str | None = None
    prompt_template: str | None = None  # a file
    # model
    model: str = "smollm2-135m"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    trust_remote_code: bool = False
    # what is sought
    max_drop: str = "1%"
    needle_drop: str = "2pt"
    objective: str = "ttft"
    accept_inconclusive: bool = False
    mass: float = 0.9  # attention mass outside which probes spare tokens
    max_new_tokens: int = 32  # longest answer, and longest part of a reference
    minutes: float = 10.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"--objective {self.objective!r}: choose from {', '.join(OBJECTIVES)}")
        check_at_least("--limit", self.limit, 2)
        check_between("--minutes", self.minutes, 0, 24 * 60, open_low=True)
        check_between("--mass", self.mass, 0, 1)
        if NEEDLES in self.suites:
            raise ConfigError("--suite needles: calibrate hides them beside other rows, by --needles")
        if self.needles and not self.input and not self.suites:
            raise ConfigError("--needles hides them in documents: give DATA or a --suite")
        self.data_configs()
        self.bounds()
        self._check_files()

    @property
    def has_references(self) -> bool:
        return self.reference_column is not None or bool(self.suites)

    def bounds(self) -> Bounds:
        return Bounds(
            main=Bound.of(self.max_drop, "--max-drop"),
            needles=Bound.of(self.needle_drop, "--needle-drop"),
            main_name="token accuracy" if self.has_references else "agreement",
        )

    def data_configs(self) -> list[CheckConfig]:
        """The rows whose answers count and the needles, as `check` reads them."""
        needles = {
            "needle_kinds": self.needle_kinds,
            "needle_lengths": self.needle_lengths,
            "needle_count": self.needle_count,
        }
        hides = self.needles and bool(self.input)
        asks = not hides or not self.suites or self.reference_column is not None
        rows = self._config(
            input=self.input if asks else (),
            question_column=self.question_column,
            question=self.question,
            id_column=self.id_column,
            reference_column=self.reference_column,
            task_column=self.task_column,
            suites=(*self.suites, NEEDLES) if self.needles and not hides else self.suites,
            tasks=self.tasks,
            **needles,
        )
        return [rows, self._config(input=self.input, suites=(NEEDLES,), **needles)] if hides else [rows]

    def _config(self, **more: object) -> CheckConfig:
        shared = (
            "text_column",
            "limit",
            "document_shard",
            "seed",
            "system",
            "prompt_template",
            "model",
            "revision",
            "dtype",
            "device",
            "attention",
            "trust_remote_code",
            "max_new_tokens",
        )
        settings = {name: getattr(self, name) for name in shared}
        return CheckConfig(**settings, **more)  # type: ignore[arg-type]

    def _check_files(self) -> None:
        path = Path(self.out)
        if path.is_dir():
            raise ConfigError(f"--out {path} is a folder; name a file in it")
        if not path.absolute().parent.is_dir():
            raise StorageError(
                f"--out {path} cannot be written: there is no folder {path.parent}; make it first"
            )
        if path.exists() and not self.overwrite:
            raise ConfigError(f"--out {path} is there already; name another file, or add --overwrite")
