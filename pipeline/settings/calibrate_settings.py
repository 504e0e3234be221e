"""Every setting of a calibration, tested in one place before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs.replacing import is_profile, refuse_foreign_file
from pipeline.settings.check_settings import DropSettings, check_place
from pipeline.settings.kinds import NUMBER, SWITCH, TEXT
from pipeline.settings.option import SOUGHT, Renamed, gone, option
from pipeline.settings.parse import NEEDLES, check_at_least, parse_drop
from pipeline.settings.row_settings import RowSettings
from pipeline.settings.run_settings import OverwriteSettings


class CalibrateConfig(
    RowSettings,
    DropSettings,
    OverwriteSettings,
    panel=SOUGHT,
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
    renamed = (
        Renamed(
            name="needles",
            kind=SWITCH,
            now="--suite needles",
            values=lambda wanted: {"suite": (NEEDLES,)} if wanted else {},
        ),
        Renamed(
            name="objective",
            kind=TEXT,
            now="left out: TTFT is what is made least",
            values=gone("--objective {!r}: TTFT is all that calibrate can make least", "ttft"),
            metavar="ttft",
        ),
        Renamed(
            name="mass",
            kind=NUMBER,
            now="left out",
            values=gone("--mass {:g} is gone: calibrate probes the masses that its profiles use", None),
            metavar="M",
        ),
        Renamed(
            name="accept_inconclusive",
            kind=SWITCH,
            now="left out",
            values=gone(
                "--accept-inconclusive is gone: a profile holds only what was shown to be within the bounds; "
                "give more documents, or a larger --max-drop"
            ),
        ),
    )

    needle_drop: str = option(
        "2pt",
        metavar="Npt|N%",
        help="With --suite needles: largest drop of the share of each kind that is found.",
        check=parse_drop,
    )
    minutes: float = option(
        10.0,
        help="Longest time in all; more time, more rows and more rungs.",
        least=0,
        most=24 * 60,
        above_least=True,
    )

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
    def tells_tasks_apart(self) -> bool:
        """Whether rows have tasks that a profile can speak for one by one."""
        return self.task_column is not None or bool(self.row_suites)

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
        if not os.access(path.absolute().parent, os.W_OK):  # which would be found out at the very end
            raise StorageError(f"--out {path} cannot be written: {path.parent} is not open for writing")
