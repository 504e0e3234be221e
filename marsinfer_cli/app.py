"""The `marsinfer` command: commands, exit codes, and errors as one line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import typer

from marsinfer_cli import own_place  # noqa: F401 - before what it looks after
from marsinfer_cli.batch import batch
from marsinfer_cli.bench import bench_app
from marsinfer_cli.calibrate import calibrate
from marsinfer_cli.check import check
from marsinfer_cli.doctor import doctor
from marsinfer_cli.events import complain, wants_events
from marsinfer_cli.examples import epilog
from marsinfer_cli.merging_command import merge
from marsinfer_cli.messages import best_effort, keep_descriptors
from marsinfer_cli.methods import methods
from marsinfer_cli.report import report
from marsinfer_cli.signature import Command
from pipeline.errors import MarsError
from pipeline.interrupts import SIGNALS, stop_remembered
from pipeline.texts.versions import version_of

# Typer brings its own copy of Click, and older ones use the package: its error base class is found by descent
ClickError: type[Any] = typer.BadParameter.__bases__[0].__bases__[0]
STOPPED = [128 + number for number in SIGNALS]

app = typer.Typer(
    name="marsinfer",
    help="Answer questions about long documents in bulk, with token-pruned prefill.",
    epilog=epilog("batch"),
    pretty_exceptions_enable=False,
)
ANSWERING, ACCURACY, MACHINE = "Answering", "Accuracy", "Methods and machine"
app.command(cls=Command, epilog=epilog("batch"), rich_help_panel=ANSWERING)(batch)
app.command(cls=Command, epilog=epilog("merge"), rich_help_panel=ANSWERING)(merge)
app.command(cls=Command, epilog=epilog("report"), rich_help_panel=ANSWERING)(report)
app.command(cls=Command, epilog=epilog("check"), rich_help_panel=ACCURACY)(check)
app.command(cls=Command, epilog=epilog("calibrate"), rich_help_panel=ACCURACY)(calibrate)
app.command(cls=Command, epilog=epilog("methods"), rich_help_panel=MACHINE)(methods)
app.command(cls=Command, epilog=epilog("doctor"), rich_help_panel=MACHINE)(doctor)
app.add_typer(bench_app, name="bench", rich_help_panel=MACHINE)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version_of("marsinfer"))
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with a code of the README's table."""
    # libraries' own bars would tear ours apart; tqdm reads this when it is imported
    os.environ.setdefault("TQDM_DISABLE", "1")
    keep_descriptors()
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code instead of leaving the process."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    told = partial(complain, in_events=wants_events(words))
    with best_effort() as out:
        code = _run(words, told)
        out.flush()
        if code is not None:
            return code
        if out.error is None or isinstance(out.error, BrokenPipeError):  # whoever read it has left
            return int(out.error is not None)
        return told(f"the result cannot be printed: {out.error.strerror or out.error}", 8)


def _run(words: list[str], told: Callable[[str, int], int]) -> int | None:
    """The exit code of a command's work; None for one whose work is what it prints."""
    try:
        with stop_remembered():
            result = app(args=words, prog_name="marsinfer", standalone_mode=False)
    except typer.Exit as exit:
        result = exit.exit_code or None
    except ClickError as error:
        return told(error.format_message(), 2)
    except MarsError as error:
        return told(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except SystemExit as stop:  # by a signal that came before the first row was answered
        result = stop.code
    if result in STOPPED:  # Typer itself turns Ctrl-C into 130, and says nothing
        lost = "no row of this run was answered" if words[:1] == ["batch"] else "nothing of this run is kept"
        return told(f"interrupted; {lost}", result)
    return result if isinstance(result, int) else None
