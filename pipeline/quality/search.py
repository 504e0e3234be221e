"""Searching candidates for the fastest whose loss is within a budget, as far as the time goes.

What promises most is the aim: the time that a cost model predicts it to save, times the chance that its
loss is within the budget. That chance knows what milder and harsher kin have lost: none is expected to lose
less than a milder one did, or more than a harsher one. Before an aim is tried its milder kin are, the mildest
first: most methods that save much lose far too much, and their mildest settings tell.

On as few rows as a search can afford, small losses are chance: one needle, or three answers. How far a
candidate's next tokens diverge from dense's is known far better, and what a divergence costs is learned from
all that was tried. So a candidate is within the bounds if none is surely exceeded and its divergence agrees.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import inf
from operator import attrgetter

from pipeline.bench.flops import Passes
from pipeline.errors import MarsError, is_failure
from pipeline.quality.bounds import Bounds
from pipeline.quality.candidates import Candidate, Cost, describe, slope_through_zero
from pipeline.quality.cost import CostModel, dense_passes
from pipeline.quality.evaluate import Case, CaseScore
from pipeline.quality.forced import Forced
from pipeline.quality.workbench import Workbench, slowdown

HOPELESS = 5.0  # times the budget: after a third of the cases a candidate is given up
SLOWER = 1.5  # times dense's time: a prediction by which a candidate is surely slower
TYPICAL = 0.75  # of dense's time: cases of the typical one's length and less take so much of it
LEAST_BUDGET = 0.5  # in points or percent: what a prediction of the drop may be wrong by


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a candidate made of the cases, or of as many as it took to give it up."""

    candidate: Candidate
    scores: tuple[CaseScore, ...]
    drop: float  # in the unit of the main bound
    divergence: float  # KL from dense, nats a token, mean over the cases
    exceeds: bool  # whether any bound surely is exceeded, that of needles included
    ttft_ms: float  # dense's mean, divided by the speed-up
    speed_up: float  # over dense: the median over the same cases
    complete: bool = True

    @property
    def name(self) -> str:
        return describe(self.candidate)

    def expected_drop(self, price: float) -> float:
        """What its divergence should cost, at so much a nat; its own drop where it does not diverge."""
        return price * self.divergence if self.divergence else self.drop


