"""What a calibration has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.settings.calibrate import CalibrateConfig

if TYPE_CHECKING:
    from pipeline.profile import Profile
    from pipeline.quality.bounds import Bounds
    from pipeline.quality.cost import CostModel
    from pipeline.quality.search import Trial
    from pipeline.quality.sensitivity import Sensitivity
    from pipeline.quality.verification import Verification


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found; without a profile nothing held."""

    config: CalibrateConfig
    profile: Profile | None
    trials: tuple[Trial, ...]
    verifications: tuple[Verification, ...]
    sensitivities: tuple[Sensitivity, ...]
    saved_ms: tuple[float, ...]  # predicted, for each of `sensitivities`
    cost: CostModel
    searched: int  # cases
    held_out: int
    candidates: int
    dense_ttft_ms: float  # mean over the cases searched on
    seconds: float

    @property
    def bounds(self) -> Bounds:
        """What was allowed to be lost."""
        from pipeline.quality.bounds import Bounds

        return Bounds.of(self.config)

    @property
    def chosen(self) -> Verification | None:
        return next((each for each in self.verifications if each.holds), None)
