"""A picture of a calibration: what every candidate lost against its time to first token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.bench.plot import save_figure
from pipeline.quality.calibration_report import frontier, score_name

if TYPE_CHECKING:
    from pipeline.quality.calibration import Calibration


def save_frontier(path: str, result: Calibration) -> None:
    """Draw all trials that were run to the end, the frontier joined. ConfigError if it cannot be saved."""
    from matplotlib.figure import Figure

    bounds = result.bounds
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    complete = [trial for trial in result.trials if trial.complete]
    for method in sorted({trial.candidate.variant.method.name for trial in complete}):
        own = [trial for trial in complete if trial.candidate.variant.method.name == method]
        axes.scatter([trial.ttft_ms for trial in own], [trial.drop for trial in own], s=14, label=method)
    joined = frontier(result)
    axes.plot([trial.ttft_ms for trial in joined], [trial.drop for trial in joined], linewidth=0.8, alpha=0.6)
    axes.axhline(bounds.main.value, linestyle="--", linewidth=0.8, color="gray", label=f"bound {bounds.main}")
    axes.axvline(result.dense_ttft_ms, linestyle=":", linewidth=0.8, color="gray", label="TTFT of dense")
    axes.set(xlabel="TTFT in ms, mean", ylabel=f"drop of {score_name(result)}, in {bounds.main.unit}")
    axes.legend(fontsize=8)
    axes.set_title(f"{result.config.model}: {result.searched:,} rows searched on", fontsize=9)
    axes.grid(alpha=0.3)
    save_figure(figure, path)
