"""Pictures of times, answers and layers: TTFT, phases, how two runs differ, what became of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report import drawing
from pipeline.report.compare import Comparison
from pipeline.report.drawing import Chart, draw, format_ticks, legend_of, percent, scale, tick_ms
from pipeline.report.figures import Figures, milliseconds, phases
from pipeline.report.layer_shares import LayerShares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 1_200  # of all series together
MEDIAN_BINS = 12
TIER_COLOURS = {"FFN in full": "full", "FFN in fp8": "fp8", "FFN skipped": "skipped", "left before": "left"}
POINTS: dict[str, Any] = {"linestyle": "none", "markersize": 4, "markeredgewidth": 0, "alpha": 0.6}


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
    drawn = draw("ttft", partial(_draw_ttft, series))
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
    return series[: drawing.MOST_SERIES]


def _draw_ttft(series: Sequence[Series], axes: Axes) -> None:
    random = np.random.default_rng(0)
    for n, one in enumerate(series):
        few = random.permutation(len(one.ms))[: MOST_POINTS // len(series)]
        style: dict[str, Any] = {"color": drawing.SERIES[n], "marker": drawing.MARKERS[n]}
        axes.plot(one.tokens[few], one.ms[few], **style, **POINTS)
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
    runs = runs[: drawing.MOST_SERIES]
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
        svg=draw("phases", partial(_draw_phases, runs)),
        caption="As rows see it: median, and a line to the 95th percentile. A pack's rows share its prefill.",
        legend=legend_of([run.run.label for run in runs]),
    )


def _draw_phases(runs: Sequence[Figures], axes: Axes) -> None:
    names = [label for label, *_ in phases(runs[0])]
    known = []
    for n, run in enumerate(runs):
        for place, (_, median, slow) in enumerate(phases(run)):
            if median is None or slow is None:
                continue
            height = place + (n - (len(runs) - 1) / 2) * 0.7 / len(runs)
            low, high = max(median, 1e-3), max(slow, 1e-3)
            axes.plot([low, high], [height, height], color=drawing.SERIES[n], linewidth=1.6)
            axes.plot([low], [height], color=drawing.SERIES[n], marker=drawing.MARKERS[n], markersize=5)
            known += [low, high]
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5))
    scale(axes, "x", np.array(known))
    format_ticks(axes, x=tick_ms)


def comparison_charts(comparison: Comparison, labels: tuple[str, str]) -> list[Chart]:
    """How alike the answers are, and how much faster the second run was, row by row."""
    if not comparison.both_answered:
        return []
    similarity, (tokens, ratios) = comparison.pairs("similarity"), comparison.speed_ratios()
    charts = [
        Chart(
            title="How alike the answers are",
            alt=f"Median similarity {np.median(similarity):.2f}, lowest {similarity.min():.2f}",
            svg=draw("similarity", partial(_draw_similarity, similarity)),
            caption=f"{comparison.measure}; 1 is the same answer.",
        )
    ]
    if len(ratios):
        charts.append(
            Chart(
                title=f"TTFT of {labels[0]} over that of {labels[1]}",
                alt=f"Median {np.median(ratios):.2f}, {ratios.min():.2f} to {ratios.max():.2f}",
                svg=draw("ratios", partial(_draw_ratios, tokens, ratios)),
                caption=f"Above 1, {labels[1]} was faster.",
            )
        )
    return charts


def _draw_similarity(similarity: np.ndarray, axes: Axes) -> None:
    axes.hist(similarity, bins=20, range=(0, 1), color=drawing.SERIES[0], rwidth=0.92)
    axes.set(xlabel="similarity", ylabel="rows")
    axes.grid(visible=False, axis="x")
    format_ticks(axes, y=lambda count, _: f"{count:,.0f}", integers="y")


def _draw_ratios(tokens: np.ndarray, ratios: np.ndarray, axes: Axes) -> None:
    few = np.random.default_rng(0).permutation(len(ratios))[:MOST_POINTS]
    axes.axhline(1, color=drawing.INK, linewidth=0.8)
    axes.plot(tokens[few], ratios[few], marker="o", color=drawing.SERIES[1], **POINTS)
    axes.set(xlabel="document tokens", ylabel="times as fast")
    scale(axes, "x", tokens)
    format_ticks(axes)


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
        svg=draw(name, partial(_draw_tiers, drawn)),
        caption=f"Mean over {figures.layers.documents:,} documents.",
        legend=tuple((f"tier-{TIER_COLOURS[label]}", label) for label in drawn),
    )


def _draw_tiers(tiers: dict[str, np.ndarray], axes: Axes) -> None:
    bottom = 0.0 * next(iter(tiers.values()))
    for label, share in tiers.items():
        axes.bar(np.arange(len(share)), share, 0.9, bottom=bottom, color=drawing.TIERS[TIER_COLOURS[label]])
        bottom = bottom + share
    axes.set(xlabel="layer", ylabel="share of the prompt's tokens", ylim=(0, max(1.0, bottom.max())))
    axes.grid(visible=False, axis="x")
    format_ticks(axes, y=percent, integers="x")


def layer_chart(runs: Sequence[Figures], what: int, name: str) -> Chart | None:
    """Median and spread of the share that entered each layer (0) or passed its FFN (1); None if all did."""
    known = [(run.run.label, run.layers) for run in runs if run.layers is not None][: drawing.MOST_SERIES]
    if all(layers.quantile(what, 0.1).min() >= 1 for _, layers in known):
        return None
    medians = [
        f"{label}: median of the last layer {layers.quantile(what, 0.5)[-1]:.1%}" for label, layers in known
    ]
    return Chart(
        title=("Tokens kept by layer", "Tokens that passed the FFN by layer")[what],
        alt="; ".join(medians),
        svg=draw(name, partial(_draw_layers, [layers for _, layers in known], what)),
        caption="Median over documents; the band holds four fifths of them.",
        legend=legend_of([label for label, _ in known]),
    )


def _draw_layers(runs: Sequence[LayerShares], what: int, axes: Axes) -> None:
    highest = 1.0
    for n, shares in enumerate(runs):
        low, median, high = (shares.quantile(what, share) for share in (0.1, 0.5, 0.9))
        layers = np.arange(len(median))
        axes.fill_between(layers, low, high, step="mid", color=drawing.SERIES[n], alpha=0.25, linewidth=0)
        axes.plot(layers, median, drawstyle="steps-mid", color=drawing.SERIES[n], linewidth=1.6)
        highest = max(highest, float(high.max()))
    axes.set(xlabel="layer", ylabel="share of the prompt's tokens", ylim=(0, highest * 1.02))
    format_ticks(axes, y=percent, integers="x")


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
        svg=draw(name, partial(_draw_heat, tokens, shares)),
        caption=f"A row a document, the shortest on top ({few} documents).",
    )


def _draw_heat(tokens: np.ndarray, shares: np.ndarray, axes: Axes) -> None:
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
    bar = axes.figure.colorbar(image, ax=axes, format=percent)
    bar.outline.set_visible(False)
    format_ticks(axes, integers="x")
