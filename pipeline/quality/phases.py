"""The phases of a calibration: timing dense, probing layers, searching, verifying on documents held out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter

from pipeline.bench.flops import Passes
from pipeline.engines.answering import rules_of
from pipeline.interrupts import nothing_to_lose
from pipeline.kernels import sparse
from pipeline.model.loading import Model
from pipeline.profile import Profile
from pipeline.quality.bounds import Bounds, score_of
from pipeline.quality.calibration import Calibration
from pipeline.quality.candidates import (
    Candidate,
    Cost,
    Found,
    Precision,
    drop_per_nat,
    make_candidates,
    precisions_of,
)
from pipeline.quality.cases import Sides, by_length, longest_in_turn, make_cases, thin
from pipeline.quality.check_rows import CheckRow
from pipeline.quality.cost import CostModel, dense_passes
from pipeline.quality.emission import make_profile
from pipeline.quality.evaluate import TOP, Case, Evaluated
from pipeline.quality.search import Search, Trial, pareto
from pipeline.quality.sensitivity import ACTIONS, SPARSE_MASSES, Sensitivity, measure_sensitivity
from pipeline.quality.verification import Verification, Verifier
from pipeline.quality.workbench import DENSE, Clock, Drift, Workbench
from pipeline.settings.calibrate import CalibrateConfig
from pipeline.words import counted

# shares of the time, behind the loading of the model, after which each phase ends
PROBED_SPARSE, PROBED, SCOUTED, SEARCHED, DONE = 0.18, 0.3, 0.45, 0.7, 0.98
SEARCH_RUNS = 24  # candidates for which the number of cases should leave time
VERIFY_RUNS = 4
MOST_SEARCHED, MOST_HELD_OUT, MOST_PROBED = 48, 400, 8
LONG = 0.75  # of the longest prompt: such cases tell what block-sparse attention does
FEWEST_SEARCHED, FEWEST_HELD_OUT = 3, 4


class Phases:
    """One calibration, phase by phase."""

    def __init__(
        self,
        config: CalibrateConfig,
        model: Model,
        sides: Sides,
        clock: Clock,
        tell: Callable[[str], None],
        note: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        with nothing_to_lose():
            self.bench: Workbench = Workbench.of(model.load(), check)
        self.config, self.sides, self.bounds = config, sides, Bounds.of(config)
        self.clock, self.whole_clock = clock.rest(), clock
        self.tell, self.note = tell, note

    def calibrate(self, data_hash: str) -> Calibration:
        self.tell("timing dense")
        pace_s, answer_s = self._pace()
        searched = self._cases(
            self.sides.search,
            self._fitting(SEARCHED - PROBED, pace_s * SEARCH_RUNS, FEWEST_SEARCHED, MOST_SEARCHED),
            PROBED / 2,
        )
        began = self.clock.passed
        dense = self._dense(searched, top=TOP)
        # needles can be far longer than the row of median length
        pace_s = max(pace_s, (self.clock.passed - began) / len(searched))
        rows = self._probe(searched, dense, pace_s)
        search, count = self._search(searched, dense, rows)
        held_out, verifications = self._verify(search, pace_s * VERIFY_RUNS + answer_s)
        cost = self.bench.cost_model()
        chosen = next((each for each in verifications if each.holds), None)
        return Calibration(
            config=self.config,
            profile=None if chosen is None else self._profile(chosen, [*searched, *held_out], data_hash),
            trials=tuple(search.trials),
            verifications=tuple(verifications),
            sensitivities=tuple(rows),
            saved_ms=tuple(saved_ms(row, cost) for row in rows),
            cost=cost,
            searched=len(searched),
            held_out=len(held_out),
            candidates=count,
            dense_ttft_ms=statistics.fmean(run.score.ttft_ms for run in dense),
            seconds=self.whole_clock.passed,
        )

    def _pace(self) -> tuple[float, float]:
        """Seconds that one case takes under dense, and those of its answer where dense has to give it."""
        ordered = sorted(self.sides.search, key=lambda row: row.document.prompt_tokens)
        row = ordered[len(ordered) // 2]
        began = self.clock.passed
        (case,) = self._make([row], lambda: True)
        answered = self.clock.passed
        self.bench.run(DENSE, case, first=True)
        warm = self.clock.passed
        self.bench.run(DENSE, case)
        return max(self.clock.passed - warm, 1e-3), 0.0 if row.reference else answered - began

    def _fitting(self, share: float, seconds_each: float, fewest: int, most: int) -> int:
        return int(min(most, max(fewest, share * self.clock.seconds / seconds_each)))

    def _cases(self, rows: Sequence[CheckRow], count: int, until: float) -> list[Case]:
        chosen = thin(rows, count, self.config.seed)
        self.tell(f"answers of dense to {counted(len(chosen), 'row')}")
        return self._make(chosen, self.clock.before(until))

    def _make(self, rows: Sequence[CheckRow], within: Callable[[], bool]) -> list[Case]:
        return make_cases(
            self.bench.model, rows, rules_of(self.config, self.bench.model), self.bench.check, within
        )

    def _drift(self, cases: Sequence[Case], dense: Sequence[Evaluated]) -> Drift:
        (place,) = by_length(cases, 1)
        return Drift(
            bench=self.bench, case=cases[place], ttft_ms=dense[place].score.ttft_ms, clock=self.clock
        )

    def _dense(self, cases: Sequence[Case], top: int = 0) -> list[Evaluated]:
        return [self.bench.run(DENSE, case, top=top) for case in cases]

    def _probe(self, cases: Sequence[Case], dense: Sequence[Evaluated], pace_s: float) -> list[Sensitivity]:
        """Block-sparse attention in the longest cases, which it is for; the rest in cases of all lengths."""
        ran = list(zip(cases, dense, strict=True))
        rows: list[Sensitivity] = []
        longest = max(case.document.prompt_tokens for case in cases)
        mean = statistics.fmean(case.document.prompt_tokens for case in cases)
        count = self._probed(PROBED_SPARSE, pace_s * longest / mean, len(SPARSE_MASSES))
        long = [ran[place] for place in longest_in_turn(cases, LONG * longest, count)]
        for mass in SPARSE_MASSES if self._sparse(longest) else ():
            rows += self._probe_with(("sparse",), long, PROBED_SPARSE, mass)
        actions = [each for each in ACTIONS if each != "sparse"]
        if not self.bench.fp8:
            actions.remove("fp8")
        probed = by_length(cases, self._probed(PROBED, pace_s, len(actions)))
        rows += self._probe_with(actions, [ran[place] for place in probed], PROBED, self.config.mass)
        return sorted(rows, key=lambda row: (row.layer, ACTIONS.index(row.action), -row.mass))

    def _probed(self, share: float, pace_s: float, actions: int) -> int:
        """How many cases all layers can be probed on until a share of the time has passed."""
        left_s = max(0.0, share * self.clock.seconds - self.clock.passed)
        return int(min(MOST_PROBED, max(1, left_s / pace_s / (self.bench.model.shape.layers * actions))))

    def _probe_with(
        self, actions: Sequence[str], ran: Sequence[tuple[Case, Evaluated]], share: float, mass: float
    ) -> list[Sensitivity]:
        layers = range(self.bench.model.shape.layers)
        cases, dense = zip(*ran, strict=True)
        where = f"{counted(len(layers), 'layer')} on {counted(len(cases), 'row')}"
        self.tell(f"probing {where}: {', '.join(actions)} at {mass:g}")
        return measure_sensitivity(
            self.bench,
            cases,
            dense,
            layers=layers,
            actions=actions,
            mass=mass,
            within=self.clock.before(share),
        )

    def _search(
        self, cases: Sequence[Case], dense: Sequence[Evaluated], rows: Sequence[Sensitivity]
    ) -> tuple[Search, int]:
        """The search when it has ended, and how many candidates there were."""

        def told(trial: Trial) -> None:
            given_up = "" if trial.complete else ", given up"
            drop = f"{trial.drop:.2f}{self.bounds.main.unit}"
            self.tell(f"{trial.name}: {trial.speed_up:.2f} times as fast, drop {drop}{given_up}")

        unit = self._unit(dense)
        search = Search(
            bench=self.bench,
            cases=cases,
            dense=[run.score for run in dense],
            forced=[run.forced for run in dense],
            bounds=self.bounds,
            note=self.note,
            progress=told,
            drift=self._drift(cases, dense),
            probes=[Cost(row.divergence, unit * row.drop, row.cases) for row in rows],
        )
        precisions = self._precisions(search)
        candidates = make_candidates(self._found(cases, rows, unit), precisions)
        tried = {trial.candidate.variant for trial in search.trials}
        candidates = [each for each in candidates if each.variant not in tried]
        self.tell(f"looking at {len(candidates)} candidates")
        search.run(candidates, self.clock.before(SEARCHED), self.clock.before(SCOUTED))
        return search, len(candidates) + len(tried)

    def _precisions(self, search: Search) -> list[Precision]:
        """Try dense in each precision that the device can; those worth searching with."""
        tried = [Precision()]
        for linears in ("mixed", "fp8") if self.bench.fp8 else ():
            candidate = _dense_candidate(linears)
            search.scout(candidate)
            trial = search.try_out(candidate)
            if trial is not None and trial.complete:
                tried.append(
                    Precision(
                        linears=linears,
                        drop=trial.expected_drop(search.price),
                        speed_up=trial.speed_up,
                    )
                )
        return precisions_of(tried, self.bounds.main.value)

    def _sparse(self, longest: int) -> bool:
        """Whether attention of a prompt of so many tokens can be block-sparse here."""
        model = self.bench.model
        width = model.shape.heads * model.shape.head_dim
        return sparse.applies(longest, width, model.device, model.attention.sparse_from)

    def _found(self, cases: Sequence[Case], rows: Sequence[Sensitivity], unit: float) -> Found:
        cost = self.bench.cost_model()
        longest = max(case.document.prompt_tokens for case in cases)
        return Found(
            shape=self.bench.model.shape,
            longest=longest,
            rows=rows,
            mass=self.config.mass,
            drop_per_nat=unit * drop_per_nat(rows),
            budget=self.bounds.main.value,
            saved_ms=partial(saved_ms, cost=cost),
            fp8=self.bench.fp8,
            sparse=self._sparse(longest),
        )

    def _unit(self, dense: Sequence[Evaluated]) -> float:
        """A point of the score in the unit of the main bound."""
        mean = statistics.fmean(score_of(run.score) for run in dense)
        return 1 / mean if self.bounds.main.relative and mean else 1.0

    def _verify(self, search: Search, seconds_each: float) -> tuple[list[Case], list[Verification]]:
        """The cases held out, and what was verified on them, the last of which may hold."""
        faster = [trial for trial in search.within_bounds() if trial.speed_up > 1]
        promising = pareto(faster, by=attrgetter("divergence"))
        if not promising:
            return [], []
        count = self._fitting(DONE - SEARCHED, seconds_each, FEWEST_HELD_OUT, MOST_HELD_OUT)
        cases = self._cases(self.sides.held_out, count, (SEARCHED + DONE) / 2)
        self.tell(f"verifying on {counted(len(cases), 'row')} held out")
        dense = self._dense(cases, top=TOP)
        verifier = Verifier(
            bench=self.bench,
            cases=cases,
            dense=[run.score for run in dense],
            forced=[run.forced for run in dense],
            bounds=self.bounds,
            price=search.price,
            accept_inconclusive=self.config.accept_inconclusive,
            seed=self.config.seed,
        )
        found = []
        for verification in verifier.run(promising, lambda: DONE * self.clock.seconds - self.clock.passed):
            self.tell(f"{verification.trial.name}: {verification.words}")
            found.append(verification)
        return cases, found

    def _profile(self, chosen: Verification, cases: Sequence[Case], data_hash: str) -> Profile:
        return make_profile(self.config, self.bench.model, self.bounds, chosen, cases, data_hash)


def saved_ms(row: Sensitivity, cost: CostModel) -> float:
    """Predicted for one case, mean over those that were probed."""

    def saved(passes: Passes) -> float:
        return cost.predict(dense_passes(cost.shape, passes[0][0].tokens)) - cost.predict(passes)

    return statistics.fmean(map(saved, row.passes))


def _dense_candidate(linears: str) -> Candidate:
    variant = DENSE._replace(linears=linears)
    return Candidate(variant=variant, family=f"dense in {linears}", axes=(0.0,))
