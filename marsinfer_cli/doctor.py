"""`marsinfer doctor`: what is installed and what works here, as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from marsinfer_cli.signature import takes
from pipeline.errors import MarsError
from pipeline.settings.console_settings import DoctorSwitches

if TYPE_CHECKING:
    from marsinfer_cli.console import Console
    from pipeline.doctor.examine import Examination
    from pipeline.doctor.findings import Finding, Probe

STYLES = {"ok": "green", "absent": "dim", "note": "yellow", "broken": "bold red"}
WORDS = {"ok": "ok", "absent": "-", "note": "note", "broken": "BROKEN"}


@takes(DoctorSwitches)
def doctor(switches: DoctorSwitches) -> None:
    """Say what is installed, what this machine can run and why not more, and test that it runs right.

    Exits with 1 if something is broken: a package that cannot be imported,
    or wrong results. What is not there, such as a GPU, is no fault. Takes
    some seconds, more on a GPU that has to compile its kernels first.
    """
    result = _run(quiet=switches.quiet)
    if switches.as_json:
        print(json.dumps(result.as_dict()))
    else:
        _print(result)
    if result.broken:
        names = ", ".join(f"{probe.name} ({probe.group})" for probe, _ in result.broken)
        raise MarsError(f"broken here: {names}; the report says how")


def _run(*, quiet: bool) -> Examination:
    from rich.markup import escape

    from marsinfer_cli.console import Console
    from pipeline.doctor.examine import examine

    console = Console(stderr=True, quiet=quiet)
    with console.status("starting") as status:
        return examine(progress=lambda probe: status.update(escape(f"{probe.group}: {probe.name}")))


def _print(result: Examination) -> None:
    from marsinfer_cli.console import Console

    console = Console()
    if console.is_terminal:
        _print_table(result, console)
    else:
        print("\n".join(_lines(result)))
    if not result.broken:
        console.print("\nNothing is broken.", style="green", highlight=False)


def _group(found: tuple[Probe, Finding]) -> str:
    return found[0].group


def _lines(result: Examination) -> Iterator[str]:
    """For a log, which has no width: each finding in one line, so that paths stay whole."""
    width = max((len(probe.name) for probe, _ in result.findings), default=0)
    statuses = max(map(len, WORDS.values()))
    for number, (group, findings) in enumerate(groupby(result.findings, key=_group)):
        yield f"\n{group}" if number else group
        for probe, finding in findings:
            yield f"  {probe.name:<{width}}  {WORDS[finding.status]:<{statuses}}  {finding.text}".rstrip()


def _print_table(result: Examination, console: Console) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    columns = Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold")
    table = Table(*columns, box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for number, (group, findings) in enumerate(groupby(result.findings, key=_group)):
        table.add_row(Text(f"\n{group}" if number else group, style="bold"))
        for probe, finding in findings:
            plain = "dim" if finding.status == "absent" else ""
            table.add_row(
                Text(f"  {probe.name}", style=plain),
                Text(WORDS[finding.status], style=STYLES[finding.status]),
                Text(finding.text, style=plain),
            )
    console.print(table)
