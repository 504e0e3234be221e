"""A report on one run or several: figures for a terminal, or a page with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report import charts
from pipeline.report.compare import Comparison, compare
from pipeline.report.conclusion import Conclusion, conclude
from pipeline.report.drawing import Chart
from pipeline.report.figures import (
    ABOUT,
    Figures,
    about_run,
    configuration,
    figures_of,
    headline,
    milliseconds,
    phases,
)
from pipeline.report.output_reading import Run
from pipeline.report.page import render
from pipeline.report.pruning_map import UNPRUNED
from pipeline.report.row_maps import maps_for
from pipeline.report.rows_shown import NO_ROWS, ShownRows, of_pair, of_run
from pipeline.texts.words import percent_of

FEW = 2  # runs of which each has pictures of its own


@dataclass(frozen=True, kw_only=True)
class Report:
    """Runs in numbers; of exactly two, also row by row."""

    runs: tuple[Figures, ...]
    conclusion: Conclusion
    comparison: Comparison | None = None


def make_report(runs: Sequence[Run]) -> Report:
    """Read the runs, one after the other, in memory of a few bytes a row."""
    figures = tuple(figures_of(run) for run in runs)
    comparison = compare(runs[0], runs[1]) if len(runs) == 2 else None
    return Report(runs=figures, conclusion=conclude(figures, comparison), comparison=comparison)


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
    yield from _score_figures(comparison)
    yield "same answers", percent_of(comparison.same_answers / comparison.both_answered)
    yield "similarity, mean", f"{float(similarity.mean()):.3f}"
    yield "similarity, p10", f"{float(np.percentile(similarity, 10)):.3f}"
    if len(ratios):
        yield "second as fast, median", f"{float(np.median(ratios)):.2f} times"
        yield "from p10 to p90", f"{np.percentile(ratios, 10):.2f} to {np.percentile(ratios, 90):.2f}"


def phase_rows(runs: Sequence[Figures]) -> list[tuple[str, list[str]]]:
    """Of each phase, median and 95th percentile in each run."""
    of_runs = [phases(figures) for figures in runs]
    return [
        (rows[0][0], [milliseconds(value) for _, *both in rows for value in both])
        for rows in zip(*of_runs, strict=True)
    ]


def _score_figures(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """What both score against the references of the rows, where these have any."""
    for name, label in (("first_score", "token F1 of the first"), ("second_score", "token F1 of the second")):
        scores = comparison.pairs(name)
        scores = scores[np.isfinite(scores)]
        if len(scores):
            yield label, f"{float(scores.mean()):.3f}"


def about_rows(runs: Sequence[Figures]) -> list[tuple[str, str]]:
    """Model, device and date; what is not the same for all is told of each."""
    told = [dict(about_run(figures.run.metadata)) for figures in runs]
    rows = []
    for name in ABOUT.values():
        values = [one.get(name, "unknown") for one in told]
        if len(set(values)) > 1:
            labelled = zip(runs, values, strict=True)
            rows.append((name, "; ".join(f"{figures.run.label}: {value}" for figures, value in labelled)))
        elif values[0] != "unknown":
            rows.append((name, values[0]))
    return rows


def shown_rows(report: Report) -> ShownRows:
    """The rows to look at: of one run, or those in which two differ; of more there are none."""
    runs = report.runs
    if report.comparison is not None:
        return of_pair((runs[0].run, runs[1].run), report.comparison)
    return of_run(runs[0]) if len(runs) == 1 else NO_ROWS


def report_page(report: Report) -> str:
    """The report as a page, which needs matplotlib."""
    runs, comparison = report.runs, report.comparison
    beside = []
    if comparison is not None:
        beside = charts.comparison_charts(comparison, (runs[0].run.label, runs[1].run.label))
    rows = shown_rows(report)
    maps = maps_for(rows)
    has_maps = any(each.data for each in maps.values())
    return render(
        "report.html.j2",
        scripts=[*(["map.js"] if has_maps else []), *(["rows.js"] if rows.rows else [])],
        title=title_of(report),
        conclusion=report.conclusion,
        about=about_rows(runs),
        runs=[figures.run for figures in runs],
        all_figures=runs,
        headlines=[list(headline(figures)) for figures in runs],
        headline_rows=headline_rows(runs),
        comparison=comparison,
        comparison_figures=[] if comparison is None else list(comparison_figures(comparison)),
        comparison_charts=beside,
        charts=_charts(runs),
        rows=rows,
        maps=maps,
        has_maps=has_maps,
        unpruned=UNPRUNED,
        phase_rows=phase_rows(runs),
        configurations=[configuration(figures.run.metadata) for figures in runs],
    )


def _charts(runs: Sequence[Figures]) -> list[Chart]:
    made = [charts.ttft_chart(runs), charts.phase_chart(runs)]
    made += [charts.layer_chart(runs, what, f"layers-{what}") for what in (0, 1)]
    for n, figures in enumerate(runs if len(runs) <= FEW else ()):
        made.append(charts.tier_chart(figures, f"tiers-{n}"))
        made += [charts.heat_chart(figures, what, f"heat-{n}-{what}") for what in (0, 1)]
    return [chart for chart in made if chart is not None]
