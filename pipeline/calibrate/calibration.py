"""What a calibration has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.settings.calibrate_settings import CalibrateConfig

if TYPE_CHECKING:
    from pipeline.calibrate.bounds import Bounds
    from pipeline.calibrate.ladder import Rung, RungResult
    from pipeline.calibrate.sensitivity import Sensitivity
    from pipeline.setup.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found; without a profile nothing held."""

    config: CalibrateConfig
    profile: Profile | None
    probes: tuple[Sensitivity, ...]
    ladder: tuple[Rung, ...]
    tested: tuple[RungResult, ...]  # the first rungs, in their order
    chosen: RungResult | None
    searched: int  # cases
    held_out: int
    seconds: float

    @property
    def bounds(self) -> Bounds:
        """What was allowed to be lost."""
        from pipeline.calibrate.bounds import Bounds

        return Bounds.of(self.config)
