"""Charts as SVG that stands inside a page: its colours follow the page's theme, its text is text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.report.figures import milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (5.0, 3.2)  # at 72 units an inch: about the width of a phone, so that the text is not made smaller
IMAGE_DPI = 144

# Colours are drawn as these and replaced by the page's variables, which differ by theme.
INK, FAINT = "#010101", "#010102"
SERIES = tuple(f"#0101{n:02x}" for n in range(0x10, 0x16))
TIERS = {name: f"#0101{n:02x}" for n, name in enumerate(("full", "fp8", "skipped", "left"), start=0x20)}
_VARIABLES = {
    INK: "ink",
    FAINT: "faint",
    **{colour: f"series-{n}" for n, colour in enumerate(SERIES)},
    **{colour: f"tier-{name}" for name, colour in TIERS.items()},
}
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_SERIES = len(SERIES)

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`legend` has (colour variable, label); the figure itself is `svg`."""

    title: str
    alt: str
    svg: str
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()


def check_plotting(flag: str) -> None:
    """Raise ConfigError where there is no matplotlib, which this flag needs."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{flag} needs matplotlib: pip install 'marsinfer[plot]'") from error


def draw(name: str, fill: Callable[[Axes], None]) -> str:
    """The SVG of what `fill` draws; `name` makes its ids differ from those of others in the page."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {**_SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=INCHES, layout="constrained")
        fill(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", dpi=IMAGE_DPI, metadata={"Date": None})
    return _for_page(buffer.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)  # would hold for the page
    head, _, body = svg.partition(">")
    view = re.search(r'viewBox="[^"]+"', head)
    head = f'<svg {view[0] if view else ""} xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true"'
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"font: ([\d.]+px) '[^;\"]*", r"font-size: \1", body)  # in the page's own typeface
    return f"{head}>{body}"


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


def format_ticks(axes: Axes, *, x: Any = None, y: Any = None, integers: str | None = None) -> None:
    """Plain tick labels; matplotlib's own may hold markup. `integers` is an axis of whole numbers, x or y."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_formatter(x or (lambda value, _: f"{value:,.10g}"))
    if y is not None:
        axes.yaxis.set_major_formatter(y)
    if integers is not None:
        (axes.xaxis if integers == "x" else axes.yaxis).set_major_locator(MaxNLocator(integer=True))


def tick_ms(ms: float, _: Any = None) -> str:
    return milliseconds(ms).replace(".00 ", " ").replace(".0 ", " ")


def percent(share: float, _: Any = None) -> str:
    return f"{share:.0%}"
