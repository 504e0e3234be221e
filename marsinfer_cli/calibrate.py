"""`marsinfer calibrate`: settings to the pipeline, the result to a table, a plot, and an exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from marsinfer_cli.signature import takes
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.settings.console_settings import CalibrateSwitches

if TYPE_CHECKING:
    from pipeline.calibrate.ladder import Calibration


@takes(CalibrateConfig, CalibrateSwitches)
def calibrate(config: CalibrateConfig, switches: CalibrateSwitches) -> int:
    """Find the fastest settings for a model on documents that lose no more than --max-drop.

    Some documents order a ladder of settings by expected loss. The others test it rung by rung, up to the
    first that is not shown to be within the bounds; the fastest before it is written. Exits with 5 if there
    is none, with 6 if there are too few documents for any.
    """
    from pipeline.bench.plot import check_plot
    from pipeline.calibrate.calibration_report import raise_unless_held

    if switches.plot is not None:
        check_plot(switches.plot)
    result = _run(config, quiet=switches.quiet)
    _print(result)
    if switches.plot is not None:
        from pipeline.calibrate.calibration_plot import save_ladder

        save_ladder(switches.plot, result)
    raise_unless_held(result)
    return 0


def _run(config: CalibrateConfig, *, quiet: bool) -> Calibration:
    from marsinfer_cli.console import Console
    from pipeline.calibrate.calibrating import run_calibrate
    from pipeline.interrupts import graceful_stop

    console = Console(stderr=True, quiet=quiet)

    def say(text: str) -> None:
        console.print(f"marsinfer: {text}", markup=False, highlight=False, soft_wrap=True)

    with graceful_stop("nothing is kept of a calibration that did not end") as stop:
        return run_calibrate(
            config,
            progress=lambda text, left_s: say(f"[{left_s:,.0f} s left] {text}"),
            note=lambda text: say(f"note: {text}"),
            check=stop,
        )


def _print(result: Calibration) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from marsinfer_cli.console import Console
    from pipeline.calibrate import calibration_report as report

    console = Console()
    if not console.is_terminal:  # a log has no width of its own, and 80 characters would cut the numbers
        console.width = max(console.width, 140)
    if result.probes:
        layers = Table(*(Column(head, justify="right") for head in report.layer_heads(result)))
        layers.title = "Divergence from dense where one layer alone is block-sparse, by mass"
        for row in report.layer_rows(result):
            layers.add_row(*map(Text, row))
        console.print(layers)
    if result.ladder:
        heads = enumerate(report.LADDER_HEADS)
        ladder = Table(*(Column(head, justify="right" if n else "left") for n, head in heads))
        ladder.title = f"Ladder: {result.bounds.main_name}, at most {result.bounds.main} below dense"
        for row in report.ladder_rows(result):
            ladder.add_row(*map(Text, row))
        console.print(ladder)
    for line in report.lines(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
