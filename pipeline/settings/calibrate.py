"""Every setting of a calibration, tested in one place before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.replacing import is_profile, refuse_foreign_file
from pipeline.settings.asking import ASKED
from pipeline.settings.check import check_place
from pipeline.settings.gate import SoughtSettings
from pipeline.settings.parse import NEEDLES, check_at_least
from pipeline.settings.rows import RowSettings


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(
    RowSettings,
    SoughtSettings,
    defaults={"max_new_tokens": 32, "limit": 500, "max_drop": "1%", "out": "profile.toml"},
):
    """The settings of `marsinfer calibrate`, named as its flags. Raises ConfigError for what cannot work."""

    on_command_line_alone = ("overwrite",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            check_at_least("--limit", self.limit, 2)
        for each in self.row_settings():
            each.check_data()
        self._check_profile()

    @property
    def profile_file(self) -> Path:
        """Where the profile goes."""
        return Path(str(self.out))

    @property
    def has_references(self) -> bool:
        """Whether rows have right answers; needles, which bring theirs, are gates of their own."""
        return self.reference_column is not None or bool(self.row_suites)

    @property
    def row_suites(self) -> tuple[str, ...]:
        """The suites that are rows, and no needles."""
        return tuple(name for name in self.suite if name != NEEDLES)

    def row_settings(self) -> list[RowSettings]:
        """The rows whose answers count, and beside them the needles where they are hidden in the input."""
        if not (self.has_needles and self.input):
            return [RowSettings.of(self)]
        asks = not self.row_suites or self.reference_column is not None
        rows = RowSettings.of(self, suite=self.row_suites, input=self.input if asks else ())
        unasked = dict.fromkeys((*ASKED, "id_column", "reference_column", "task_column"))
        return [rows, RowSettings.of(self, suite=(NEEDLES,), tasks=(), **unasked)]

    def _check_profile(self) -> None:
        path = self.profile_file
        check_place("--out", path)
        refuse_foreign_file("--out", path, is_profile)
        if path.exists() and not self.overwrite:
            raise ConfigError(f"--out {path} is there already; name another file, or add --overwrite")
