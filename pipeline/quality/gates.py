"""Results of both sides, compared: measures of every task, drops with their intervals, and the verdict.

A score of a task is the mean over its rows, so that long answers count as much as short ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.quality.bootstrap import Drop, Judgement, Verdict, judge, paired_drop
from pipeline.quality.check_rows import CheckRow, tasks_of
from pipeline.quality.metrics import score as score_text
from pipeline.quality.row_results import RowResult
from pipeline.settings.check import CheckConfig
from pipeline.settings.gate import FORCED_METRICS

ALL = "all"
SCORERS = {
    "exact-match": "exact_match",
    "token-f1": "token_f1",
    "rouge-l": "rouge_l",
    "edit-similarity": "edit_similarity",
    "choice": "choice_match",
}
KL, NEVER, FIRST = "KL from dense", "never diverges", "first divergence"
UNITS = {"nll": "nats", KL: "nats", FIRST: "tokens"}  # all other measures are shares


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row under both sides."""

    row: CheckRow
    dense: RowResult
    method: RowResult


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Means over the rows of a task; of dense there is none where the measure compares with it."""

    name: str
    dense: float | None
    method: float | None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One task, or all of them, held against the bound; `decides` if the check's verdict hangs on it."""

    task: str
    decides: bool
    drop: Drop
    judgement: Judgement
    measures: tuple[Measure, ...]

    @property
    def verdict(self) -> Verdict:
        return self.judgement.verdict


def make_gates(config: CheckConfig, pairs: Sequence[Pair]) -> tuple[Gate, ...]:
    """A gate for each task, and one for all rows if there are several tasks or the verdict hangs on it."""
    tasks = list(tasks_of([pair.row for pair in pairs]))
    gates = [
        _gate(config, task, [pair for pair in pairs if pair.row.sample.task == task], config.per_task)
        for task in tasks
    ]
    if len(tasks) == 1:
        (gate,) = gates
        return (_gate(config, gate.task, pairs, decides=True),)
    return (*gates, _gate(config, ALL, pairs, not config.per_task))


def verdict_of(gates: Sequence[Gate]) -> Verdict:
    """The worst of those that decide."""
    found = {gate.verdict for gate in gates if gate.decides}
    return next(verdict for verdict in ("fail", "inconclusive", "pass") if verdict in found)


def _gate(config: CheckConfig, task: str, pairs: Sequence[Pair], decides: bool) -> Gate:
    bound, relative = config.bound
    metric = config.gate_metric
    drop = paired_drop(
        [_score(metric, pair.row, pair.dense) for pair in pairs],
        [_score(metric, pair.row, pair.method) for pair in pairs],
        clusters=[pair.row.sample.document_key for pair in pairs],
        relative=relative,
        losses=metric == "nll",
        seed=config.seed,
    )
    return Gate(
        task=task,
        decides=decides,
        drop=drop,
        judgement=judge(drop, bound),
        measures=tuple(_measures(config, pairs)),
    )


def _measures(config: CheckConfig, pairs: Sequence[Pair]) -> list[Measure]:
    names = [name for name in FORCED_METRICS if config.has_references or name == "agreement"]
    if config.generate:
        # what packages that are not installed would tell is left out, but for the gate's own metric
        names += [name for name in ("score", *SCORERS) if name == config.gate_metric or _can(name, pairs)]
    measures = [
        Measure(
            name=name,
            dense=None if name == "agreement" else _mean(name, pairs, dense=True),
            method=_mean(name, pairs, dense=False),
        )
        for name in names
    ]
    divergences = [pair.method.score.divergence for pair in pairs if pair.method.score.divergence is not None]
    parted = [pair.method.score.parted_at for pair in pairs if pair.method.score.parted_at is not None]
    never = 1 - len(parted) / len(pairs)
    extras = (
        (KL, statistics.mean(divergences)),
        (NEVER, never),
        (FIRST, statistics.median(parted) if parted else None),
    )
    return measures + [Measure(name=name, dense=None, method=value) for name, value in extras]


def _mean(name: str, pairs: Sequence[Pair], *, dense: bool) -> float:
    return statistics.fmean(_score(name, pair.row, pair.dense if dense else pair.method) for pair in pairs)


def _can(name: str, pairs: Sequence[Pair]) -> bool:
    try:
        for pair in pairs:
            _score(name, pair.row, pair.dense)
    except ConfigError:
        return False
    return True


def check_scorer(config: CheckConfig, rows: Sequence[CheckRow]) -> None:
    """Raise ConfigError, before any row runs, if the gate's metric needs a package that is not there."""
    names = {row.sample.metric for row in rows} if config.gate_metric == "score" else set()
    names |= {SCORERS[config.gate_metric]} if config.gate_metric in SCORERS else set()
    for name in sorted(names):
        score_text(name, "a", ["a"], ["a"])


def _score(name: str, row: CheckRow, result: RowResult) -> float:
    """Of one row, from 0 to 1, but for `nll`: nats a token."""
    made = result.score
    if name == "token-accuracy":
        return made.correct / made.tokens
    if name == "nll":
        return made.nll / made.tokens
    if name == "found":
        return float(made.found)
    if name == "agreement":  # dense with itself is 1
        return 1.0 if made.agreed is None else made.agreed / made.tokens
    sample = row.sample
    metric = sample.metric if name == "score" else SCORERS[name]
    return score_text(metric, result.generated or "", sample.references, sample.choices)


def speeds(pairs: Sequence[Pair], *, same_run: bool) -> dict[str, float | None]:
    """Medians of the times to first token, and means of the shares that the method kept.

    Without `same_run` dense was timed by another run, and its times cannot be compared.
    """
    dense_ms = statistics.median(pair.dense.score.ttft_ms for pair in pairs)
    method_ms = statistics.median(pair.method.score.ttft_ms for pair in pairs)
    shares = ("kept_ratio", "ffn_ratio", "flops_ratio", "kv_ratio")
    means = {name: statistics.fmean(getattr(pair.method.score, name) for pair in pairs) for name in shares}
    return {
        "dense_ttft_p50_ms": dense_ms if same_run else None,
        "method_ttft_p50_ms": method_ms,
        "speed_up": dense_ms / method_ms if same_run else None,
        **means,
    }
