"""The search over candidates, on a pretended device whose clock is told what every run takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import document

from pipeline.bench.flops import LayerWork, passes_flops
from pipeline.bench.variant import Variant
from pipeline.errors import MarsError
from pipeline.model.shape import ModelShape
from pipeline.pruning.fastkv import FastKV
from pipeline.quality.bounds import Bound, Bounds, holds
from pipeline.quality.candidates import (
    Candidate,
    Cost,
    Found,
    Precision,
    make_candidates,
)
from pipeline.quality.cost import FEATURES, CostModel, Observation, dense_passes
from pipeline.quality.evaluate import Case, CaseScore
from pipeline.quality.search import Search, pareto
from pipeline.quality.verification import Verifier, timed_places
from pipeline.quality.workbench import DENSE, Clock

SHAPE = ModelShape(layers=8, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=320, context=9000)
BOUNDS = Bounds(
    main=Bound(value=1, relative=False), needles=Bound(value=2, relative=False), main_name="agreement"
)
MS_OF_A_TOKEN = 0.01


def case(number, task="data"):
    return Case(
        id=str(number),
        task=task,
        document_key=str(number),
        document=document(300 + 10 * number, seed=number),
        answer=tuple(range(100)),
    )


def score(case, lost, ttft_ms, task=None, divergence=None):
    return CaseScore(
        id=case.id,
        task=task or case.task,
        document_key=case.document_key,
        prompt_tokens=case.document.prompt_tokens,
        tokens=100,
        correct=100 - lost,
        nll=1.0,
        ttft_ms=ttft_ms,
        kept_ratio=1.0,
        ffn_ratio=1.0,
        attention_ratio=1.0,
        flops_ratio=1.0,
        kv_ratio=1.0,
        divergence=lost / 100 if divergence is None else divergence,
    )


@dataclass
class Bench:
    """A device on which `share` of FastKV says what a run takes, and `losses` what it loses."""

    losses: dict[float, int]
    divergences: dict[float, float] = field(default_factory=dict)  # by default as the losses
    seconds: float = 0.0
    runs: list[tuple[float, str]] = field(default_factory=list)
    fails: dict[float, BaseException] = field(default_factory=dict)

    def run(self, variant, case, *, first=False, dense=None):
        share = variant.method.share
        if share in self.fails:
            raise self.fails[share]
        tokens = round(share * case.document.prompt_tokens)
        ttft_ms = MS_OF_A_TOKEN * tokens * SHAPE.layers
        self.seconds += ttft_ms / 1e3
        self.runs.append((share, case.id))
        passes = [[LayerWork(tokens, tokens)] * SHAPE.layers]
        made = score(case, self.losses.get(share, 0), ttft_ms, divergence=self.divergences.get(share))
        return SimpleNamespace(score=made, passes=passes)

    def cost_model(self):
        coefficients = np.zeros(len(FEATURES))
        per_layer = dense_passes(SHAPE, 1000)
        coefficients[0] = 1e-6 * len(per_layer[0])
        return CostModel(shape=SHAPE, coefficients=coefficients, relative_error=0.0, observations=1)


def kin(*shares):
    return [
        Candidate(
            variant=Variant("fastkv", FastKV(share=share, kv_share=1.0)), family="fastkv", axes=(1 - share,)
        )
        for share in shares
    ]


def searching(bench, cases=9, **options):
    cases = [case(number) for number in range(cases)]
    dense = [score(each, 0, MS_OF_A_TOKEN * each.document.prompt_tokens * SHAPE.layers) for each in cases]
    forced = [None] * len(cases)
    return Search(bench=bench, cases=cases, dense=dense, forced=forced, bounds=BOUNDS, **options)


def shares(trials):
    return [trial.candidate.variant.method.share for trial in trials]


def test_the_fastest_within_the_budget_is_found_and_the_frontier_is_pareto():
    bench = Bench(losses={0.1: 60, 0.2: 30, 0.3: 4, 0.4: 1, 0.5: 1})
    search = searching(bench)
    search.run(kin(*(n / 10 for n in range(1, 10))), lambda: True)
    frontier = pareto(search.trials)
    assert shares(trial for trial in frontier if not trial.exceeds)[0] == 0.4
    for trial in search.trials:
        beaten = [
            other
            for other in search.trials
            if other.complete
            and (other.ttft_ms, other.drop) != (trial.ttft_ms, trial.drop)
            and other.ttft_ms <= trial.ttft_ms
            and other.drop <= trial.drop
        ]
        assert (trial in frontier) == (trial.complete and not beaten)
    assert frontier[0].speed_up == pytest.approx(1 / shares(frontier)[0], rel=0.01)


def test_the_hopeless_are_given_up_and_their_harsher_kin_spared():
    bench = Bench(losses={0.1: 90, 0.2: 60, 0.3: 40})
    search = searching(bench)
    search.try_out(*kin(0.3))
    (trial,) = search.trials
    assert (len(trial.scores), trial.complete, round(trial.drop)) == (3, False, 40)
    search.run(kin(0.1, 0.2, 0.6), lambda: True)
    # a look at each of them, and then only at what is milder
    assert shares(search.trials) == [0.3, 0.6]
    assert [run for run in bench.runs if run[0] in (0.1, 0.2)] == [(0.1, "6"), (0.2, "6")]


def test_the_mildest_of_a_family_are_tried_first_and_go_no_further_than_they_hold():
    bench = Bench(losses={0.1: 90, 0.2: 90, 0.3: 50, 0.4: 1, 0.5: 0})
    search = searching(bench)
    search.run(kin(0.2, 0.5, 0.1, 0.4, 0.3), lambda: True)
    assert shares(search.trials) == [0.5, 0.4, 0.3]
    assert [trial.complete for trial in search.trials] == [True, True, False]


def test_the_typical_case_is_of_the_length_that_takes_the_time():
    search = searching(Bench(losses={}), cases=9)
    assert search.typical.id == "6"  # of 0 to 8, all of about the same length
    long = Case(id="long", task="data", document_key="long", document=document(9000, seed=1), answer=(1,))
    search = searching(Bench(losses={}), cases=9)
    search.cases = [*search.cases, long]
    search.dense = [*search.dense, score(long, 0, MS_OF_A_TOKEN * 9000 * SHAPE.layers)]
    assert search.typical.id == "long"


def test_the_time_is_kept():
    bench = Bench(losses={})
    clock = Clock(0.5, lambda: bench.seconds)
    search = searching(bench)
    search.run(kin(*(n / 100 for n in range(30, 99))), clock.before(0.8), clock.before(0.2))
    longest = MS_OF_A_TOKEN * 400 * SHAPE.layers * 9 / 1e3  # of one candidate over all cases
    assert 0.4 <= bench.seconds <= 0.4 + longest
    assert len(search.trials) > 1
    assert len(search.scouted) < 69


def test_one_that_fails_is_left_out_and_a_wish_to_stop_is_obeyed():
    notes = []
    bench = Bench(losses={}, fails={0.5: RuntimeError("out of\nmemory")})
    search = searching(bench, note=notes.append)
    search.run(kin(0.5, 0.6), lambda: True)
    assert shares(search.trials) == [0.6]
    assert notes == ["fastkv share=0.5 kv_share=1 is left out: RuntimeError: out of memory"]
    bench.fails[0.7] = MarsError("stopped")
    with pytest.raises(MarsError, match="stopped"):
        search.run(kin(0.7), lambda: True)


def needles_lost(count, of):
    rows = [case(number) for number in range(4)]
    needles = [case(number, "needles-single") for number in range(10, 10 + of)]
    dense = [score(each, 0, 1.0) for each in (*rows, *needles)]
    made = [score(each, 0, 1.0) for each in rows]
    return dense, made + [score(each, int(place < count), 1.0) for place, each in enumerate(needles)]


def test_settings_that_keep_answers_but_lose_needles_exceed_the_bounds():
    dense, made = needles_lost(3, of=4)
    assert BOUNDS.drops(dense, made) == {"agreement": 0, "needles-single": 75}
    assert BOUNDS.surely_exceeded(dense, made)
    verified = BOUNDS.verify(dense, made)
    assert [(gate.gate, gate.judgement.verdict) for gate in verified] == [
        ("agreement", "pass"),
        ("needles-single", "fail"),
    ]
    assert not holds(verified, accept_inconclusive=True)
    assert holds(BOUNDS.verify(dense, dense))


def test_one_needle_of_few_is_chance_but_not_two_nor_one_of_those_that_the_bound_allows_for():
    dense, one = needles_lost(1, of=4)
    assert not BOUNDS.surely_exceeded(dense, one)
    verified = BOUNDS.verify(dense, one)
    assert not holds(verified)
    assert holds(verified, accept_inconclusive=True)
    assert not holds(BOUNDS.verify(*needles_lost(2, of=20)), accept_inconclusive=True)
    assert holds(BOUNDS.verify(*needles_lost(2, of=100)), accept_inconclusive=True)
    assert not holds(BOUNDS.verify(*needles_lost(3, of=100)), accept_inconclusive=True)


def test_one_row_of_few_that_turns_is_no_reason_to_give_up():
    rows = [case(number) for number in range(8)]
    dense = [score(each, 0, 1.0) for each in rows]
    one, four = ([score(each, 100 * (n < lost), 1.0) for n, each in enumerate(rows)] for lost in (1, 4))
    assert BOUNDS.drops(dense, one) == {"agreement": 12.5}
    assert not BOUNDS.hopeless(dense, one, times=5)
    assert BOUNDS.hopeless(dense, four, times=5)


def test_a_loss_that_chance_hides_shows_in_the_divergence():
    # at 0.3 and 0.4 no answer changes on these rows, but at 0.3 the model is far from itself
    bench = Bench(losses={0.1: 60, 0.2: 30}, divergences={0.3: 0.2, 0.4: 0.005})
    search = searching(bench)
    for candidate in kin(0.1, 0.2, 0.3, 0.4, 0.5):
        search.try_out(candidate)
    found = {trial.candidate.variant.method.share: trial for trial in search.trials}
    assert found[0.3].drop == found[0.4].drop == 0
    assert not found[0.3].exceeds
    assert search.price == pytest.approx(78.94, rel=1e-3)  # 0.1 and 0.2 were given up after 3 of 9 cases
    kept = search.within_bounds()
    assert 0.4 in shares(kept)
    assert not {0.1, 0.2, 0.3} & set(shares(kept))
    # what was probed counts by its cases
    search.probes = [Cost(0.3, 0.0, 900)]
    assert search.price < 5
    assert searching(bench).price == 0


def test_an_inconclusive_drop_within_the_bound_is_taken_if_asked_for():
    rows = [case(number) for number in range(20)]
    dense = [score(each, 5, 1.0) for each in rows]
    made = [score(each, 5 + (9 if n == 3 else 0), 1.0) for n, each in enumerate(rows)]
    verified = BOUNDS.verify(dense, made)
    assert verified[0].drop.drop == pytest.approx(0.45)
    assert not holds(verified)
    assert holds(verified, accept_inconclusive=True)


class Lucky(Bench):
    """What is lost is lost in every seventh case alone; dense is the share 1."""

    def run(self, variant, case, *, first=False, dense=None):
        share = getattr(variant.method, "share", 1.0)
        ttft_ms = MS_OF_A_TOKEN * share * case.document.prompt_tokens * SHAPE.layers
        lost = self.losses.get(share, 0) * (int(case.id) % 7 == 3)
        made = score(case, lost, ttft_ms, divergence=self.divergences.get(share))
        return SimpleNamespace(score=made, passes=[])


@pytest.mark.parametrize(
    ("divergence", "accept", "words"),
    [(0.01, True, "holds"), (0.05, True, "diverges"), (0.01, False, "too few rows")],
)
def test_an_inconclusive_drop_is_not_taken_where_the_divergence_speaks_against_it(divergence, accept, words):
    bench = Lucky(losses={0.5: 5}, divergences={0.5: divergence})
    cases = [case(number) for number in range(21)]
    dense = [bench.run(DENSE, each).score for each in cases]
    verifier = Verifier(
        bench=bench,
        cases=cases,
        dense=dense,
        forced=[None] * 21,
        bounds=BOUNDS,
        price=50.0,
        accept_inconclusive=accept,
    )
    trial = searching(bench).try_out(*kin(0.5))
    (verification,) = verifier.run([trial], lambda: 100.0)
    (gate,) = verification.gates
    assert gate.judgement.verdict == "inconclusive"
    assert gate.drop.drop == pytest.approx(5 / 7)
    assert verification.expected_drop == pytest.approx(50 * divergence)
    assert (verification.words, verification.holds) == (words, words == "holds")


@pytest.mark.parametrize(
    ("share", "accept", "words"),
    [(0.5, True, "holds"), (0.5, False, "holds"), (1.0, True, "not faster")],  # dense has the share 1
)
def test_a_conclusive_drop_is_taken_whatever_the_divergence_if_it_is_faster(share, accept, words):
    bench = Lucky(losses={}, divergences={0.5: 9.0})
    cases = [case(number) for number in range(21)]
    dense = [bench.run(DENSE, each).score for each in cases]
    settings = {"bench": bench, "cases": cases, "dense": dense, "forced": [None] * 21, "bounds": BOUNDS}
    trial = searching(bench).try_out(*kin(share))
    verifier = Verifier(**settings, price=50.0, accept_inconclusive=accept)
    (verification,) = verifier.run([trial], lambda: 100.0)
    assert (verification.words, verification.holds) == (words, words == "holds")


def test_a_precision_that_costs_something_leaves_less_for_what_is_searched_with_it():
    search = searching(Bench(losses={}))
    (free,) = kin(0.5)
    paid = replace(free, precision_drop=0.9)
    assert search._chance(paid, []) < search._chance(free, [])
    (made,) = (
        each
        for each in make_candidates(
            Found(
                shape=SHAPE,
                longest=1000,
                rows=[],
                mass=0.9,
                drop_per_nat=1.0,
                budget=1.0,
                saved_ms=lambda row: 0.0,
                fp8=False,
            ),
            [Precision(linears="fp8", drop=0.4)],
        )
        if each.family.startswith("gemfilter")
    )
    assert made.precision_drop == 0.4


class Deep:
    """A device on which dropping tokens and skipping FFNs lose much, and block-sparse attention little."""

    shape = ModelShape(
        layers=28, hidden=1536, ffn=8960, heads=12, kv_heads=2, head_dim=128, vocab=320, context=32768
    )

    def __init__(self):
        self.observations = []
        self.pairs = {0.95: 0.3, 0.9: 0.2, 0.8: 0.15}  # of all, by mass

    def run(self, variant, case, *, first=False, dense=None):
        method, tokens = variant.method, case.document.prompt_tokens
        sparse = method.sparse_attention if not isinstance(method.sparse_attention, tuple) else None
        passes = [
            [
                work._replace(pairs=int(self.pairs[sparse] * work.tokens**2 / 2))
                if sparse and work.pairs is None
                else work
                for work in layers
            ]
            for layers in method.expected_passes(self.shape, tokens)
        ]
        mild = method.name == "dense" or (method.name == "mars" and method.last_full in (None, 26))
        lost = 0 if mild else 2 if method.name == "fastkv" and method.layer >= 19 else 30
        ttft_ms = passes_flops(self.shape, passes) / 6e11
        self.observations.append(Observation(passes=passes, linears_in_fp8=False, ttft_ms=ttft_ms))
        made = score(case, lost, ttft_ms, divergence=0.005 if mild else lost / 30)
        return SimpleNamespace(score=made, passes=passes)

    def cost_model(self):
        return CostModel.fit(self.shape, self.observations)


def test_one_mild_method_among_many_harsh_ones_is_found_soon():
    device = Deep()
    cases = [
        Case(id=str(n), task="data", document_key=str(n), document=document(n, seed=n), answer=(1,))
        for n in (5000, 6000, 7000, 8000, 9000, 30000)
    ]
    dense = [device.run(DENSE, each).score for each in cases]
    search = Search(bench=device, cases=cases, dense=dense, forced=[None] * 6, bounds=BOUNDS)
    found = Found(
        shape=device.shape,
        longest=30000,
        rows=[],
        mass=0.9,
        drop_per_nat=20.0,
        budget=BOUNDS.main.value,
        saved_ms=lambda row: 0.0,
        fp8=False,
    )
    candidates = make_candidates(found, [Precision()])
    search.run(candidates, lambda: len(search.trials) < 20)
    best = pareto(search.within_bounds())[0]
    assert best.name == "mars sparse_attention=0.8 last_full=26"
    assert best.speed_up > 1.5
    assert len(candidates) > 70


def test_a_device_that_slows_down_is_allowed_for():
    bench = Bench(losses={})
    search = searching(bench, drift=lambda: 2.0)
    trial = search.try_out(*kin(0.8))
    assert trial.speed_up == pytest.approx(2 / 0.8, rel=0.01)


def test_cases_of_all_lengths_are_timed():
    cases = [
        SimpleNamespace(document=SimpleNamespace(prompt_tokens=n)) for n in (*range(100), *range(9000, 9100))
    ]
    places = sorted(timed_places(cases))
    assert len(places) == 16
    assert sum(place >= 100 for place in places) == 8
    assert timed_places(cases[:3]) == {0, 1, 2}
