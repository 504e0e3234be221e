"""A report on one run or several: figures for a terminal, or a page with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report import charts
from pipeline.report.compare import AnswerPair, Comparison, compare
from pipeline.report.drawing import Chart
from pipeline.report.figures import Figures, configuration, figures_of, headline, milliseconds, phases
from pipeline.report.output_reading import Run
from pipeline.report.page import render
from pipeline.texts.words import percent_of

FEW = 2  # runs of which each has pictures of its own


@dataclass(frozen=True, kw_only=True)
class Report:
    """Runs in numbers; of exactly two, also row by row."""

    runs: tuple[Figures, ...]
    comparison: Comparison | None = None


def make_report(runs: Sequence[Run]) -> Report:
    """Read the runs, one after the other, in memory of a few bytes a row."""
    figures = tuple(figures_of(run) for run in runs)
    comparison = compare(runs[0], runs[1]) if len(runs) == 2 else None
    return Report(runs=figures, comparison=comparison)


def title_of(report: Report) -> str:
    labels = [figures.run.label for figures in report.runs]
    return " against ".join(labels) if len(labels) == 2 else ", ".join(labels)


def headline_rows(runs: Sequence[Figures]) -> list[tuple[str, list[str]]]:
    """Of each headline figure, its value in each run."""
    told = [dict(headline(figures)) for figures in runs]
    most = max(told, key=len)
    names = [*most, *dict.fromkeys(name for one in told for name in one if name not in most)]
    return [(name, [one.get(name, "-") for one in told]) for name in names]


def comparison_figures(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """What two runs have in common, as name and value."""
    yield "rows in both", f"{comparison.joined:,}"
    for name, count in (
        ("only in the first", comparison.only_first),
        ("only in the second", comparison.only_second),
        ("failed in one", comparison.one_failed),
        ("failed in both", comparison.both_failed),
    ):
        if count:
            yield name, f"{count:,}"
    if not comparison.both_answered:
        return
    similarity, (_, ratios) = comparison.pairs("similarity"), comparison.speed_ratios()
    yield "same answers", percent_of(comparison.same_answers / comparison.both_answered)
    yield "similarity, mean", f"{float(similarity.mean()):.3f}"
    yield "similarity, p10", f"{float(np.percentile(similarity, 10)):.3f}"
    if len(ratios):
        yield "second as fast, median", f"{float(np.median(ratios)):.2f} times"
        yield "from p10 to p90", f"{np.percentile(ratios, 10):.2f} to {np.percentile(ratios, 90):.2f}"


def pair_facts(pair: AnswerPair) -> str:
    """One line on a row that is in both runs."""
    first, second = pair.first, pair.second
    facts = [f"row {first['row']}", f"{first['document_tokens'] or 0:,} document tokens"]
    if pair.similarity is not None:
        facts.append(f"similarity {pair.similarity:.2f}")
    if pair.ttft_ratio is not None:
        times = f"TTFT {milliseconds(first['ttft_ms'])} and {milliseconds(second['ttft_ms'])}"
        facts.append(f"{times}, {pair.ttft_ratio:.2f} times as fast")
    for name, label in (("kept_ratio", "kept"), ("ffn_ratio", "FFN")):
        shares = first[name], second[name]
        if None not in shares:
            facts.append(
                f"{label} {shares[0]:.1%} and {shares[1]:.1%} ({(shares[1] - shares[0]) * 100:+.1f} pt)"
            )
    return "; ".join(facts)


def phase_rows(runs: Sequence[Figures]) -> list[tuple[str, list[str]]]:
    """Of each phase, median and 95th percentile in each run."""
    of_runs = [phases(figures) for figures in runs]
    return [
        (rows[0][0], [milliseconds(value) for _, *both in rows for value in both])
        for rows in zip(*of_runs, strict=True)
    ]


def report_page(report: Report) -> str:
    """The report as a page, which needs matplotlib."""
    runs = report.runs
    beside = []
    if report.comparison is not None:
        beside = charts.comparison_charts(report.comparison, (runs[0].run.label, runs[1].run.label))
    return render(
        "report.html.j2",
        title=title_of(report),
        runs=[figures.run for figures in runs],
        all_figures=runs,
        headlines=[list(headline(figures)) for figures in runs],
        headline_rows=headline_rows(runs),
        comparison=report.comparison,
        comparison_figures=[] if report.comparison is None else list(comparison_figures(report.comparison)),
        comparison_charts=beside,
        charts=_charts(runs),
        phase_rows=phase_rows(runs),
        pair_facts=pair_facts,
        configurations=[configuration(figures.run.metadata) for figures in runs],
    )


def _charts(runs: Sequence[Figures]) -> list[Chart]:
    made = [charts.ttft_chart(runs), charts.phase_chart(runs)]
    made += [charts.layer_chart(runs, what, f"layers-{what}") for what in (0, 1)]
    for n, figures in enumerate(runs if len(runs) <= FEW else ()):
        made.append(charts.tier_chart(figures, f"tiers-{n}"))
        made += [charts.heat_chart(figures, what, f"heat-{n}-{what}") for what in (0, 1)]
    return [chart for chart in made if chart is not None]
