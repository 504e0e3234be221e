"""The phases of a calibration: timing dense, probing layers, making a ladder, climbing it on other cases."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from pipeline.calibration.bounds import Bounds
from pipeline.calibration.emission import make_profile
from pipeline.calibration.exit_fitting import fit_exit_maps
from pipeline.calibration.ladder import (
    FAR,
    MILD,
    Calibration,
    Rung,
    RungResult,
    Seen,
    climb,
    fastest_passed,
    make_ladder,
    mild_precisions,
    slope_of,
)
from pipeline.calibration.rungs import (
    describe,
    exit_layers,
    exit_rungs,
    mapped_rungs,
    other_rungs,
    sparse_rungs,
)
from pipeline.calibration.sensitivity import MASSES, Sensitivity, measure_sensitivity
from pipeline.engines.answering import rules_of
from pipeline.errors import ConfigError, GateInconclusive, MarsError, is_failure
from pipeline.evaluate.cases import Sides, longest_in_turn, make_cases, thin
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.drops import hundredths
from pipeline.evaluate.workbench import (
    DENSE,
    LOW,
    TIMED,
    TOP,
    Deadline,
    Evaluated,
    Workbench,
    has_pruned,
    sparse_from,
)
from pipeline.families.exit_maps import mapped_layers, write_exit_maps
from pipeline.model.variant import Variant
from pipeline.pruning.mars import Mars
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.texts.words import counted

# shares of the time, behind the loading of the model, after which each phase ends
PROBED, SEARCHED, DONE = 0.2, 0.45, 0.98
SEARCH_RUNS = 28  # of each case searched on, for which the number of cases should leave time
TESTED_RUNGS = 3  # for which the number of documents held out should leave time
MOST_CASES, FEWEST_CASES, MOST_PROBED = 48, 3, 8  # of the search side
LONG = 0.75  # of the longest prompt: such cases tell what block-sparse attention does


@dataclass(frozen=True)
class Phases:
    """One calibration, phase by phase."""

    config: CalibrateConfig
    bench: Workbench
    bounds: Bounds
    sides: Sides
    folder: Path  # for files that are needed no longer than this calibration
    clock: Deadline  # of the phases alone, of whose time each has a share
    tell: Callable[[str], None]
    note: Callable[[str], None]

    def calibrate(self, data_hash: str, whole_clock: Deadline) -> Calibration:
        """Raises GateInconclusive where the time allows too few cases for any rung to pass."""
        self.tell("timing dense")
        pace_s, answer_s = self._pace()
        count = (SEARCHED - PROBED) * self.clock.seconds / (pace_s * SEARCH_RUNS)
        searched = self._cases(self.sides.search, int(min(MOST_CASES, max(FEWEST_CASES, count))), PROBED / 2)
        began = self.clock.passed
        dense = [self.bench.run(DENSE, case, top=TOP) for case in searched]
        pace_s = (self.clock.passed - began) / len(searched) or pace_s
        probes = self._probe(searched, dense, pace_s)
        ladder = self._ladder(searched, dense, probes)
        held_out, tested = self._climb(ladder, pace_s, answer_s) if ladder else ([], [])
        profile, chosen = None, fastest_passed(tested)
        if chosen is not None:
            profile = make_profile(self.config, self.bench.model, chosen, tested, ladder, held_out, data_hash)
        return Calibration(
            config=self.config,
            profile=profile,
            probes=tuple(probes),
            ladder=tuple(ladder),
            tested=tuple(tested),
            chosen=chosen,
            searched=len(searched),
            held_out=len(held_out),
            seconds=whole_clock.passed,
        )

    def _pace(self) -> tuple[float, float]:
        """Seconds that one case takes under dense, and those of its answer where dense has to give it."""
        ordered = sorted(self.sides.search, key=lambda row: row.document.prompt_tokens)
        row = ordered[len(ordered) // 2]
        (case,) = self._make([row], lambda: True)
        self.bench.run(DENSE, case)
        began = self.clock.passed  # what compiles has been compiled
        self._make([row], lambda: True)
        answered = self.clock.passed
        self.bench.run(DENSE, case)
        warm = self.clock.passed
        self.bench.run(DENSE, case)
        pace_s = max(self.clock.passed - warm, 1e-3)
        return pace_s, 0.0 if row.reference else answered - began

    def _cases(self, rows: Sequence[CheckRow], count: int, until: float) -> list[CheckRow]:
        chosen = thin(rows, count, self.config.seed)
        self.tell(f"answers of dense to {counted(len(chosen), 'row')}")
        return self._make(chosen, self.clock.before(until))

    def _make(self, rows: Sequence[CheckRow], within: Callable[[], bool]) -> list[CheckRow]:
        return make_cases(
            self.bench.model, rows, rules_of(self.config, self.bench.model), self.bench.check, within
        )

    def _probe(
        self, cases: Sequence[CheckRow], dense: Sequence[Evaluated], pace_s: float
    ) -> list[Sensitivity]:
        """Each layer's attention in the longest cases, where they are long enough to be block-sparse."""
        longest = max(case.document.prompt_tokens for case in cases)
        shortest = sparse_from(self.bench.model)
        if shortest is None or longest < shortest:
            return []
        layers = self.bench.model.shape.layers
        mean = statistics.fmean(case.document.prompt_tokens for case in cases)
        left_s = max(0.0, PROBED * self.clock.seconds - self.clock.passed)
        count = int(min(MOST_PROBED, max(1, left_s / (pace_s * longest / mean) / (layers * len(MASSES)))))
        probed = [(cases[at], dense[at]) for at in longest_in_turn(cases, LONG * longest, count)]
        rows: list[Sensitivity] = []
        for mass in MASSES:
            self.tell(f"probing {counted(layers, 'layer')} on {counted(len(probed), 'row')}: {mass:g}")
            rows += measure_sensitivity(self.bench, probed, self.bounds, mass, self.clock.before(PROBED))
        return sorted(rows, key=lambda row: (row.layer, -row.mass))

    def _ladder(
        self, cases: Sequence[CheckRow], dense: Sequence[Evaluated], probes: Sequence[Sensitivity]
    ) -> list[Rung]:
        """Rungs in the order in which they will be tested; what follows looks at no other case."""
        shape, bound = self.bench.model.shape, self.bounds.main.value
        seen = [Seen(probe.divergence, probe.drop, probe.cases) for probe in probes]

        def tried(variants: Sequence[Variant], far: float) -> list[Rung]:
            found: list[Rung] = []
            for variant in variants:
                rung = self._search(variant, cases, dense)
                if rung is None:
                    continue
                found.append(rung)
                seen.append(rung.seen)
                if rung.expecting(slope_of(seen)).expected_drop > far * bound:
                    break  # those behind it are harsher
            return found

        def expecting(rungs: Sequence[Rung]) -> list[Rung]:
            return [rung.expecting(slope_of(seen)) for rung in rungs]

        low = tried(LOW if self.bench.fp8 else (), float("inf"))
        precisions = mild_precisions(expecting(low), bound)
        linears, base = "auto", 1.0
        if precisions:
            linears, base = precisions[-1].variant.linears, precisions[-1].speed_up
        mars = tried(sparse_rungs(shape.layers, probes, linears), FAR)
        if all(rung.speed_up <= base for rung in mars):
            mars = tried(exit_rungs(shape.layers, linears), FAR)
        mild = [rung for rung in expecting(mars) if rung.expected_drop <= MILD * bound]
        base_method = mild[-1].variant.method if mild else Mars(sparse_attention=None)
        assert isinstance(base_method, Mars)
        mars += tried(mapped_rungs(base_method, self._exit_maps(cases), linears), FAR)
        mars.sort(key=lambda rung: rung.trial.divergence)
        others = tried(other_rungs(shape, linears), float("inf"))
        return make_ladder(expecting(precisions), expecting(mars), expecting(others), bound)

    def _exit_maps(self, cases: Sequence[CheckRow]) -> dict[int, Path]:
        """Files of maps fitted on prompts that are searched on, by the layer that tokens stop after."""
        model = self.bench.model
        depth = model.shape.layers
        stops = [last for last in exit_layers(depth) if mapped_layers(model.shape, last)]
        if not stops or self.clock.passed >= SEARCHED * self.clock.seconds:
            return {}
        documents = {case.sample.document_key: case.document for case in cases}
        self.tell(f"fitting maps for tokens that stop early on {counted(len(documents), 'document')}")
        DENSE.use(model)
        try:
            fitted = fit_exit_maps(
                model,
                [*documents.values()],
                stops,
                check=self.bench.check,
                within=self.clock.before((PROBED + SEARCHED) / 2),
            )
        except ConfigError as error:
            self.note(f"mars with exit_maps is left out: {error}")
            return {}
        files = {}
        for each in fitted:
            files[each.about.last_full] = self.folder / f"exit-{each.about.last_full}.safetensors"
            write_exit_maps(files[each.about.last_full], each.about, each.maps)
        return files

    def _search(self, variant: Variant, cases: Sequence[CheckRow], dense: Sequence[Evaluated]) -> Rung | None:
        """What the search side says of a variant; None if it cannot run, not in time, or prunes nothing."""
        within = self.clock.before(SEARCHED)
        try:
            trial = self.bench.try_out(variant, cases, dense=[run.forced for run in dense], within=within)
        except BaseException as error:
            if not is_failure(error) or isinstance(error, MarsError):
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())
            self.note(f"{describe(variant)} is left out: {why}")
            return None
        if not trial.complete:
            return None
        rung = Rung(trial=trial, drop=self.bounds.main_drop([run.score for run in dense], trial.scores))
        if rung.prunes and not has_pruned(trial.scores):  # faster by chance, if at all
            self.tell(f"{rung.name}: nothing is pruned")
            return None
        drop = f"{hundredths(rung.drop)}{self.bounds.main.unit}, KL from dense {trial.divergence:.4f}"
        self.tell(f"{rung.name}: {rung.speed_up:.2f} times as fast, drop {drop}")
        return rung

    def _climb(
        self, ladder: Sequence[Rung], pace_s: float, answer_s: float
    ) -> tuple[list[CheckRow], list[RungResult]]:
        """The cases held out, and the rungs tested on them."""
        count = self._held_out(ladder, pace_s, answer_s)
        cases = self._cases(self.sides.held_out, count, (SEARCHED + DONE) / 2)
        supplies = self.bounds.supplies(cases, self.sides.held_out)
        short = next((supply for supply in supplies if supply.is_short), None)
        if short is not None:
            raise GateInconclusive(
                f"--minutes {self.config.minutes:g} leaves time for {counted(len(cases), 'row')} held out, "
                f"too few for any profile: {short}; give more --minutes"
            )
        within = self.clock.before(DONE)
        self.tell(f"testing {counted(len(ladder), 'rung')} on {counted(len(cases), 'row')} held out")
        dense = [self.bench.run(DENSE, case).score for case in takewhile(lambda case: within(), cases)]

        def test(rung: Rung) -> RungResult:
            trial = self.bench.try_out(rung.variant, cases, within=within)
            differs = not rung.prunes
            gates = self.bounds.verify(dense, trial.scores, differs=differs) if trial.complete else ()
            tested = RungResult(rung=rung, trial=trial, gates=gates)
            self.tell(f"{rung.name}: {tested.verdict}")
            return tested

        return cases, climb(ladder, test)

    def _held_out(self, ladder: Sequence[Rung], pace_s: float, answer_s: float) -> int:
        """How many rows to test on.

        A row of every document, if the time allows the first rungs on so many, and as many more as it allows
        all rungs on.
        """
        left_s = DONE * self.clock.seconds - self.clock.passed

        def fitting(rungs: Sequence[Rung]) -> int:
            timing_s = 3 * len(rungs) * TIMED * pace_s
            case_s = answer_s + pace_s + sum(pace_s / rung.speed_up for rung in rungs)
            return int(max(0.0, left_s - timing_s) / case_s)

        documents = len({row.sample.document_key for row in self.sides.held_out})
        return max(fitting(ladder), min(documents, fitting(ladder[:TESTED_RUNGS])))
