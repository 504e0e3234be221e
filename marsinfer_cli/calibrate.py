"""`marsinfer calibrate`: settings to the pipeline, the result to a table, a plot, and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from marsinfer_cli.events import note, saying
from marsinfer_cli.signature import takes
from pipeline.interrupts import graceful_stop
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.settings.console_settings import CalibrateSwitches

if TYPE_CHECKING:
    from pipeline.calibration.ladder import Calibration


@takes(CalibrateConfig, CalibrateSwitches)
def calibrate(config: CalibrateConfig, switches: CalibrateSwitches) -> int:
    """Find the fastest settings for a model on documents that lose no more than --max-drop.

    Some documents order a ladder of settings by expected loss. The others test it rung by rung, up to the
    first that is not shown to be within the bounds; the fastest before it is written. Exits with 5 if there
    is none, with 6 if there are too few documents for any.
    """
    from pipeline.bench.plot import check_plot, save_picture
    from pipeline.calibration.calibration_report import raise_unless_held

    if switches.plot is not None:
        check_plot(switches.plot)
    with graceful_stop("nothing is kept of a calibration that did not end") as stop:
        result = _run(config, stop, quiet=switches.quiet)
        _print(result)  # as the profile is written, a signal changes nothing any more
        if switches.plot is not None:
            from pipeline.calibration.calibration_plot import draw_ladder

            title = f"{config.model}: {result.held_out:,} rows held out"
            save_picture(switches.plot, title, partial(draw_ladder, result))
    raise_unless_held(result)
    return 0


def _run(config: CalibrateConfig, stop: Callable[[], None], *, quiet: bool) -> Calibration:
    from pipeline.calibration.calibrating import run_calibrate

    say = saying(quiet=quiet)
    return run_calibrate(
        config,
        progress=lambda text, left_s: say(f"[{left_s:,.0f} s left] {text}"),
        note=note,
        check=stop,
    )


def _print(result: Calibration) -> None:
    from marsinfer_cli.console import result_console
    from pipeline.calibration import calibration_report as report

    console = result_console()
    if result.probes:
        title = "Divergence from dense where one layer alone is block-sparse, by mass"
        console.table(report.layer_heads(result), report.layer_rows(result), title=title, words=())
    if result.ladder:
        title = f"Ladder: {result.bounds.main_name}, at most {result.bounds.main} below dense"
        console.table(report.LADDER_HEADS, report.ladder_rows(result), title=title)
    for line in report.lines(result):
        console.plain(line)