@dataclass(kw_only=True)
class Search:
    """Candidates and what is known of them."""

    bench: Workbench
    cases: Sequence[Case]
    dense: Sequence[CaseScore]  # of the same cases
    forced: Sequence[Forced | None]  # what dense predicted in them, to diverge from
    bounds: Bounds
    note: Callable[[str], None] = lambda text: None
    progress: Callable[[Trial], None] = lambda trial: None
    drift: Callable[[], float] = lambda: 1.0  # times slower the device is now than it was for `dense`
    probes: Sequence[Cost] = ()  # divergences of the layers that were probed, and drops in the bound's unit
    trials: list[Trial] = field(default_factory=list)
    scouted: dict[Candidate, Passes] = field(default_factory=dict)

    def run(
        self,
        candidates: Sequence[Candidate],
        within: Callable[[], bool],
        scouts_within: Callable[[], bool] = lambda: True,
    ) -> None:
        """Try candidates until there is no time, or nothing left that promises anything."""
        for candidate in candidates:
            if not (within() and scouts_within()):
                break
            self.scout(candidate)
        tried = {trial.candidate for trial in self.trials}
        waiting = [candidate for candidate in self.scouted if candidate not in tried]
        while waiting and within():
            cost = self.bench.cost_model()
            waiting = [candidate for candidate in waiting if not self._known_to_fail(candidate)]
            if not waiting:
                break
            promises = self._promises(waiting, cost)
            aim = max(waiting, key=promises.__getitem__)
            if promises[aim][0] <= 0 and -promises[aim][1] >= SLOWER * self._dense_ms(cost):
                break  # this one and all others
            best = max(mildest(aim, waiting), key=promises.__getitem__)
            waiting.remove(best)
            self.try_out(best)

    def try_out(self, candidate: Candidate) -> Trial | None:
        """Evaluate one; None if it cannot run."""
        scores: list[CaseScore] = []
        third = -(-len(self.cases) // 3)
        try:
            slower = self.drift()
            for place, case in enumerate(self.cases):
                run = self.bench.run(candidate.variant, case, dense=self.forced[place])
                scores.append(run.score)
                if place + 1 == third and self.bounds.hopeless(self.dense[:third], scores, HOPELESS):
                    break
        except BaseException as error:
            if not self._leave_out(candidate, error):
                raise
            return None
        trial = self._trial(candidate, scores, slower)
        self.trials.append(trial)
        self.progress(trial)
        return trial

    def scout(self, candidate: Candidate) -> None:
        """One run on the typical case, which compiles what must be, and counts what is done."""
        try:
            run = self.bench.run(candidate.variant, self.typical, first=True)
        except BaseException as error:
            if not self._leave_out(candidate, error):
                raise
            return
        self.scouted[candidate] = run.passes

    @property
    def price(self) -> float:
        """What a divergence of a nat costs, in the unit of the drops: a line through 0, probes and trials."""
        tried = (Cost(trial.divergence, trial.drop, len(trial.scores)) for trial in self.trials)
        return slope_through_zero([*self.probes, *tried])

    def within_bounds(self) -> list[Trial]:
        """The trials that are not beyond a bound, nor expected to be by their divergence."""
        price, budget = self.price, self.bounds.main.value
        return [t for t in self.trials if t.complete and not t.exceeds and t.expected_drop(price) <= budget]

    @cached_property
    def typical(self) -> Case:
        """One of the longer ones, by the time that dense takes in all.

        By their number most may be short, and show nothing of what long prompts gain; so may those that take
        the first half of the time, on a model so small that only the longest gain anything.
        """
        ran = sorted(zip(self.cases, self.dense, strict=True), key=lambda pair: pair[1].prompt_tokens)
        passed = list(accumulate(score.ttft_ms for _, score in ran))
        return next(
            case for (case, _), sum_ms in zip(ran, passed, strict=True) if sum_ms >= TYPICAL * passed[-1]
        )

    def _leave_out(self, candidate: Candidate, error: BaseException) -> bool:
        """Whether to go on without a candidate, which failed of itself; a wish to stop is another matter."""
        if not is_failure(error) or isinstance(error, MarsError):
            return False
        why = " ".join(f"{type(error).__name__}: {error}".split())
        self.note(f"{describe(candidate)} is left out: {why}")
        return True

    def _trial(self, candidate: Candidate, scores: list[CaseScore], slower: float) -> Trial:
        dense = self.dense[: len(scores)]
        ratio = slowdown([s.ttft_ms for s in dense], [s.ttft_ms for s in scores]) / slower
        drops = self.bounds.drops(dense, scores)
        return Trial(
            candidate=candidate,
            scores=tuple(scores),
            drop=drops[self.bounds.main_name],
            divergence=statistics.fmean(score.divergence or 0.0 for score in scores),
            exceeds=self.bounds.surely_exceeded(dense, scores),
            ttft_ms=ratio * statistics.fmean(score.ttft_ms for score in self.dense),
            speed_up=1 / ratio,
            complete=len(scores) == len(self.cases),
        )

    def _promises(
        self, waiting: Sequence[Candidate], cost: CostModel
    ) -> dict[Candidate, tuple[float, float]]:
        """Of each the milliseconds that it is expected to save on the best so far; of equals, the fastest."""
        price = self.price
        losses = [(trial, trial.expected_drop(price)) for trial in self.trials]
        within = (self._scouted_ms(trial.candidate, cost) for trial in self.within_bounds())
        bar = min([self._dense_ms(cost), *within])
        predicted = {candidate: self._scouted_ms(candidate, cost) for candidate in waiting}
        return {
            candidate: (max(0.0, bar - ms) * self._chance(candidate, losses), -ms)
            for candidate, ms in predicted.items()
        }

    def _scouted_ms(self, candidate: Candidate, cost: CostModel) -> float:
        """Predicted on the one case that all were scouted on."""
        variant, passes = candidate.variant, self.scouted.get(candidate)
        if passes is None:
            return inf
        return cost.predict(passes, variant.linears_in_fp8)

    def _dense_ms(self, cost: CostModel) -> float:
        return cost.predict(dense_passes(cost.shape, self.typical.document.prompt_tokens))

    def _chance(self, candidate: Candidate, losses: Sequence[tuple[Trial, float]]) -> float:
        """That its drop is within the budget, from 0 to 1: a guess that falls as the expected drop grows."""
        budget = max(self.bounds.main.value, LEAST_BUDGET)
        own = candidate.drop if candidate.drop is not None else budget / 2
        expected = own + candidate.precision_drop
        milder = [loss for trial, loss in losses if candidate.harsher(trial.candidate)]
        harsher = [loss for trial, loss in losses if trial.candidate.harsher(candidate) and trial.complete]
        expected = min(max([expected, *milder]), min(harsher, default=inf))
        return 1 / (1 + max(0.0, expected / budget) ** 2)

    def _known_to_fail(self, candidate: Candidate) -> bool:
        """Whether milder kin were hopeless, or it is predicted to be."""
        if candidate.drop is not None and candidate.drop > HOPELESS * max(
            self.bounds.main.value, LEAST_BUDGET
        ):
            return True
        return any(not t.complete and candidate.harsher(t.candidate) for t in self.trials)


def mildest(candidate: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
    """Of the others those that `candidate` is harsher than, or is, and that are harsher than none of them."""
    kin = [other for other in others if candidate.harsher(other)]
    return [each for each in kin if all(other.harsher(each) for other in kin if each.harsher(other))]


def pareto(trials: Sequence[Trial], by: Callable[[Trial], float] = attrgetter("drop")) -> list[Trial]:
    """The complete trials than which no other is both as fast and as good, by what is said; fastest first."""
    frontier: list[Trial] = []
    for trial in sorted((t for t in trials if t.complete), key=lambda t: (t.ttft_ms, by(t))):
        if not frontier or by(trial) < by(frontier[-1]):
            frontier.append(trial)
    return frontier
