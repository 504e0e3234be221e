"""A picture of a bench run: time to first token against length, a line a variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bench.ttft import Measurement
from pipeline.errors import ConfigError
from pipeline.outputs.replacing import is_picture, picture_metadata, refuse_foreign_file
from pipeline.storage.whole_file import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plot(path: str) -> None:
    """Raise ConfigError, before anything is measured, if the picture could not be made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'marsinfer[plot]'") from error
    if not path.lower().endswith((".png", ".svg", ".pdf")):
        raise ConfigError(f"--plot {path}: name a .png, .svg or .pdf file")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no such folder")
    refuse_foreign_file("--plot", Path(path), is_picture)


def save_plot(path: str, title: str, results: Sequence[Measurement]) -> None:
    """Draw medians with their spread; of a single length, bars. StorageError if it cannot be saved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
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
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str) -> None:
    """Replace the picture whole. StorageError if it cannot be written."""
    suffix = Path(path).suffix.lower()
    with writing(Path(path)) as file:
        figure.savefig(file, format=suffix[1:], dpi=150, metadata=picture_metadata(suffix))
