"""Results of both sides, compared: measures of every task, drops with their intervals, and the verdict.

A score of a task is the mean over its documents, and that of a document over its rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

from pipeline.errors import ConfigError, GateInconclusive
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.drops import TAIL, Drop, Judgement, Paired, Verdict, fewest_documents, smallest_bound
from pipeline.evaluate.row_results import RowResult
from pipeline.evaluate.workbench import has_pruned
from pipeline.settings.check_settings import FORCED_METRICS, CheckConfig
from pipeline.suites.metrics import score as score_text
from pipeline.suites.samples import grouped
from pipeline.texts.words import counted

T = TypeVar("T")
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
SHARES = {"ffn_ratio": "FFN", "kept_ratio": "tokens", "kv_ratio": "K/V", "flops_ratio": "operations"}
RECOMMENDED = 400  # documents: those that lose next to nothing pass 2pt, and such a loss is seen


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row under both sides, and what the method made of it when its scores were last accepted."""

    row: CheckRow
    dense: RowResult
    method: RowResult
    accepted: RowResult | None = None

    @property
    def reference(self) -> RowResult:
        """What the method is held against."""
        return self.dense if self.accepted is None else self.accepted


class Measure(NamedTuple):
    """Means over the documents of a task, but for `FIRST`, the median of its rows.

    Of dense there is none where the measure compares with it.
    """

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


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckResult:
    """What a check found, and of what."""

    config: CheckConfig
    verdict: Verdict
    gates: tuple[Gate, ...]  # one a task, and one for all rows
    against: Literal["dense", "accepted"]  # what the method's scores are held against
    speed: Mapping[str, float | None]
    counts: Mapping[str, int]
    left_out: tuple[str, ...]
    about: Mapping[str, Any]  # hashes, versions, device
    pairs: tuple[Pair, ...]

    @property
    def method(self) -> str:
        return str(self.about["method"]["name"])

    def __repr__(self) -> str:
        drops = ", ".join(f"{gate.task} {gate.drop.drop:+.4f} {gate.verdict}" for gate in self.gates)
        rows = counted(self.counts["rows"], "row")
        return f"<CheckResult {self.verdict}: {self.method} against {self.against}, {rows}; drops: {drops}>"


def make_gates(config: CheckConfig, pairs: Sequence[Pair], *, differs: bool = False) -> tuple[Gate, ...]:
    """A gate for each task, and one for all rows if there are several tasks or the verdict hangs on it.

    Of whose rows the method left nothing out, as `has_pruned` tells, passes no gate, unless what was run
    `differs` from dense even so.
    """
    groups = _by_task(pairs, lambda pair: pair.row)
    deciding = _deciding(config, groups)
    compared = {task: _compared(config, own) for task, own in groups.items()}
    judged = {
        task: _judged(config, compared[task]).of_pruned(
            differs or has_pruned(pair.method.score for pair in own)
        )
        for task, own in groups.items()
    }
    if config.scope == "documents":
        _hold_back(judged, {task: compared[task] for task in deciding})
    return tuple(
        Gate(
            task=task,
            decides=task in deciding,
            drop=compared[task].drop(),
            judgement=judged[task],
            measures=tuple(_measures(config, own)),
        )
        for task, own in groups.items()
    )


def refuse_too_few(config: CheckConfig, rows: Sequence[CheckRow]) -> str | None:
    """What a pass will cost, if that is worth a note, before any row runs.

    Raises GateInconclusive where so few documents cannot pass the bound even if none of them loses anything.
    """
    bound = config.bound
    if config.scope == "rows" or config.gate_metric == "nll":  # of which no loss of all is known
        return None
    groups = _by_task(rows, lambda row: row)
    counts = {task: len({row.sample.document_key for row in own}) for task, own in groups.items()}
    task, fewest = min(((task, counts[task]) for task in _deciding(config, groups)), key=lambda each: each[1])
    needed = fewest_documents(bound.value)
    of_task = "" if task == ALL or len(groups) == 1 else f" of {task}"
    there = f"{counted(fewest, 'document')}{of_task}"
    if needed is None or fewest < needed:
        unit = "%" if bound.relative else " points"
        costs = "no number of documents is enough" if needed is None else f"{needed:,} documents are needed"
        raise GateInconclusive(
            f"{there} cannot show a drop within --max-drop {bound}: {costs} even if none loses "
            f"anything, and these can show at best that it is under {smallest_bound(fewest):.1f}{unit}; "
            "give more, or with "
            "--scope rows hold these rows alone against their last scores"
        )
    if fewest >= RECOMMENDED:
        return None
    return (
        f"{there} pass --max-drop {bound} only if they lose next to nothing ({needed:,} would "
        f"without any loss); {RECOMMENDED} are recommended"
    )


