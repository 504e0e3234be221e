"""`marsinfer report`: what outputs hold, as tables in the terminal or as a page."""

from __future__ import annotations

import webbrowser
from functools import partial
from pathlib import Path

from marsinfer_cli.signature import takes
from pipeline.settings.console_settings import ReportSwitches


@takes(ReportSwitches)
def report(switches: ReportSwitches) -> None:
    """Report on one output of batch or more: times, shares by layer, errors; two of them row by row."""
    from marsinfer_cli.report_tables import print_report, print_row
    from pipeline.report.drawing import check_plotting
    from pipeline.report.output_reading import opened
    from pipeline.report.page import check_page, write_page
    from pipeline.report.pruning_map import find_row, map_page
    from pipeline.report.reporting import make_report, report_page

    row, html = switches.row, switches.html
    if html is not None:
        check_page(html, switches.outputs)
        if row is None:
            check_plotting("--html")
    with opened(switches.outputs) as runs:
        if row is None:
            made = make_report(runs)
            in_terminal, as_page = partial(print_report, made), partial(report_page, made)
        else:
            found = find_row(runs[0], row)
            in_terminal, as_page = partial(print_row, found), partial(map_page, runs[0], found)
        if html is None:
            in_terminal()
            return
        write_page(html, as_page())
    if switches.open:
        webbrowser.open(Path(html).resolve().as_uri())
