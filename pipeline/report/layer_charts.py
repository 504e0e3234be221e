"""Pictures of what layers did with tokens: tiers, medians with their spread, and documents one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report import svg
from pipeline.report.chart_parts import MOST_SERIES, Chart, format_ticks, legend_of, percent
from pipeline.report.figures import Figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIER_COLOURS = {"FFN in full": "full", "FFN in fp8": "fp8", "FFN skipped": "skipped", "left before": "left"}


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
    format_ticks(axes, y=percent, integers=True)


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
        legend=legend_of([run.run.label for run in with_layers]),
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
    format_ticks(axes, y=percent, integers=True)


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
    bar = figure.colorbar(image, ax=axes, format=percent)
    bar.outline.set_visible(False)
    format_ticks(axes, integers=True)
