"""A calibration's ladder: settings in an order that is fixed before any is tested, and how it is climbed.

Fixed-sequence testing: hypotheses are tested in a fixed order, each at the full level, up to the first that
is not rejected; the level then holds for all together (W. Maurer, L. Hothorn and W. Lehmacher, Multiple
comparisons in drug clinical trials and preclinical assays, 1995). So that a rung is within all its bounds is
wrongly said of any with a probability of at most `drops.TAIL`, whatever the search that ordered them found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from pipeline.calibration.bounds import Bounds, Verified
from pipeline.calibration.rungs import describe
from pipeline.calibration.sensitivity import Sensitivity
from pipeline.evaluate.drops import worst
from pipeline.evaluate.workbench import Trial, has_pruned
from pipeline.model.variant import Variant
from pipeline.pruning.dense import Dense
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.setup.profile import Profile
from pipeline.suites.samples import grouped

MILD = 0.5  # of the bound, that a precision may be expected to cost which all else is tried in
WORTH = 1.02  # times as fast a rung has to be as the one before
FAR = 2.0  # times the bound: what is expected to lose more is not worth a test


class Seen(NamedTuple):
    """How far something diverged from dense and what it lost, over so many cases."""

    divergence: float
    drop: float
    cases: int


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Settings, and what the search side says of them; drops are in the unit of the main bound."""

    trial: Trial
    drop: float
    expected_drop: float = 0.0  # by its divergence, which few cases tell far better than the drop

    @property
    def variant(self) -> Variant:
        return self.trial.variant

    @property
    def name(self) -> str:
        return describe(self.variant)

    @property
    def prunes(self) -> bool:
        """Whether it is to leave anything out: dense in a lower precision is not."""
        return not isinstance(self.variant.method, Dense)

    @property
    def speed_up(self) -> float:
        """Over dense, predicted."""
        return self.trial.speed_up

    @property
    def seen(self) -> Seen:
        return Seen(self.trial.divergence, self.drop, len(self.trial.scores))

    def expecting(self, slope: float) -> Rung:
        """The same with the drop that a slope, per nat, lets expect; its own where it does not diverge."""
        divergence = self.trial.divergence
        return replace(self, expected_drop=slope * divergence if divergence else self.drop)


def slope_of(seen: Iterable[Seen]) -> float:
    """Drop for a divergence of a nat: the nearest line through 0, by least squares; never negative."""
    seen = list(seen)
    square = sum(each.cases * each.divergence**2 for each in seen)
    product = sum(each.cases * each.divergence * each.drop for each in seen)
    return max(0.0, product / square) if square else 0.0


def mild_precisions(rungs: Sequence[Rung], bound: float) -> list[Rung]:
    """Those worth a rung, the most exact first; the last is what all else is tried in."""
    mild = [rung for rung in rungs if rung.expected_drop <= MILD * bound]
    return _ever_faster(sorted(mild, key=lambda rung: rung.trial.divergence))


def make_ladder(
    precisions: Sequence[Rung], mars: Sequence[Rung], others: Sequence[Rung], bound: float
) -> list[Rung]:
    """By expected loss: precisions, `mars` ever harsher, and at most one other method; each is faster than
    the one before, as predicted.

    The precisions are those of `mild_precisions`. The other method is the fastest whose expected loss is
    within the bound.
    """
    bearable = [rung for rung in mars if rung.expected_drop <= FAR * bound]
    within = [rung for rung in others if rung.expected_drop <= bound]
    best = sorted(within, key=lambda rung: -rung.speed_up)[:1]
    return _ever_faster([*precisions, *bearable, *best])


def _ever_faster(rungs: Iterable[Rung]) -> list[Rung]:
    chosen: list[Rung] = []
    fastest = 1.0
    for rung in rungs:
        if rung.speed_up >= WORTH * fastest:
            chosen.append(rung)
            fastest = rung.speed_up
    return chosen


@dataclass(frozen=True, kw_only=True)
class RungResult:
    """A rung on the cases held out; what was given up for lack of time has not passed, and has no gates."""

    rung: Rung
    trial: Trial
    gates: tuple[Verified, ...]

    @property
    def passes(self) -> bool:
        return self.trial.complete and all(gate.verdict == "pass" for gate in self.gates)

    @property
    def speed_up(self) -> float:
        """Over dense, measured in turns with it."""
        return self.trial.speed_up

    @property
    def verdict(self) -> str:
        """The worst of its gates, or that it was given up."""
        if not self.trial.complete:
            return "given up"
        return worst(gate.verdict for gate in self.gates)

    @property
    def shown_tasks(self) -> list[str]:
        """The tasks of whose rows something was pruned, or all if the rung is to prune nothing."""
        return [task for task, is_shown in self._tasks.items() if is_shown]

    @property
    def unshown_tasks(self) -> list[str]:
        """The others, of whose rows the rung was to prune, and pruned nothing."""
        return [task for task, is_shown in self._tasks.items() if not is_shown]

    @cached_property
    def _tasks(self) -> dict[str, bool]:
        tasks = grouped(self.trial.scores, lambda score: score.task)
        return {task: has_pruned(own) or not self.rung.prunes for task, own in tasks.items()}

    @property
    def worst_gate(self) -> Verified:
        """Of those with the rung's verdict the one that comes nearest to its bound, or goes farthest beyond.

        Of a rung that was not given up.
        """
        deciding = [gate for gate in self.gates if gate.verdict == self.verdict]
        return max(deciding, key=lambda gate: gate.drop.high - gate.judgement.bound)


def climb(rungs: Iterable[Rung], test: Callable[[Rung], RungResult]) -> list[RungResult]:
    """Test rungs in their order, up to the first that does not pass, which is the last of the result."""
    tested: list[RungResult] = []
    for rung in rungs:
        tested.append(test(rung))
        if not tested[-1].passes:
            break
    return tested


def fastest_passed(tested: Iterable[RungResult]) -> RungResult | None:
    """The fastest that passed, as measured, if it is faster than dense."""
    passed = [each for each in tested if each.passes and each.speed_up > 1]
    return max(passed, key=lambda each: each.speed_up, default=None)


@dataclass(frozen=True, kw_only=True, repr=False)
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

    def __repr__(self) -> str:
        found = "nothing passed"
        if self.chosen is not None:
            found = f"{self.chosen.rung.name}, {self.chosen.speed_up:.2f} times as fast as dense"
        return f"<Calibration {found}; {len(self.tested)} of {len(self.ladder)} rungs tested>"

    @property
    def bounds(self) -> Bounds:
        """What was allowed to be lost."""
        return Bounds.of(self.config)
