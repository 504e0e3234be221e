"""What the pictures of a report share: captions and legends, scales, and ticks that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report import svg
from pipeline.report.figures import milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SERIES = len(svg.SERIES)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`legend` has (colour variable, label); the figure itself is `svg`."""

    title: str
    alt: str
    svg: str
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()


def legend_of(labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Of several series; one alone is told by the title."""
    return tuple((f"series-{n}", label) for n, label in enumerate(labels) if len(labels) > 1)


def scale(axes: Axes, which: str, values: np.ndarray) -> None:
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


def format_ticks(axes: Axes, *, x: Any = None, y: Any = None, integers: bool = False) -> None:
    """Plain tick labels; matplotlib's own may hold markup."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(FuncFormatter(x or (lambda value, _: f"{value:,.10g}")))
    if y is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(y))
    if integers:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def tick_ms(ms: float, _: Any = None) -> str:
    return milliseconds(ms).replace(".00 ", " ").replace(".0 ", " ")


def percent(share: float, _: Any = None) -> str:
    return f"{share:.0%}"
