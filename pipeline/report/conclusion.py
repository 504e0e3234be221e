"""A report in one sentence: whether the pruned run is as good as the other, and how much faster it is.

The interval of a score, and what it says about a bound, are those of `marsinfer check`. The interval of the
median ratio of times lies between two order statistics (W. R. Thompson, Annals of Mathematical Statistics 7,
1936), and supposes nothing of how ratios are spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluate.drops import TAIL, Paired, Verdict
from pipeline.outputs.beginnings import SETTINGS_KEY, settings_differ
from pipeline.pruning.operations import leave_nothing_out
from pipeline.report.compare import Comparison
from pipeline.report.figures import Figures, milliseconds
from pipeline.settings.method_settings import IN_STEPS
from pipeline.setup.guard import DENSE
from pipeline.texts.words import counted, percent_of

BOUND = 2.0  # points, which `marsinfer check` allows unless told otherwise
DIGITS = 3  # of scores: what is beyond would cost time and change nothing
EXACT = 1_000  # ratios, above which a normal distribution stands for the binomial one

# of the settings that decide answers: those that a report is about, and what they go with
ABOUT_METHOD = ("method", "exit_maps", "guard", "group", "kv_memory")
ABOUT_PRECISION = ("linear_dtype", "kv_dtype", "attention_dtype", "draft")  # of the model's
NO_MATTER = ("columns", "later_columns")  # which change what an output has, and no answer


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """`verdict` is None where there are no two runs to hold against each other."""

    sentence: str
    basis: str = ""  # what the sentence stands on
    verdict: Verdict | None = None


def conclude(runs: Sequence[Figures], comparison: Comparison | None) -> Conclusion:
    """What the runs of a report come to; `comparison` is of two."""
    if comparison is not None:
        return _of_two(runs, comparison)
    if len(runs) == 1:
        return Conclusion(sentence=_of_one(runs[0]))
    timed = [run for run in runs if run.percentile("ttft_ms", 50) is not None]
    if not timed:
        return Conclusion(sentence=f"None of these {len(runs)} outputs has an answer.")
    fastest = min(timed, key=lambda run: run.percentile("ttft_ms", 50) or 0.0)
    time = milliseconds(fastest.percentile("ttft_ms", 50))
    return Conclusion(
        sentence=f"Of {len(runs)} outputs {fastest.run.label} has the first token soonest, with a median of "
        f"{time}. Whether its answers are as good, a report on two outputs tells."
    )


def _of_one(figures: Figures) -> str:
    """What one run did, and what would tell whether its answers are good."""
    label = figures.run.label
    if not figures.answered:
        return f"{label} holds no answer."
    parts = [f"{label} holds answers to {figures.answered:,} of {counted(figures.rows, 'row')}"]
    ttft_ms, ffn = figures.percentile("ttft_ms", 50), figures.share("ffn_ratio")
    if ttft_ms is not None:
        parts.append(f"the first token after {milliseconds(ttft_ms)} in the median")
    if ffn is not None and ffn < 1:
        parts.append(f"{percent_of(1 - ffn)} of the work of feed-forward networks skipped")
    if set(figures.methods) == {DENSE}:
        asked = "Name a pruned run of the same rows too, and this says whether it is as good."
    else:
        asked = "Whether they are as good as unpruned ones, a report on a dense run and this one tells."
    return f"{', '.join(parts)}. {asked}"


@dataclass(frozen=True, kw_only=True)
class _Sides:
    """Two runs, of which one is held against the other; numbers are by row that both have answered."""

    base: Figures
    other: Figures
    rows: np.ndarray  # of the input
    scores: tuple[np.ndarray, np.ndarray]  # of both, NaN without a reference
    similarity: np.ndarray
    ratios: np.ndarray  # the base's TTFT over the other's, where both are known
    lost: int  # rows that the base alone has answered
    shows: bool  # whether the other did anything that the base did not, so that it can be worse

    @classmethod
    def of(cls, runs: Sequence[Figures], comparison: Comparison) -> _Sides:
        """The base is the first, unless the second alone is dense."""
        is_dense = [set(run.methods) == {DENSE} for run in runs]
        order = (1, 0) if is_dense == [False, True] else (0, 1)
        known = comparison.pairs("same_input") == 1
        scores, times = (
            [comparison.pairs(f"{('first', 'second')[n]}_{what}")[known] for n in order]
            for what in ("score", "ms")
        )
        timed = (times[0] > 0) & (times[1] > 0)
        by_side = comparison.one_failed - comparison.first_failed, comparison.first_failed
        return cls(
            base=runs[order[0]],
            other=runs[order[1]],
            rows=comparison.pairs("row")[known],
            scores=(scores[0], scores[1]),
            similarity=comparison.pairs("similarity")[known],
            ratios=times[0][timed] / times[1][timed],
            lost=by_side[order[0]],
            shows=_has_pruned(runs[order[0]], runs[order[1]]),
        )


def _of_two(runs: Sequence[Figures], comparison: Comparison) -> Conclusion:
    sides = _Sides.of(runs, comparison)
    if not len(sides.rows):
        first, second = (run.run.label for run in runs)
        same = " of the same text and question" if comparison.other_input else ""
        sentence = f"No row{same} has answers in both {first} and {second}: there is nothing to compare."
        return Conclusion(sentence=sentence, basis=" ".join(_left_out(comparison)), verdict="inconclusive")
    known = np.isfinite(sides.scores[0]) & np.isfinite(sides.scores[1])
    told, basis, verdict = _by_references(sides, known) if known.any() else _by_likeness(sides, comparison)
    if verdict == "pass" and 100 * sides.lost > BOUND * (sides.lost + len(sides.rows)):
        base, other = sides.base.run.label, sides.other.run.label
        lost = f"{other} has no answer to {counted(sides.lost, 'row')} that {base} answers"
        told = f"{lost}; of the others, {told}"
        verdict = "inconclusive"
    notes = [basis, *_left_out(comparison), *_packed(runs), *_other_settings(runs)]
    return Conclusion(sentence=f"{told}; {_speed(sides)}.", basis=" ".join(notes), verdict=verdict)


def _by_references(sides: _Sides, known: np.ndarray) -> tuple[str, str, Verdict]:
    base, other = sides.base.run.label, sides.other.run.label
    scores = [_rounded(side[known]) for side in sides.scores]
    paired = Paired.of(*scores, documents=_documents(sides.rows[known]))
    drop, judgement = paired.drop(), paired.judge(BOUND).of_pruned(sides.shows)
    gain, low, high = (_signed(-points) for points in (drop.drop, drop.high, drop.low))
    changed = f"token F1 changed by {gain} points (95% interval {low} to {high})"
    basis = (
        f"Token F1 is held against the references of {counted(drop.rows, 'row')}, of {100 * drop.dense:.1f} "
        f"points in {base} and {100 * drop.method:.1f} in {other}."
    )
    if drop.high < 0:
        told = f"{other} answers better than {base}: {changed}"
    elif judgement.verdict == "pass":
        told = f"{other} answers as well as {base}, within {BOUND:g} points: {changed}"
    elif judgement.verdict == "fail":
        told = f"{other} answers worse than {base}: {changed}, beyond {BOUND:g} points"
    elif judgement.reason is not None:
        told = f"Nothing tells whether {other} answers as well as {base}, for {judgement.reason}"
    else:
        told = (
            f"{counted(drop.rows, 'row')} cannot tell whether {other} answers as well as {base}: {changed}"
            f"{_needed(judgement.documents_needed)}"
        )
    return told, basis, judgement.verdict


def _by_likeness(sides: _Sides, comparison: Comparison) -> tuple[str, str, Verdict]:
    """Without references: whether the answers are nearly the same. That they differ is no fault in itself."""
    base, other = sides.base.run.label, sides.other.run.label
    similarity = _rounded(sides.similarity)
    paired = Paired.of([1.0] * len(similarity), similarity, documents=_documents(sides.rows))
    drop, judgement = paired.drop(), paired.judge(BOUND).of_pruned(sides.shows)
    same = percent_of(float((sides.similarity == 1).mean()))
    alike = (
        f"{same} of the answers are the same, their likeness is {drop.method:.3f} in the mean (95% interval "
        f"{1 - drop.high / 100:.3f} to {min(1.0, 1 - drop.low / 100):.3f})"
    )
    basis = (
        f"Likeness is the {comparison.measure}, 1 for the same answer. The rows have no reference, which "
        "would tell whether an answer is right."
    )
    if judgement.verdict == "pass":
        return f"{other} answers as {base} does: {alike}", basis, "pass"
    if judgement.verdict == "fail":
        told = f"{other} answers otherwise than {base}, and nothing here tells which is better: {alike}"
        return told, basis, "inconclusive"
    if judgement.reason is not None:
        told = f"Nothing tells whether {other} answers as {base} does, for {judgement.reason}"
        return told, basis, "inconclusive"
    told = f"{counted(drop.rows, 'row')} cannot tell whether {other} answers as {base} does: {alike}"
    return told + _needed(judgement.documents_needed), basis, "inconclusive"


def _rounded(scores: np.ndarray) -> list[float]:
    return list(scores.astype(np.float64).round(DIGITS))


def _documents(rows: np.ndarray) -> list[str]:
    """Several questions of one row are about one document."""
    return [f"{row:.0f}" for row in rows]


def _signed(points: float) -> str:
    return f"{round(points, 2) + 0:+.2f}"  # adding 0 takes the sign from a zero


def _needed(documents: int | None) -> str:
    return "" if documents is None else f"; about {documents:,} documents like these would"


def _speed(sides: _Sides) -> str:
    ratios = sides.ratios
    devices = [figures.run.metadata.get("device") for figures in (sides.base, sides.other)]
    if None not in devices and devices[0] != devices[1]:
        return f"their times do not compare, as they are of {devices[0]} and {devices[1]}"
    if not len(ratios):
        return "their times are not known"
    median, interval = f"{np.median(ratios):.2f} times as fast", median_interval(ratios)
    if interval is None:
        return f"its first token came {median} in the median, of too few rows to tell"
    told = f"95% interval {interval[0]:.2f} to {interval[1]:.2f}"
    if interval[0] > 1:
        return f"its first token comes {median} in the median ({told})"
    if interval[1] < 1:
        return f"its first token comes later, {median} in the median ({told})"
    return f"it shows no other speed, its first token coming {median} in the median ({told})"


def median_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Where the median of what these are a sample of is with 95%; None for fewer than six values."""
    count = len(values)
    if count > EXACT:
        below = math.floor(count / 2 - 1.96 * math.sqrt(count) / 2)
    else:
        tails = np.cumsum([math.comb(count, n) for n in range(count // 2 + 1)], dtype=object)
        below = sum(int(tail) / 2**count <= TAIL for tail in tails)
    if not below:
        return None
    ordered = np.sort(values)
    return float(ordered[below - 1]), float(ordered[count - below])


def _left_out(comparison: Comparison) -> list[str]:
    """Rows that count for nothing."""
    failed = comparison.one_failed + comparison.both_failed
    alone = comparison.only_first + comparison.only_second
    told = [f"{counted(alone, 'row')} that only one of them has"] if alone else []
    told += [f"{counted(failed, 'row')} without an answer in one or both"] if failed else []
    if comparison.other_input:
        told.append(f"{counted(comparison.other_input, 'row')} of another text or question")
    return [f"Left out: {', '.join(told)}."] if told else []


def _packed(runs: Sequence[Figures]) -> list[str]:
    """That rows of a pack have one time in common, which the interval of the ratio does not know."""
    if not any(run.packed_share() for run in runs):
        return []
    return [
        "Rows of a pack share one TTFT, so the times are fewer than the rows and their interval too narrow."
    ]


def _other_settings(runs: Sequence[Figures]) -> list[str]:
    """That more differs than the method and its precision: the model, the prompts or what is drawn."""
    names, settings = [run.run.metadata.get("model") for run in runs], [_beside_method(run) for run in runs]
    told = ""
    if None not in names and names[0] != names[1]:
        told = f"They are of two models, {names[0]} and {names[1]}: more differs than the method."
        settings = [{name: value for name, value in each.items() if name != "model"} for each in settings]
    first, second = settings
    if first and second and (differ := settings_differ(first, second, words=("is", "and"))):
        told = f"{told} Other settings differ, too: " if told else "More differs than the method: "
        told += f"{differ} ({' and '.join(run.run.label for run in runs)})."
    return [told] if told else []


def _beside_method(figures: Figures) -> dict[str, Any]:
    """The settings that decide a run's answers, but for the method's; nothing where they are not known."""
    settings = figures.run.metadata.get(SETTINGS_KEY) or {}
    kept = {name: value for name, value in settings.items() if name not in (*ABOUT_METHOD, *NO_MATTER)}
    if isinstance(kept.get("model"), dict):
        model = kept["model"].items()
        kept["model"] = {name: value for name, value in model if name not in ABOUT_PRECISION}
    return kept


def _has_pruned(base: Figures, other: Figures) -> bool:
    """Whether the other run left out anything that the base did not, or computed in another precision."""
    if set(other.methods) == {DENSE}:  # which is not held to prune
        return True
    settings = [run.run.metadata.get(SETTINGS_KEY) or {} for run in (base, other)]
    precisions = [[each.get("model", {}).get(name) for name in ABOUT_PRECISION] for each in settings]
    in_steps = settings[1].get("kv_memory") is not None or bool({*IN_STEPS} & {*other.methods})
    shares = [other.share(name) for name in ("ffn_ratio", "attention_ratio")]
    known = [share for share in shares if share is not None]
    if in_steps or precisions[0] != precisions[1] or len(known) < len(shares):
        return True
    stored = [run.sums["kv_bytes"] / max(run.sums["prompt_tokens"], 1) for run in (base, other)]
    return not (leave_nothing_out(*known) and stored[1] >= stored[0])
