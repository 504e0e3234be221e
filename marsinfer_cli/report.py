"""`marsinfer report`: what outputs hold, as tables in the terminal or as a page."""

from __future__ import annotations

from pathlib import Path

from marsinfer_cli.signature import takes
from pipeline.settings.console_settings import ReportSwitches


@takes(ReportSwitches)
def report(switches: ReportSwitches) -> None:
    """Report on one output of batch or more: times, shares by layer, errors; two of them row by row."""
    from pipeline.report.output_reading import opened
    from pipeline.report.page import check_page, write_page

    outputs, row, html = list(switches.outputs), switches.row, switches.html
    if html is not None:
        check_page(html, outputs)
        if row is None:
            from pipeline.report.svg import check_plotting

            check_plotting()
    with opened(outputs) as runs:
        page = _row(runs, row, html) if row is not None else _report(runs, html)
    if html is None or page is None:
        return
    write_page(html, page)
    if switches.open:
        import webbrowser

        webbrowser.open(Path(html).resolve().as_uri())


def _report(runs: list, html: str | None) -> str | None:
    from pipeline.report.reporting import make_report, report_page

    made = make_report(runs)
    if html is not None:
        return report_page(made)
    from marsinfer_cli.report_tables import print_report

    print_report(made)
    return None


def _row(runs: list, row: str, html: str | None) -> str | None:
    from pipeline.report.pruning_map import find_row, map_page

    (run,) = runs
    found = find_row(run, row)
    if html is not None:
        return map_page(run, found)
    from marsinfer_cli.report_tables import print_row

    print_row(found)
    return None
