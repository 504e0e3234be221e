"""A picture of methods side by side: what each lost against how much faster it was than dense."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.bench.accuracy import Accuracy
from pipeline.bench.plot import save_figure


def save_accuracy(path: str, title: str, results: Sequence[Accuracy]) -> None:
    """Drop of the first group's token accuracy, with its interval. ConfigError if it cannot be saved.

    Variants of one method with one first setting form a line, so that a grid reads as a frontier.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
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
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    save_figure(figure, path)
