"""Every setting of a calibration, tested in one place before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.outputs.replacing import is_profile, refuse_foreign_file
from pipeline.settings.check_settings import check_place
from pipeline.settings.gate_settings import SoughtSettings
from pipeline.settings.parse import check_at_least
from pipeline.settings.row_settings import RowSettings


class CalibrateConfig(
    RowSettings,
    SoughtSettings,
    defaults={
        "max_new_tokens": 32,
        "limit": 1000,
        "max_drop": "2pt",
        "out": "profile.toml",
        "needle_count": 200,
    },
):
    """The settings of `marsinfer calibrate`, named as its flags. Raises ConfigError for what cannot work."""

    on_command_line_alone = ("overwrite",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            check_at_least("--limit", self.limit, 2)
        self.check_data()
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
    def asks_rows(self) -> bool:
        """Whether the rows of the input are asked: needles alone take no row's place."""
        return bool(self.input) and (self.reference_column is not None or not self.row_suites)

    @property
    def has_sides(self) -> bool:
        return True

    def _check_profile(self) -> None:
        path = self.profile_file
        check_place("--out", path)
        refuse_foreign_file("--out", path, is_profile)
        if path.exists() and not self.overwrite:
            raise ConfigError(f"--out {path} is there already; name another file, or add --overwrite")
