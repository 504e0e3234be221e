"""Rows that are measured one by one, by check, calibrate and bench accuracy, and suites of them."""

from __future__ import annotations

from pipeline.errors import ConfigError, did_you_mean
from pipeline.settings.answer_settings import AnswerSettings
from pipeline.settings.data_settings import ASKED, DataSettings
from pipeline.settings.kinds import COUNTS, WORDS
from pipeline.settings.model_settings import ModelSettings
from pipeline.settings.option import READING, SUITES, Settings, option, settings_of
from pipeline.settings.parse import NEEDLES, SuiteName, parse_shard, parse_suite
from pipeline.settings.prompt_settings import PromptSettings

# a prompt that is measured by itself is cut where a run might answer it in parts
ON_OVERLONG = "truncate-middle"
NEEDLE_KINDS = ("single", "multi-key", "multi-value", "multi-query", "tracking", "common-words")
OF_NEEDLES = "needle_"  # the beginning of the names of settings that only needles have


def check_needle_kind(kind: str, flag: str = "--needle-kinds") -> None:
    """Raise `ConfigError` for a kind that there is not."""
    if kind not in NEEDLE_KINDS:
        raise ConfigError(
            f"unknown kind of needles {kind!r}{did_you_mean(kind, NEEDLE_KINDS)}; "
            f"known are {', '.join(NEEDLE_KINDS)}"
        )


class SuiteSettings(Settings, panel=SUITES):
    """What is held against right answers, or else against dense's own."""

    reference_column: str | None = option(
        None,
        help="Column of the right answer, or of a list of them.",
        shown_default="dense's answers count as right",
        panel=READING,
    )
    limit_per_task: int | None = option(
        None,
        metavar="N",
        help="N rows of each task, of as many documents as can be; needles have --needle-count.",
        shown_default="all rows",
        least=1,
        panel=READING,
    )
    document_shard: str | None = option(
        None,
        metavar="I/N",
        help="Of N parts of the documents, by the hash of their text, the I-th alone: to search on one, "
        "and measure on another.",
        shown_default="all documents",
        check=parse_shard,
        panel=READING,
    )
    suite: tuple[str, ...] = option(
        (),
        metavar="NAME[:DIR]",
        help="leval:DIR, longbench:DIR, or needles, hidden in INPUT's documents, without INPUT in the "
        "suites'; repeatable.",
    )
    tasks: tuple[str, ...] = option(
        (),
        metavar="T[,T...]",
        help="Tasks of the suites and of INPUT to take; needles have --needle-kinds.",
        shown_default="all",
        kind=WORDS,
    )
    needle_kinds: tuple[str, ...] = option(
        NEEDLE_KINDS,
        metavar="K[,K...]",
        help=f"Of {', '.join(NEEDLE_KINDS)}.",
        shown_default="all",
        kind=WORDS,
        check=check_needle_kind,
    )
    needle_lengths: tuple[int, ...] | None = option(
        None,
        metavar="N[,N...]",
        help="Prompt lengths in tokens.",
        shown_default="of 8k,16k,30k those that the context holds",
        kind=COUNTS,
    )
    needle_count: int = option(
        20, help="Needles of each kind, which --limit and --limit-per-task do not count.", least=1
    )

    @property
    def suite_names(self) -> list[SuiteName]:
        """The suites, each with its folder. Raises ConfigError."""
        return [parse_suite(text) for text in self.suite]

    @property
    def row_suites(self) -> tuple[str, ...]:
        """The suites that are rows, and no needles."""
        return tuple(name for name in self.suite if name != NEEDLES)

    @property
    def has_needles(self) -> bool:
        return NEEDLES in self.suite

    @property
    def has_references(self) -> bool:
        """Whether there are right answers besides dense's."""
        return self.reference_column is not None or bool(self.suite)


class RowSettings(
    DataSettings,
    PromptSettings,
    ModelSettings,
    AnswerSettings,
    SuiteSettings,
    defaults={"on_overlong": ON_OVERLONG},
):
    """Rows that are measured one by one, and the model that they are measured with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_overlong == "split":
            raise ConfigError(
                "--on-overlong split: each prompt is measured by itself, and has no parts; choose "
                f"{ON_OVERLONG} to measure long documents as far as they fit, or skip to leave them out"
            )
        for name in ("questions_column", "questions"):
            if getattr(self, name) is not None and self.reference_column is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} and --reference-column exclude each other: which question a "
                    "right answer is to is not known; give one row for each question"
                )
        for name in self.suite:
            if self.suite.count(name) > 1:
                raise ConfigError(f"--suite {name} is given twice")

    @property
    def asks_rows(self) -> bool:
        """Whether the rows of the input are asked themselves, and not only hide needles."""
        return bool(self.input) and (self.reference_column is not None or not self.suite)

    @property
    def has_sides(self) -> bool:
        """Whether documents are divided into some to search on and others that are held out."""
        return False

    @property
    def tasks_are_gates(self) -> bool:
        """Whether each task has to pass by itself, needles aside, of which each kind has to be there."""
        return False

    def check_data(self) -> None:
        """Raise ConfigError for settings that name no rows, or rows that are not asked anything."""
        names = self.suite_names
        if not self.input and not names:
            raise ConfigError("nothing to check: give INPUT or --suite leval:DIR or longbench:DIR")
        if self.has_needles and not self.input and len(names) == 1:
            raise ConfigError("--suite needles hides them in documents: give INPUT, or another suite")
        if self.input and not self.asks_rows and not self.has_needles:
            raise ConfigError(
                "INPUT is not used beside these suites: give its --reference-column, or leave it out"
            )
        if self.reference_column is not None and not self.input:
            raise ConfigError("--reference-column is a column of INPUT, which is not given")
        for name in ("shard", "sample"):
            if getattr(self, name) is not None and not self.input:
                raise ConfigError(
                    f"--{name} takes rows of INPUT, which is not given; of a suite take some with --limit, "
                    "--limit-per-task, --tasks or --document-shard"
                )
        if not self.has_needles:
            self._refuse_needle_settings()
        if not self.asks_rows:
            self._refuse_questions()

    def _refuse_questions(self) -> None:
        for name in (*ASKED, "id_column", "task_column"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is of INPUT's own rows, which are asked beside a suite "
                    "only with --reference-column"
                )

    def _refuse_needle_settings(self) -> None:
        for each in settings_of(type(self)):
            if each.name.startswith(OF_NEEDLES) and getattr(self, each.name) != each.default:
                raise ConfigError(f"{each.flag} needs --suite needles, without which there are none")