def _by_task(items: Sequence[T], row_of: Callable[[T], CheckRow]) -> dict[str, list[T]]:
    """The items of each task, and all of them where there are several."""
    groups = grouped(items, lambda item: row_of(item).task)
    return {**groups, ALL: list(items)} if len(groups) > 1 else groups


def _deciding(config: CheckConfig, groups: Mapping[str, object]) -> list[str]:
    if ALL not in groups:
        return list(groups)
    return [task for task in groups if (task != ALL) == config.per_task]


def _compared(config: CheckConfig, pairs: Sequence[Pair]) -> Paired:
    metric = config.gate_metric
    return Paired.of(
        [_score(metric, pair.row, pair.reference) for pair in pairs],
        [_score(metric, pair.row, pair.method) for pair in pairs],
        documents=[pair.row.sample.document_key for pair in pairs],
        relative=config.bound.relative,
        losses=metric == "nll",
    )


def _judged(config: CheckConfig, compared: Paired) -> Judgement:
    bound = config.bound.value
    return compared.judge(bound) if config.scope == "documents" else compared.judge_rows(bound)


def _hold_back(judged: dict[str, Judgement], deciding: Mapping[str, Paired]) -> None:
    """Of several tasks call those failed that fail by Holm's procedure: one in 40 fails by chance alone."""
    p_values = {task: own.p_within(judged[task].bound) for task, own in deciding.items()}
    ordered = sorted(p_values, key=p_values.__getitem__)
    for place, task in enumerate(ordered):
        if p_values[task] > TAIL / (len(ordered) - place):
            for other in ordered[place:]:
                if judged[other].verdict == "fail":
                    judged[other] = replace(judged[other], verdict="inconclusive")
            return


def _measures(config: CheckConfig, pairs: Sequence[Pair]) -> list[Measure]:
    names = [name for name in FORCED_METRICS if config.has_references or name == "agreement"]
    if config.generate:
        # what packages that are not installed would tell is left out, but for the gate's own metric
        names += [name for name in ("score", *SCORERS) if name == config.gate_metric or _can(name, pairs)]
    known = [pair for pair in pairs if pair.method.score.divergence is not None]
    parted = [pair.method.score.parted_at for pair in pairs if pair.method.score.parted_at is not None]
    held_against = [None if name == "agreement" else _mean(name, pairs, dense=True) for name in names]
    own = [_mean(name, pairs, dense=False) for name in names]
    return [
        *map(Measure, names, held_against, own),
        Measure(KL, None, _over_documents(known, lambda pair: pair.method.score.divergence or 0.0)),
        Measure(NEVER, None, _over_documents(pairs, lambda pair: pair.method.score.parted_at is None)),
        Measure(FIRST, None, statistics.median(parted) if parted else None),
    ]


def _mean(name: str, pairs: Sequence[Pair], *, dense: bool) -> float:
    return _over_documents(pairs, lambda pair: _score(name, pair.row, pair.dense if dense else pair.method))


def _over_documents(pairs: Sequence[Pair], value: Callable[[Pair], float]) -> float:
    """The mean over documents, of which each has the mean over its rows."""
    documents = grouped(pairs, lambda pair: pair.row.sample.document_key).values()
    return statistics.fmean(statistics.fmean(map(value, own)) for own in documents)


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
    means = {name: statistics.fmean(getattr(pair.method.score, name) for pair in pairs) for name in SHARES}
    return {
        "dense_ttft_p50_ms": dense_ms if same_run else None,
        "method_ttft_p50_ms": method_ms,
        "speed_up": dense_ms / method_ms if same_run else None,
        **means,
    }
