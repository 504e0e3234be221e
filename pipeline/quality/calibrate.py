"""Settings for a model on documents: probed, searched, verified on other documents. What `calibrate` runs."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.interrupts import nothing_to_lose
from pipeline.quality.calibrate_config import CalibrateConfig

if TYPE_CHECKING:
    from pipeline.model.loading import Model
    from pipeline.profile import Profile
    from pipeline.quality.candidates import Candidate, Precision
    from pipeline.quality.cases import Sides
    from pipeline.quality.check_rows import CheckRow
    from pipeline.quality.cost import CostModel
    from pipeline.quality.evaluate import Case, CaseScore
    from pipeline.quality.search import Search, Trial
    from pipeline.quality.sensitivity import Sensitivity
    from pipeline.quality.verification import Verification
    from pipeline.quality.workbench import Clock, Workbench

# shares of the time after which each phase ends
PROBED, SCOUTED, SEARCHED, DONE = 0.3, 0.45, 0.7, 0.98
SEARCH_RUNS = 24  # candidates for which the number of cases should leave time
VERIFY_RUNS = 4
MOST_SEARCHED, MOST_HELD_OUT, MOST_PROBED = 48, 400, 8
FEWEST_SEARCHED, FEWEST_HELD_OUT = 3, 4

Progress = Callable[[str, float], None]  # what is being done, and the seconds left


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
    def chosen(self) -> Verification | None:
        return next((each for each in self.verifications if each.holds), None)


def _nothing(*_: Any) -> None:
    pass


def run_calibrate(
    config: CalibrateConfig,
    *,
    model: Model | None = None,
    clock: Clock | None = None,
    progress: Progress = _nothing,
    note: Callable[[str], None] = _nothing,
    check: Callable[[], None] = _nothing,
) -> Calibration:
    """Find settings within the bounds, and write the profile if some hold on the documents held out.

    `model` stands for the one that `config` names, `clock` for `config.minutes` from now. `check` is called
    before every prefill and between the steps of generated answers, and may raise to end all. Raises
    MarsError; that nothing holds is no error but a result without a profile.
    """
    from pipeline.profile import write_profile
    from pipeline.quality.cases import split
    from pipeline.quality.workbench import Clock

    clock = clock or Clock(config.minutes * 60)
    tell = _teller(progress, clock)
    tell("reading and tokenizing")
    model = model or _open(config)
    rows = _read(config, model, note)
    sides = split(rows, str(config.seed))
    tell("loading the model")
    check()
    run = _Run(config, model, sides, clock, tell, note, check)
    result = run.calibrate(_data_hash(rows))
    if result.profile is not None:
        write_profile(Path(config.out), result.profile)
    return result


def _teller(progress: Progress, clock: Clock) -> Callable[[str], None]:
    return lambda text: progress(text, max(0.0, clock.left))


def _open(config: CalibrateConfig) -> Model:
    from pipeline.model.loading import open_model

    return open_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        attention=config.attention,
    )


def _read(config: CalibrateConfig, model: Model, note: Callable[[str], None]) -> list[CheckRow]:
    from pipeline.prompts import PromptBuilder
    from pipeline.quality.check_rows import read_rows

    configs = [config.data_config(), *([config.needles_config()] if config.needles else [])]
    rows: list[CheckRow] = []
    for each in configs:
        prompts = PromptBuilder(
            model.tokenizer,
            context=model.shape.context,
            max_new_tokens=config.max_new_tokens,
            system=config.system,
            template=each.template_text(),
            on_overlong="truncate-middle",
        )
        found = read_rows(each, prompts)
        rows += found.rows
        for message in found.left_out:
            note(f"left out: {message}")
    return rows


def _data_hash(rows: Sequence[CheckRow]) -> str:
    return hashlib.sha256("\n".join(row.row_hash for row in rows).encode()).hexdigest()


class _Run:
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
        from pipeline.quality.workbench import Workbench

        with nothing_to_lose():
            self.bench: Workbench = Workbench.of(model.load(), check)
        self.config, self.sides, self.clock, self.bounds = config, sides, clock, config.bounds()
        self.tell, self.note = tell, note

    def calibrate(self, data_hash: str) -> Calibration:
        self.tell("timing dense")
        pace_s, answer_s = self._pace()
        searched = self._cases(
            self.sides.search,
            self._fitting(SEARCHED - PROBED, pace_s * SEARCH_RUNS, FEWEST_SEARCHED, MOST_SEARCHED),
            PROBED / 2,
        )
        dense = self._dense(searched)
        rows = self._probe(searched, dense, pace_s)
        search, count = self._search(searched, dense, rows)
        held_out = self._cases(
            self.sides.held_out,
            self._fitting(DONE - SEARCHED, pace_s * VERIFY_RUNS + answer_s, FEWEST_HELD_OUT, MOST_HELD_OUT),
            (SEARCHED + DONE) / 2,
        )
        verifications = self._verify(held_out, search.trials)
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
            dense_ttft_ms=statistics.fmean(score.ttft_ms for score in dense),
            seconds=self.clock.passed,
        )

    def _pace(self) -> tuple[float, float]:
        """Seconds that one case takes under dense, and those of its answer where dense has to give it."""
        ordered = sorted(self.sides.search, key=lambda row: row.document.prompt_tokens)
        row = ordered[len(ordered) // 2]
        began = self.clock.passed
        (case,) = self._make([row], lambda: True)
        answered = self.clock.passed
        self.bench.run(_dense_variant(), case, first=True)
        warm = self.clock.passed
        self.bench.run(_dense_variant(), case)
        return max(self.clock.passed - warm, 1e-3), 0.0 if row.reference else answered - began

    def _fitting(self, share: float, seconds_each: float, fewest: int, most: int) -> int:
        return int(min(most, max(fewest, share * self.clock.seconds / seconds_each)))

    def _cases(self, rows: Sequence[CheckRow], count: int, until: float) -> list[Case]:
        from pipeline.quality.cases import thin

        chosen = thin(rows, count, self.config.seed)
        self.tell(f"answers of dense to {len(chosen):,} rows")
        return self._make(chosen, self.clock.before(until))

    def _make(self, rows: Sequence[CheckRow], within: Callable[[], bool]) -> list[Case]:
        from pipeline.quality.cases import make_cases

        return make_cases(self.bench.model, rows, self.config.max_new_tokens, self.bench.check, within)

    def _dense(self, cases: Sequence[Case]) -> list[CaseScore]:
        return [self.bench.run(_dense_variant(), case).score for case in cases]

    def _probe(self, cases: Sequence[Case], dense: Sequence[CaseScore], pace_s: float) -> list[Sensitivity]:
        from pipeline.quality.sensitivity import ACTIONS, measure_sensitivity

        actions = [each for each in ACTIONS if each != "fp8" or self.bench.precisions.linears]
        layers = range(self.bench.model.shape.layers)
        left_s = max(0.0, PROBED * self.clock.seconds - self.clock.passed)
        each = int(min(MOST_PROBED, max(1, left_s / pace_s / (len(layers) * len(actions)))))
        probed = _by_length([place for place, case in enumerate(cases)], cases, each)
        self.tell(f"probing {len(layers)} layers on {len(probed)} rows")
        return measure_sensitivity(
            self.bench,
            [cases[place] for place in probed],
            [dense[place] for place in probed],
            layers=layers,
            actions=actions,
            mass=self.config.mass,
            within=self.clock.before(PROBED),
        )

    def _search(
        self, cases: Sequence[Case], dense: Sequence[CaseScore], rows: Sequence[Sensitivity]
    ) -> tuple[Search, int]:
        """The search when it has ended, and how many candidates there were."""
        from pipeline.quality.candidates import make_candidates
        from pipeline.quality.search import Search

        def told(trial: Trial) -> None:
            given_up = "" if trial.complete else ", given up"
            drop = f"{trial.drop:.2f}{self.bounds.main.unit}"
            self.tell(f"{trial.name}: {trial.speed_up:.2f} times as fast, drop {drop}{given_up}")

        search = Search(
            bench=self.bench, cases=cases, dense=dense, bounds=self.bounds, note=self.note, progress=told
        )
        precisions = self._precisions(search)
        candidates = make_candidates(self._found(cases, dense, rows), precisions)
        tried = {trial.candidate.variant for trial in search.trials}
        candidates = [each for each in candidates if each.variant not in tried]
        self.tell(f"looking at {len(candidates)} candidates")
        search.run(candidates, self.clock.before(SEARCHED), self.clock.before(SCOUTED))
        return search, len(candidates) + len(tried)

    def _precisions(self, search: Search) -> list[Precision]:
        """Try dense in each precision that the device can; those worth searching with."""
        from pipeline.quality.candidates import precisions_of

        drops: dict[Precision, float] = {(False, False): 0.0}
        can = self.bench.precisions
        for linears, attention in ((False, True), (True, False), (True, True)):
            if linears <= can.linears and attention <= can.attention:
                trial = search.try_out(_dense_candidate(linears, attention))
                if trial is not None:
                    drops[linears, attention] = trial.drop if trial.complete else float("inf")
        return precisions_of(drops, self.bounds.main.value)

    def _found(self, cases: Sequence[Case], dense: Sequence[CaseScore], rows: Sequence[Sensitivity]) -> Any:
        from pipeline.quality.bounds import score_of
        from pipeline.quality.candidates import Found, drop_per_nat

        cost = self.bench.cost_model()
        mean = statistics.fmean(map(score_of, dense))
        unit = 1 / mean if self.bounds.main.relative and mean else 1.0
        return Found(
            shape=self.bench.model.shape,
            longest=max(case.document.prompt_tokens for case in cases),
            rows=rows,
            mass=self.config.mass,
            drop_per_nat=unit * drop_per_nat(rows),
            budget=self.bounds.main.value,
            saved_ms=lambda row: saved_ms(row, cost),
            fp8=self.bench.precisions.linears,
        )

    def _verify(self, cases: Sequence[Case], trials: Sequence[Trial]) -> list[Verification]:
        from pipeline.quality.search import pareto
        from pipeline.quality.verification import Verifier

        promising = pareto([trial for trial in trials if not trial.exceeds and trial.speed_up > 1])
        if not promising:
            return []
        self.tell(f"verifying on {len(cases):,} rows held out")
        verifier = Verifier(
            bench=self.bench,
            cases=cases,
            dense=self._dense(cases),
            bounds=self.bounds,
            accept_inconclusive=self.config.accept_inconclusive,
            seed=self.config.seed,
        )
        found = []
        for verification in verifier.run(promising, lambda: DONE * self.clock.seconds - self.clock.passed):
            self.tell(f"{verification.trial.name}: {verification.words}")
            found.append(verification)
        return found

    def _profile(self, chosen: Verification, cases: Sequence[Case], data_hash: str) -> Profile:
        from pipeline.quality.emission import make_profile

        return make_profile(self.config, self.bench.model, self.bounds, chosen, cases, data_hash)


def saved_ms(row: Sensitivity, cost: CostModel) -> float:
    """Predicted for one case, mean over those that were probed."""
    from pipeline.quality.cost import dense_passes

    def saved(passes: Any) -> float:
        return cost.predict(dense_passes(cost.shape, passes[0][0].tokens)) - cost.predict(passes)

    return statistics.fmean(map(saved, row.passes))


def _by_length(places: list[int], cases: Sequence[Case], count: int) -> list[int]:
    """So many of the rows that are no needles, from short ones to long ones."""
    from pipeline.quality.bounds import NEEDLES

    rows = [place for place in places if not cases[place].task.startswith(NEEDLES)] or places
    rows.sort(key=lambda place: cases[place].document.prompt_tokens)
    count = min(count, len(rows))
    return [rows[(2 * n + 1) * len(rows) // (2 * count)] for n in range(count)]


def _dense_variant() -> Any:
    from pipeline.bench.variant import Variant
    from pipeline.pruning.dense import Dense

    return Variant(Dense.name, Dense())


def _dense_candidate(linears: bool, attention: bool) -> Candidate:
    from pipeline.quality.candidates import Candidate

    variant = _dense_variant()._replace(linears_in_fp8=linears, attention_in_fp8=attention)
    return Candidate(variant=variant, family=f"dense in fp8 {linears} {attention}", axes=(0.0,))
