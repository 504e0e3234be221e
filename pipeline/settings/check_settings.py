"""Every setting of a check, tested in one place before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, StorageError
from pipeline.settings.answer_settings import SamplingSettings
from pipeline.settings.kinds import TEXT
from pipeline.settings.method_settings import IN_STEPS, MethodSettings
from pipeline.settings.option import ANSWERS, FILES, GATE, Renamed, Settings, option
from pipeline.settings.parse import NEEDLES, Bound, parse_drop
from pipeline.settings.row_settings import RowSettings
from pipeline.settings.run_settings import ResumeSettings

# of a gate's metric: the name of its measure; the first four need no generated answer
FORCED_METRICS = ("token-accuracy", "nll", "found", "agreement")
GENERATED_METRICS = ("score", "exact-match", "token-f1", "rouge-l", "edit-similarity", "choice")
METRICS = FORCED_METRICS + GENERATED_METRICS


class DropSettings(Settings, panel=GATE):
    """The bound of a gate, and where the result goes."""

    max_drop: str | None = option(
        None,
        metavar="Npt|N%",
        help="Largest drop below dense: 1pt is 0.01 of the score, 1% a hundredth of dense's; "
        "nll takes %, of its rise.",
        shown_default="2pt, 2% for nll",
        check=parse_drop,
    )
    out: str | None = option(
        None,
        metavar="FILE",
        help="The result: check's as JSON (- prints it; finished rows are kept beside the file), "
        "calibrate's profile as TOML.",
        in_environment=False,
        panel=FILES,
    )


class CheckConfig(RowSettings, MethodSettings, SamplingSettings, DropSettings, ResumeSettings, panel=FILES):
    """The settings of `marsinfer check`, named as its flags. Raises ConfigError for one that cannot work."""

    on_command_line_alone = ("resume",)
    renamed = (
        Renamed(
            name="json",
            kind=TEXT,
            now="--out FILE",
            values=lambda path: {"out": path},
            metavar="FILE",
        ),
    )

    scope: str = option(
        "documents",
        help="documents: what documents like these lose, of which enough are needed to tell; rows: these "
        "rows alone, against the scores in --baseline that were accepted last, or else dense's: a few will "
        "do, for CI.",
        choices=("documents", "rows"),
        panel=GATE,
    )
    generate: bool = option(
        False, help="Also generate answers, and score them against the references.", panel=ANSWERS
    )
    metric: str | None = option(
        None,
        help="token-accuracy: share of a reference's tokens that are predicted (the default with "
        "references); nll: nats per token; found: the share of a reference's parts of which all tokens are "
        "predicted, where a reference that is no list is one part (the default of needles alone); "
        "agreement: share of the tokens at which dense chooses the same (the default without "
        "references); with --generate score (each row's own), exact-match, token-f1, rouge-l, "
        "edit-similarity, choice. All are means over documents.",
        shown_default="by the rows",
        choices=METRICS,
        panel=GATE,
    )
    per_task: bool = option(
        False, help="Each task is a gate of its own; all of them have to pass.", panel=GATE
    )
    baseline: str | None = option(
        None,
        metavar="FILE",
        help="Parquet file of dense's results, and of the method's that were accepted: made if it is not "
        "there, else dense's are used instead of running.",
    )
    overwrite_baseline: bool = option(
        False, help="Make the baseline anew, and accept what the method scores now."
    )
    junit: str | None = option(None, metavar="FILE", help="Gates as JUnit XML.")
    markdown: str | None = option(None, metavar="FILE", help="Tables as Markdown, added to the end of FILE.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_data()
        if self.method in IN_STEPS:
            raise ConfigError(
                f"--method {self.method} leaves out parts of decode steps, and check decodes none of the "
                "answers that it scores: compare outputs of batch (marsinfer report)"
            )
        self._check_metric()
        self._check_files()

    @property
    def tasks_are_gates(self) -> bool:
        return self.per_task

    @property
    def gate_metric(self) -> str:
        if self.metric is not None:
            return self.metric
        if not self.has_references:
            return "agreement"
        return "found" if set(self.suite) == {NEEDLES} and not self.asks_rows else "token-accuracy"

    @property
    def bound(self) -> Bound:
        """The largest drop allowed."""
        default = "2%" if self.gate_metric == "nll" else "2pt"
        return parse_drop(default if self.max_drop is None else self.max_drop)

    @property
    def result_file(self) -> Path | None:
        """Where the result goes as JSON, and beside it finished rows; None where it is only printed."""
        return None if self.out in (None, "-") else Path(str(self.out))

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values; `metric` and `max_drop` as they were understood."""
        return {**super().resolved(), "metric": self.gate_metric, "max_drop": str(self.bound)}

    def _check_metric(self) -> None:
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
        if self.gate_metric == "nll" and not self.bound.relative:
            raise ConfigError(f"--max-drop {self.max_drop}: nll has no points; give % of dense's, as in 1%")

    def _check_files(self) -> None:
        if self.overwrite_baseline and self.baseline is None:
            raise ConfigError("--overwrite-baseline needs --baseline FILE")
        if self.resume and self.result_file is None:
            raise ConfigError("--resume needs --out FILE: finished rows are kept beside that file")
        named: dict[Path, str] = {}
        for name in ("out", "junit", "markdown", "baseline"):
            path = getattr(self, name)
            if path is None or (name == "out" and path == "-"):
                continue
            check_place(f"--{name}", Path(path))
            real = Path(path).resolve()
            if real in named:
                raise ConfigError(f"--{name} and {named[real]} name one file, {path}")
            named[real] = f"--{name}"
        for path in self.input:
            if (given := named.get(Path(path).resolve())) is not None:
                raise ConfigError(f"{given} {path} is the input; name another file")


def check_place(flag: str, path: Path) -> None:
    """Raise ConfigError or StorageError for a file that cannot be written there."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise StorageError(
            f"{flag} {path} cannot be written: there is no folder {path.parent}; make it first"
        )
