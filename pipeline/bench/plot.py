"""Pictures of bench runs: TTFT against length, and what methods lost against how much faster they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bench.accuracy import Accuracy
from pipeline.bench.ttft import Measurement
from pipeline.errors import ConfigError
from pipeline.outputs.replacing import is_picture, picture_metadata, refuse_foreign_file
from pipeline.report.drawing import check_plotting
from pipeline.storage.whole_file import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_plot(path: str) -> None:
    """Raise ConfigError, before anything is measured, if the picture could not be made."""
    check_plotting("--plot")
    if not path.lower().endswith((".png", ".svg", ".pdf")):
        raise ConfigError(f"--plot {path}: name a .png, .svg or .pdf file")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no such folder")
    refuse_foreign_file("--plot", Path(path), is_picture)


def draw_ttft(results: Sequence[Measurement], axes: Axes) -> None:
    """Medians with their spread; of a single length, bars."""
    lengths = sorted({result.tokens for result in results})
    for variant in dict.fromkeys(result.variant for result in results):
        points = [result for result in results if result.variant == variant]
        medians = [point.ttft_ms for point in points]
        below = [point.ttft_ms - point.fastest_ms for point in points]
        above = [point.slowest_ms - point.ttft_ms for point in points]
        if len(lengths) == 1:
            axes.barh(variant, medians, xerr=[below, above])
        else:
            tokens = [point.tokens for point in points]
            axes.errorbar(tokens, medians, yerr=[below, above], marker="o", capsize=3, label=variant)
    if len(lengths) == 1:
        axes.set_xlabel(f"TTFT in ms, {lengths[0]:,} tokens")
        axes.invert_yaxis()
    else:
        axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="TTFT in ms")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.legend()


def draw_accuracy(results: Sequence[Accuracy], axes: Axes) -> None:
    """Drop of the first group's token accuracy, with its interval.

    Variants of one method with one first setting form a line, so that a grid reads as a frontier.
    """
    lines: dict[str, list[Accuracy]] = {}
    for result in results:
        lines.setdefault(":".join(result.variant.split(":")[:2]), []).append(result)
    for name, members in lines.items():
        members = sorted(members, key=lambda member: member.speed_up)
        drops = [member.groups[0].token_drop for member in members]
        axes.errorbar(
            [member.speed_up for member in members],
            [drop.drop for drop in drops],
            yerr=[[drop.drop - drop.low for drop in drops], [drop.high - drop.drop for drop in drops]],
            marker="o",
            capsize=2,
            linewidth=1,
            label=name if len(members) > 1 else members[0].variant,
        )
        for member in members if len(members) > 1 else ():
            rest = ":".join(member.variant.split(":")[2:])
            axes.annotate(rest, (member.speed_up, member.groups[0].token_drop.drop), fontsize=6)
    axes.axhline(0, linewidth=0.8, color="gray")
    axes.set(xlabel="times as fast as dense", ylabel="drop of token accuracy, points")
    axes.legend(fontsize=7)


def save_picture(path: str, title: str, fill: Callable[[Axes], None]) -> None:
    """Replace a picture whole by what `fill` draws. StorageError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    fill(axes)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    suffix = Path(path).suffix.lower()
    with writing(Path(path)) as file:
        figure.savefig(file, format=suffix[1:], dpi=150, metadata=picture_metadata(suffix))
