"""`marsinfer check`: settings to the pipeline, the result to tables, files and an exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from marsinfer_cli.signature import takes
from pipeline.settings.check_settings import CheckConfig
from pipeline.settings.console_settings import CheckSwitches

if TYPE_CHECKING:
    from pipeline.checks.gates import CheckResult
    from pipeline.tally import Tally


@takes(CheckConfig, CheckSwitches)
def check(config: CheckConfig, switches: CheckSwitches) -> int | None:
    """Fail where a method is less accurate than dense, on the same rows, by more than --max-drop.

    Exits with 0 where all of the drop's 95% interval, over documents, is within the bound, with 5 where none
    of it is, and with 6 where these documents cannot tell. With --scope rows these rows alone count: exits
    with 5 where the method scores less than when its scores were accepted, by more than the bound. Dense runs
    in the model's --dtype; --linear-dtype is the method's.
    """
    from pipeline.checks import reports

    result = _run(config, quiet=switches.quiet)
    reports.raise_verdict(result)
    return None if config.out == "-" else 0


def _run(config: CheckConfig, *, quiet: bool) -> CheckResult:
    """Check, and print the result."""
    from marsinfer_cli.progress import BatchProgress
    from pipeline.checks.checking import run_check
    from pipeline.errors import KEPT, NOTHING_KEPT
    from pipeline.interrupts import graceful_stop

    finished = False

    def hear(tally: Tally) -> None:
        nonlocal finished
        finished = True
        progress(tally)

    def kept() -> str:
        if config.result_file is None:
            return "nothing is kept without --out FILE"
        return KEPT if finished or config.resume else NOTHING_KEPT

    with graceful_stop(kept) as stop:  # until the result is printed, as a signal then changes nothing
        with BatchProgress(quiet=quiet, noun="prefills") as progress:
            result = run_check(config, progress=hear, note=progress.note, check=stop)
        _print(result)
    return result


def _print(result: CheckResult) -> None:
    from marsinfer_cli.console import result_console
    from pipeline.checks import reports

    config, console = result.config, result_console()
    if config.out == "-":
        print(json.dumps(reports.as_dict(result)), flush=True)
        return
    title = f"{config.gate_metric}, at most {config.bound} below {result.against}"
    console.table(reports.heads(result), reports.table_rows(result), title=title, words=(0, 7))
    console.table(["all rows", "dense", result.method], reports.measure_rows(result))
    console.plain(reports.counts_text(result))
    console.plain(reports.speed_text(result))
    if result.verdict == "pass":  # any other is the error that ends the command
        console.plain(f"pass: {reports.verdict_text(result)}")
