"""Pictures of times and answers: TTFT by length, phases, and how two runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report import svg
from pipeline.report.chart_parts import MOST_SERIES, Chart, format_ticks, legend_of, scale, tick_ms
from pipeline.report.compare import Comparison
from pipeline.report.figures import Figures, milliseconds, phases

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 1_200  # of all series together
MEDIAN_BINS = 12


@dataclass(frozen=True, kw_only=True)
class Series:
    """One method of one run, over lengths."""

    label: str
    is_dense: bool
    tokens: np.ndarray = field(repr=False)
    ms: np.ndarray = field(repr=False)


def ttft_chart(runs: Sequence[Figures]) -> Chart | None:
    """TTFT against document length: some rows as points, medians of all rows as lines."""
    series = _ttft_series(runs)
    if not series:
        return None
    lines = [
        f"{s.label}: median {milliseconds(float(np.median(s.ms)))} over {len(s.ms):,} rows of "
        f"{s.tokens.min():,.0f} to {s.tokens.max():,.0f} tokens"
        for s in series
    ]
    packed = [f"{run.packed_share():.0%} of {run.run.label}" for run in runs if run.packed_share() > 0]
    caption = "Points are rows, lines the medians of rows of similar length."
    if not any(s.is_dense for s in series):
        caption += " No dense run is among these outputs: name one too for its line."
    if packed:
        caption += f" In packs, which share one TTFT: {', '.join(packed)}."
    drawn = svg.draw("ttft", partial(_draw_ttft, series))
    return Chart(
        title="Time to first token by document length",
        alt="; ".join(lines),
        svg=drawn,
        caption=caption,
        legend=legend_of([s.label for s in series]),
    )


def _ttft_series(runs: Sequence[Figures]) -> list[Series]:
    series = []
    for figures in runs:
        for method in figures.methods:
            tokens, ms = figures.times("document_tokens", method), figures.times("ttft_ms", method)
            known = (tokens > 0) & (ms > 0)
            of_run = figures.run.label
            label = method if method == of_run or len(runs) == 1 else f"{of_run} ({method})"
            if known.any():
                is_dense = method == "dense"
                series.append(Series(label=label, is_dense=is_dense, tokens=tokens[known], ms=ms[known]))
    return series[:MOST_SERIES]


def _draw_ttft(series: Sequence[Series], figure: Figure) -> None:
    axes = figure.add_subplot()
    random = np.random.default_rng(0)
    for n, one in enumerate(series):
        few = random.permutation(len(one.ms))[: MOST_POINTS // len(series)]
        style: dict[str, Any] = {"color": svg.SERIES[n], "marker": svg.MARKERS[n]}
        axes.plot(
            one.tokens[few],
            one.ms[few],
            linestyle="none",
            markersize=4,
            markeredgewidth=0,
            alpha=0.55,
            **style,
        )
        axes.plot(
            *_medians(one), linestyle="--" if one.is_dense else "-", markersize=4, linewidth=1.6, **style
        )
    axes.set(xlabel="document tokens", ylabel="TTFT")
    scale(axes, "x", np.concatenate([one.tokens for one in series]))
    scale(axes, "y", np.concatenate([one.ms for one in series]))
    format_ticks(axes, y=tick_ms)


def _medians(series: Series) -> tuple[list[float], list[float]]:
    """Of up to `MEDIAN_BINS` groups of equally many rows by length, the medians of length and TTFT."""
    order = np.argsort(series.tokens, kind="stable")
    groups = np.array_split(order, min(MEDIAN_BINS, max(1, len(order) // 3)))
    points = {
        float(np.median(series.tokens[group])): float(np.median(series.ms[group]))
        for group in groups
        if len(group)
    }
    return list(points), list(points.values())


def phase_chart(runs: Sequence[Figures]) -> Chart | None:
    """Median and 95th percentile of each phase."""
    runs = runs[:MOST_SERIES]
    if not any(run.answered for run in runs):
        return None
    told = [
        f"{run.run.label}: "
        + ", ".join(f"{label} {milliseconds(median)}" for label, median, _ in phases(run))
        for run in runs
    ]
    return Chart(
        title="Time by phase",
        alt="Medians: " + "; ".join(told),
        svg=svg.draw("phases", partial(_draw_phases, runs)),
        caption="As rows see it: median, and a line to the 95th percentile. A pack's rows share its prefill.",
        legend=legend_of([run.run.label for run in runs]),
    )


def _draw_phases(runs: Sequence[Figures], figure: Figure) -> None:
    axes = figure.add_subplot()
    names = [label for label, *_ in phases(runs[0])]
    known = []
    for n, run in enumerate(runs):
        for place, (_, median, slow) in enumerate(phases(run)):
            if median is None or slow is None:
                continue
            height = place + (n - (len(runs) - 1) / 2) * 0.7 / len(runs)
            low, high = max(median, 1e-3), max(slow, 1e-3)
            axes.plot([low, high], [height, height], color=svg.SERIES[n], linewidth=1.6)
            axes.plot([low], [height], color=svg.SERIES[n], marker=svg.MARKERS[n], markersize=5)
            known += [low, high]
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5))
    scale(axes, "x", np.array(known))
    format_ticks(axes, x=tick_ms)


def comparison_charts(comparison: Comparison, labels: tuple[str, str]) -> list[Chart]:
    """How alike the answers are, and how much faster the second run was, row by row."""
    if not comparison.both_answered:
        return []
    similarity, ratios = comparison.pairs("similarity"), comparison.speed_ratios()
    charts = [
        Chart(
            title="How alike the answers are",
            alt=f"Median similarity {np.median(similarity):.2f}, lowest {similarity.min():.2f}",
            svg=svg.draw("similarity", partial(_draw_similarity, similarity)),
            caption=f"{comparison.measure}; 1 is the same answer.",
        )
    ]
    if len(ratios):
        known = (comparison.pairs("first_ms") > 0) & (comparison.pairs("second_ms") > 0)
        tokens = comparison.pairs("document_tokens")[known]
        charts.append(
            Chart(
                title=f"TTFT of {labels[0]} over that of {labels[1]}",
                alt=f"Median {np.median(ratios):.2f}, {ratios.min():.2f} to {ratios.max():.2f}",
                svg=svg.draw("ratios", partial(_draw_ratios, tokens, ratios)),
                caption=f"Above 1, {labels[1]} was faster.",
            )
        )
    return charts


def _draw_similarity(similarity: np.ndarray, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    axes.hist(similarity, bins=20, range=(0, 1), color=svg.SERIES[0], rwidth=0.92)
    axes.set(xlabel="similarity", ylabel="rows")
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_ratios(tokens: np.ndarray, ratios: np.ndarray, figure: Figure) -> None:
    axes = figure.add_subplot()
    few = np.random.default_rng(0).permutation(len(ratios))[:MOST_POINTS]
    axes.axhline(1, color=svg.INK, linewidth=0.8)
    axes.plot(
        tokens[few],
        ratios[few],
        marker="o",
        markersize=4,
        markeredgewidth=0,
        alpha=0.6,
        linestyle="none",
        color=svg.SERIES[1],
    )
    axes.set(xlabel="document tokens", ylabel="times as fast")
    scale(axes, "x", tokens)
    format_ticks(axes)
