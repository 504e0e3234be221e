"""Rows that are measured one by one, by check, calibrate and bench accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.settings.answer_settings import AnswerSettings
from pipeline.settings.data_settings import DataSettings
from pipeline.settings.model_settings import ModelSettings
from pipeline.settings.prompt_settings import PromptSettings
from pipeline.settings.question_settings import ASKED
from pipeline.settings.suite_settings import SuiteSettings

# a prompt that is measured by itself is cut where a run might answer it in parts
ON_OVERLONG = "truncate-middle"


@dataclass(frozen=True, kw_only=True)
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
        if self.questions_column is not None and self.reference_column is not None:
            raise ConfigError(
                "--questions-column and --reference-column exclude each other: which question a right answer "
                "is to is not known; give one row for each question"
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
        if not self.asks_rows:
            self._refuse_questions()

    def _refuse_questions(self) -> None:
        for name in (*ASKED, "id_column", "task_column"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is of INPUT's own rows, which are asked beside a suite "
                    "only with --reference-column"
                )
