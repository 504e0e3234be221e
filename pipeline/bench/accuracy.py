"""Several ways to run a model side by side: how well each predicts right answers, and how fast it is.

Teacher-forced, each document prefilled alone; dense, in the model's own precision, is what all are held
against. Drops and their intervals are those of `check`, by document.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.engines.answering import rules_of
from pipeline.evaluate.cases import make_cases
from pipeline.evaluate.check_rows import CheckRow, read_rows
from pipeline.evaluate.drops import Drop, Paired
from pipeline.evaluate.predicting import Forced
from pipeline.evaluate.workbench import (
    DENSE,
    TOP,
    CaseScore,
    Evaluated,
    Workbench,
    failures_named,
    sparse_from,
)
from pipeline.model.loading import LoadedModel
from pipeline.model.variant import Variant, prepare
from pipeline.settings.row_settings import RowSettings
from pipeline.setup.intake import make_prompts
from pipeline.suites.samples import NEEDLES, grouped

ROWS = "rows"  # that are no needles
Scores = tuple[CaseScore, CaseScore]  # dense's and a method's of one case
SHARES = ("kept_ratio", "ffn_ratio", "attention_ratio", "flops_ratio", "kv_ratio")


@dataclass(frozen=True, kw_only=True)
class CaseGroup:
    """One method on some of the cases: those of one kind of needles, all that are none, or of these the long.

    Long are those to which block-sparse attention applies: of all rows its harm would be thinned out.
    """

    name: str
    rows: int
    documents: int
    token_accuracy: float  # of the right answers' tokens, the share predicted; mean over documents
    found: float  # of a right answer's parts, the share of which all tokens are predicted, likewise
    nll: float  # nats a token, over all tokens
    token_drop: Drop  # of the token accuracy, in points
    found_drop: Drop
    speed_up: float  # over dense on the same cases, the median weighted by dense's times
    speed_up_by_length: dict[int, float]  # over dense, median; by prompt tokens, rounded to a power of two


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One method on all cases."""

    variant: str
    groups: tuple[CaseGroup, ...]  # that of the rows first, then their long ones, then the needles'
    divergence: float | None  # KL from dense, nats a token, mean over all cases
    long_ttft_ms: float | None  # median of the cases that count as long
    long_cases: int
    speed_up: float  # over dense on the same cases, the median weighted by dense's times
    shares: dict[str, float]  # means over all cases, by the names in `SHARES`


def measure_accuracy(
    model: LoadedModel,
    cases: Sequence[CheckRow],
    variants: Sequence[Variant],
    *,
    long_tokens: int,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Accuracy]:
    """Dense, then each of `variants`, over all cases: at least one.

    Cases of more than `long_tokens` prompt tokens are long. `check` is called before each case, and may
    raise to give up.
    """
    prepare(model, [DENSE, *variants])
    bench, least = Workbench(model=model, check=check), sparse_from(model)
    with failures_named(lambda: f"{bench.running} fails"):
        dense = _run(bench, DENSE, cases)
    for variant in (DENSE, *variants):
        with failures_named(lambda: f"{bench.running} fails"):
            runs = dense if variant is DENSE else _run(bench, variant, cases, dense)
        pairs = [(base.score, own.score) for base, own in zip(dense, runs, strict=True)]
        yield _accuracy(variant.name, pairs, long_tokens, least)


def _run(
    bench: Workbench, variant: Variant, cases: Sequence[CheckRow], dense: Sequence[Evaluated] = ()
) -> list[Evaluated]:
    """Every case, compared with `dense` where that has been run."""
    ordered = sorted(cases, key=lambda case: case.document.prompt_tokens)
    for case in (ordered[len(ordered) // 2], ordered[-1]):
        bench.run(variant, case)  # warms up, so that no case's time holds the loading of kernels
    known: list[Forced | None] = [run.forced for run in dense] or [None] * len(cases)
    return [
        bench.run(variant, case, dense=forced, top=TOP) for case, forced in zip(cases, known, strict=True)
    ]


def _accuracy(name: str, both: Sequence[Scores], long_tokens: int, least: int | None) -> Accuracy:
    pairs = grouped(both, lambda pair: pair[1].task if pair[1].task.startswith(NEEDLES) else ROWS)
    rows, scores = pairs.pop(ROWS, []), [own for _, own in both]
    sparse = [pair for pair in rows if least is not None and pair[1].prompt_tokens >= least]
    groups = {ROWS: rows} if rows else {}
    if 0 < len(sparse) < len(rows):
        groups[f"{ROWS} from {least:,} tokens"] = sparse
    groups |= pairs
    divergences = [score.divergence for score in scores if score.divergence is not None]
    long = [score.ttft_ms for score in scores if score.prompt_tokens > long_tokens]
    return Accuracy(
        variant=name,
        groups=tuple(_group(group, own) for group, own in groups.items()),
        divergence=statistics.fmean(divergences) if divergences else None,
        long_ttft_ms=statistics.median(long) if long else None,
        long_cases=len(long),
        speed_up=_speed_up(both),
        shares={share: statistics.fmean(getattr(score, share) for score in scores) for share in SHARES},
    )


def _group(name: str, pairs: Sequence[Scores]) -> CaseGroup:
    def drop(measure: Callable[[CaseScore], float]) -> Drop:
        return Paired.of(
            [measure(base) for base, _ in pairs],
            [measure(own) for _, own in pairs],
            documents=[own.document_key for _, own in pairs],
        ).drop()

    tokens, found = drop(lambda score: score.correct / score.tokens), drop(lambda score: score.found)
    return CaseGroup(
        name=name,
        rows=len(pairs),
        documents=tokens.documents,
        token_accuracy=tokens.method,
        found=found.method,
        nll=sum(own.nll for _, own in pairs) / sum(own.tokens for _, own in pairs),
        token_drop=tokens,
        found_drop=found,
        speed_up=_speed_up(pairs),
        speed_up_by_length=_by_length(pairs),
    )


def _speed_up(pairs: Sequence[Scores]) -> float:
    return 1 / slowdown([base.ttft_ms for base, _ in pairs], [own.ttft_ms for _, own in pairs])


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


def _by_length(pairs: Sequence[Scores]) -> dict[int, float]:
    lengths = grouped(pairs, lambda pair: 2 ** round(math.log2(pair[1].prompt_tokens)))
    return {
        length: statistics.median(base.ttft_ms / own.ttft_ms for base, own in lengths[length])
        for length in sorted(lengths)
    }


def read_cases(
    config: RowSettings, model: LoadedModel, check: Callable[[], None] = lambda: None
) -> tuple[list[CheckRow], tuple[str, ...]]:
    """The rows that `config` names, as `check` reads them, and what to say of them.

    A row without a right answer has dense's own, which is generated here. Raises what `read_rows` does.
    """
    rows = read_rows(config, make_prompts(config, model, config.max_new_tokens))
    return make_cases(model, rows.rows, rules_of(config, model), check), rows.told
