"""Figures as SVG that stands inside a page: its colours follow the page's theme, its text is text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = (5.0, 3.2)  # at 72 units an inch: about the width of a phone, so that the text is not made smaller
IMAGE_DPI = 144

# Colours are drawn as these and replaced by the page's variables, which differ by theme.
INK, FAINT = "#010101", "#010102"
SERIES = tuple(f"#0101{n:02x}" for n in range(0x10, 0x16))
FULL, FP8, SKIPPED, LEFT = (f"#0101{n:02x}" for n in range(0x20, 0x24))
_VARIABLES = {
    INK: "ink",
    FAINT: "faint",
    **{colour: f"series-{n}" for n, colour in enumerate(SERIES)},
    FULL: "tier-full",
    FP8: "tier-fp8",
    SKIPPED: "tier-skipped",
    LEFT: "tier-left",
}
MARKERS = ("o", "s", "^", "D", "v", "P")

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


def check_plotting() -> None:
    """Raise ConfigError where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--html needs matplotlib: pip install 'marsinfer[plot]'") from error


def draw(name: str, fill: Callable[[Figure], None], inches: tuple[float, float] = INCHES) -> str:
    """The SVG of a figure that `fill` draws; `name` makes its ids differ from those of others in the page."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {**_SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=inches, layout="constrained")
        fill(figure)
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
