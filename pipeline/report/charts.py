"""The pictures of a report, each with its caption, its legend, and words for those who cannot see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report import svg
from pipeline.report.compare import Comparison
from pipeline.report.figures import Figures, milliseconds, phases

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 1_200  # of all series together
MEDIAN_BINS = 12
MOST_SERIES = len(svg.SERIES)
TIER_COLOURS = {"FFN in full": "full", "FFN in fp8": "fp8", "FFN skipped": "skipped", "left before": "left"}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`legend` has (colour variable, label); the figure itself is `svg`."""

    title: str
    alt: str
    svg: str
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()


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
        legend=_legend([s.label for s in series]),
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
    _scale(axes, "x", np.concatenate([one.tokens for one in series]))
    _scale(axes, "y", np.concatenate([one.ms for one in series]))
    _format(axes, y=_tick_ms)


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


def tier_chart(figures: Figures, name: str) -> Chart | None:
    """What became of the tokens in each layer, mean over documents; None where it was the same for all."""
    if figures.layers is None:
        return None
    tiers = figures.layers.tiers()
    drawn = {label: share for label, share in tiers.items() if share.max() > 0}
    if len(drawn) == 1:  # every token had the same in every layer
        return None
    means = ", ".join(f"{label} {share.mean():.1%}" for label, share in drawn.items())
    return Chart(
        title=f"What became of tokens, layer by layer: {figures.run.label}",
        alt=f"Shares of all tokens, mean over layers: {means}",
        svg=svg.draw(name, partial(_draw_tiers, drawn)),
        caption=f"Mean over {figures.layers.documents:,} documents.",
        legend=tuple((f"tier-{TIER_COLOURS[label]}", label) for label in drawn),
    )


def _draw_tiers(tiers: dict[str, np.ndarray], figure: Figure) -> None:
    axes = figure.add_subplot()
    colours = {"full": svg.FULL, "fp8": svg.FP8, "skipped": svg.SKIPPED, "left": svg.LEFT}
    bottom = 0.0 * next(iter(tiers.values()))
    for label, share in tiers.items():
        axes.bar(np.arange(len(share)), share, 0.9, bottom=bottom, color=colours[TIER_COLOURS[label]])
        bottom = bottom + share
    axes.set(xlabel="layer", ylabel="share of the prompt's tokens", ylim=(0, max(1.0, bottom.max())))
    axes.grid(visible=False, axis="x")
    _format(axes, y=_percent, integers=True)


def layer_chart(runs: Sequence[Figures], what: int, name: str) -> Chart | None:
    """Median and spread of the share that entered each layer (0) or passed its FFN (1); None if all did."""
    with_layers = [run for run in runs if run.layers is not None][:MOST_SERIES]
    lowest = [run.layers.quantile(what, 0.1).min() for run in with_layers if run.layers is not None]
    if not with_layers or min(lowest) >= 1:
        return None
    medians = [
        f"{run.run.label}: median of the last layer {run.layers.quantile(what, 0.5)[-1]:.1%}"
        for run in with_layers
        if run.layers is not None
    ]
    return Chart(
        title=("Tokens kept by layer", "Tokens that passed the FFN by layer")[what],
        alt="; ".join(medians),
        svg=svg.draw(name, partial(_draw_layers, with_layers, what)),
        caption="Median over documents; the band holds four fifths of them.",
        legend=_legend([run.run.label for run in with_layers]),
    )


def _draw_layers(runs: Sequence[Figures], what: int, figure: Figure) -> None:
    axes = figure.add_subplot()
    highest = 1.0
    for n, run in enumerate(runs):
        assert run.layers is not None
        low, median, high = (run.layers.quantile(what, share) for share in (0.1, 0.5, 0.9))
        layers = np.arange(len(median))
        axes.fill_between(layers, low, high, step="mid", color=svg.SERIES[n], alpha=0.25, linewidth=0)
        axes.plot(layers, median, drawstyle="steps-mid", color=svg.SERIES[n], linewidth=1.6)
        highest = max(highest, float(high.max()))
    axes.set(xlabel="layer", ylabel="share of the prompt's tokens", ylim=(0, highest * 1.02))
    _format(axes, y=_percent, integers=True)


def heat_chart(figures: Figures, what: int, name: str) -> Chart | None:
    """Documents by layers; None where every document kept everything."""
    if figures.layers is None:
        return None
    tokens, *both = figures.layers.sampled()
    shares = both[what]
    if shares.min(initial=1) >= 1:
        return None
    few = (
        f"{len(tokens):,} of {figures.layers.documents:,}"
        if len(tokens) < figures.layers.documents
        else "all"
    )
    noun = ("kept", "that passed the FFN")[what]
    return Chart(
        title=f"Tokens {noun}, by document: {figures.run.label}",
        alt=f"Share of tokens {noun} for {few} documents, {shares.min():.0%} to {shares.max():.0%}",
        svg=svg.draw(name, partial(_draw_heat, tokens, shares)),
        caption=f"A row a document, the shortest on top ({few} documents).",
    )


def _draw_heat(tokens: np.ndarray, shares: np.ndarray, figure: Figure) -> None:
    axes = figure.add_subplot()
    image = axes.imshow(
        shares,
        aspect="auto",
        cmap="cividis",
        vmin=0,
        vmax=max(1.0, float(shares.max())),
        interpolation="nearest",
    )
    axes.grid(visible=False)
    axes.set(xlabel="layer", ylabel="prompt tokens")
    places = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), 6)).astype(int))
    axes.set_yticks(places, [f"{tokens[place]:,.0f}" for place in places])
    bar = figure.colorbar(image, ax=axes, format=_percent)
    bar.outline.set_visible(False)
    _format(axes, integers=True)


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
        legend=_legend([run.run.label for run in runs]),
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
    _scale(axes, "x", np.array(known))
    _format(axes, x=_tick_ms)


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
    _scale(axes, "x", tokens)
    _format(axes)


def _legend(labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Of several series; one alone is told by the title."""
    return tuple((f"series-{n}", label) for n, label in enumerate(labels) if len(labels) > 1)


def _scale(axes: Axes, which: str, values: np.ndarray) -> None:
    """Logarithmic where the values span more than a decade, with ticks that can be read."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = values[np.isfinite(values) & (values > 0)]
    if not len(values) or values.max() / values.min() < 10:
        return
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    wide = values.max() / values.min() > 300
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=7))
    axis.set_minor_locator(NullLocator())


def _format(axes: Axes, *, x: Any = None, y: Any = None, integers: bool = False) -> None:
    """Plain tick labels; matplotlib's own may hold markup."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(FuncFormatter(x or (lambda value, _: f"{value:,.10g}")))
    if y is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(y))
    if integers:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _tick_ms(ms: float, _: Any = None) -> str:
    return milliseconds(ms).replace(".00 ", " ").replace(".0 ", " ")


def _percent(share: float, _: Any = None) -> str:
    return f"{share:.0%}"
