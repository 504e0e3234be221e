"""Where variants of one model are run on cases, the time is kept, and every run teaches the cost model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.bench.variant import Variant, prepare
from pipeline.errors import ConfigError
from pipeline.model.loading import LoadedModel
from pipeline.pruning.dense import Dense
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.quality.cost import CostModel, Observation
from pipeline.quality.evaluate import Case, Evaluated, evaluate_case
from pipeline.quality.forced import Forced

DRIFT_EVERY_S = 10.0
NOISE = 0.05
DENSE = Variant(Dense.name, Dense())


class Clock:
    """So many seconds from now."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._now = now
        self._began = now()

    @property
    def passed(self) -> float:
        return self._now() - self._began

    @property
    def left(self) -> float:
        return self.seconds - self.passed

    def rest(self) -> Clock:
        """The seconds that are left, beginning now."""
        return Clock(max(0.0, self.left), self._now)

    def before(self, share: float) -> Callable[[], bool]:
        """A question to ask again and again: whether less than this share of the time has passed."""
        return lambda: self.passed < share * self.seconds


@dataclass(kw_only=True)
class Workbench:
    """A model prepared for all variants that its device can run."""

    model: LoadedModel
    fp8: bool  # whether its device can compute linear layers in fp8
    check: Callable[[], None] = lambda: None  # called before every run, and may raise to end all
    observations: list[Observation] = field(default_factory=list)
    running: str = "the first run"  # for messages: the variant and the row

    @classmethod
    def of(cls, model: LoadedModel, check: Callable[[], None] = lambda: None) -> Workbench:
        """Quantise what can be; the model's own precision is kept beside it."""
        linears = _can(
            model,
            [
                Variant("fp8", Dense(), linears="fp8"),
                Variant("mixed", Dense(), linears="mixed"),
                Variant("low", MarsInfer(low="fp8")),
            ],
        )
        return cls(model=model, fp8=linears, check=check)

    def run(
        self, variant: Variant, case: Case, *, first: bool = False, dense: Forced | None = None, top: int = 0
    ) -> Evaluated:
        """One case, prefilled alone. A `first` run may compile kernels, so that its time teaches nothing.

        `dense` is to be diverged from, which has been run with some `top` tokens.
        """
        self.check()
        document = case.document
        self.running = f"{variant.name} on {document.source.place}, {document.prompt_tokens:,} tokens,"
        evaluated = evaluate_case(self.model, variant.use(self.model), case, dense=dense, top=top)
        if not first:
            self.observations.append(
                Observation(
                    passes=evaluated.passes,
                    linears_in_fp8=variant.linears_in_fp8,
                    ttft_ms=evaluated.score.ttft_ms,
                )
            )
        return evaluated

    def cost_model(self) -> CostModel:
        return CostModel.fit(self.model.shape, self.observations)


@dataclass(kw_only=True)
class Drift:
    """How many times slower the device has become since dense was timed: another load, or a lower clock."""

    bench: Workbench
    case: Case
    ttft_ms: float  # what this case took under dense
    clock: Clock
    _factor: float = 1.0
    _measured_at: float = 0.0

    def __post_init__(self) -> None:
        self._measured_at = self.clock.passed

    def __call__(self) -> float:
        """By dense on the same case, at most every `DRIFT_EVERY_S` seconds; what is small is noise, and 1."""
        if self.clock.passed - self._measured_at >= DRIFT_EVERY_S:
            run = self.bench.run(DENSE, self.case)
            factor = run.score.ttft_ms / self.ttft_ms
            self._factor = factor if abs(factor - 1) > NOISE else 1.0
            self._measured_at = self.clock.passed
        return self._factor


def slowdown(before_ms: Sequence[float], own_ms: Sequence[float]) -> float:
    """Times over dense's of the same cases: the median, which a busy moment does not move.

    Each case counts by the time that dense takes, so that what matters is where a run's time goes.
    """
    ratios = sorted((own / before, before) for before, own in zip(before_ms, own_ms, strict=True))
    half, passed = sum(before_ms) / 2, 0.0
    for place, (ratio, weight) in enumerate(ratios):
        passed += weight
        if passed > half or place + 1 == len(ratios):
            return ratio
        if passed == half:
            return (ratio + ratios[place + 1][0]) / 2
    raise ValueError("no cases")


def _can(model: LoadedModel, variants: Iterable[Variant]) -> bool:
    try:
        prepare(model, variants)
    except ConfigError:
        return False
    return True
