"""A picture of a calibration: what every rung of the ladder lost against its speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pipeline.calibration.ladder import Calibration


def draw_ladder(result: Calibration, axes: Axes) -> None:
    """The expected drop of all rungs, and the main gate's, with its interval, of those tested."""
    bounds = result.bounds
    axes.plot(
        [rung.speed_up for rung in result.ladder],
        [rung.expected_drop for rung in result.ladder],
        marker="o",
        linewidth=0.8,
        alpha=0.6,
        label="expected on the search side",
    )
    for tested in result.tested:
        for gate in tested.gates:
            if gate.gate != bounds.main_name:
                continue
            drop = gate.drop
            axes.errorbar(
                [tested.speed_up],
                [drop.drop],
                yerr=[[drop.drop - drop.low], [drop.high - drop.drop]],
                marker="s",
                capsize=3,
                label=f"{tested.rung.name}: {tested.verdict}",
            )
    axes.axhline(bounds.main.value, linestyle="--", linewidth=0.8, color="gray", label=f"bound {bounds.main}")
    axes.set(xlabel="times as fast as dense", ylabel=f"drop of {bounds.main_name}, in {bounds.main.unit}")
    axes.legend(fontsize=7)
