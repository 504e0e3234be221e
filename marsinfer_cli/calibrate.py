"""`marsinfer calibrate`: flags to configuration, the result to a table, a plot, and an exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from marsinfer_cli import options
from marsinfer_cli.options import ANSWERS, FILES, READING, SUITES

if TYPE_CHECKING:
    from pipeline.quality.calibrate_config import CalibrateConfig
    from pipeline.quality.calibration import Calibration

SOUGHT = "What is sought"


def calibrate(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA", help="Files, globs, folders or URLs, as of batch; without, give --suite."
        ),
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="The profile, a TOML file.", rich_help_panel=FILES)
    ] = "profile.toml",
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Drop against TTFT as .png, .svg or .pdf.",
            show_default="none",
            rich_help_panel=FILES,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a profile that exists.", rich_help_panel=FILES)
    ] = False,
    max_drop: Annotated[
        str,
        typer.Option(
            metavar="Npt|N%",
            help="Largest drop below dense: 1pt is 0.01 of the score, 1% a hundredth of dense's.",
            rich_help_panel=SOUGHT,
        ),
    ] = "1%",
    needle_drop: Annotated[
        str,
        typer.Option(
            metavar="Npt|N%",
            help="With --needles: largest drop of the share of each kind that is found.",
            rich_help_panel=SOUGHT,
        ),
    ] = "2pt",
    objective: Annotated[
        str, typer.Option(help="What is to be least: ttft.", rich_help_panel=SOUGHT)
    ] = "ttft",
    minutes: Annotated[
        float, typer.Option(help="Longest time in all; more time, more rows.", rich_help_panel=SOUGHT)
    ] = 10.0,
    mass: Annotated[
        float,
        typer.Option(
            help="Attention mass; what each layer makes of tokens outside it is probed.",
            rich_help_panel=SOUGHT,
        ),
    ] = 0.9,
    accept_inconclusive: Annotated[
        bool,
        typer.Option(
            "--accept-inconclusive",
            help="Also take settings whose measured drop is within the bound, but not all of its interval.",
            rich_help_panel=SOUGHT,
        ),
    ] = False,
    text_column: options.TextColumn = "text",
    question_column: options.QuestionColumn = None,
    question: options.Question = None,
    id_column: options.IdColumn = None,
    reference_column: options.ReferenceColumn = None,
    task_column: options.TaskColumn = None,
    limit: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="First N rows of DATA, and of each suite, tasks in turn.",
            rich_help_panel=READING,
        ),
    ] = 500,
    document_shard: options.DocumentShard = None,
    seed: Annotated[
        int,
        typer.Option(help="Seed of the parting into rows to search and verify on.", rich_help_panel=READING),
    ] = 0,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:DIR]",
            help="leval:DIR or longbench:DIR; repeatable.",
            show_default="none",
            rich_help_panel=SUITES,
        ),
    ] = None,
    needles: Annotated[
        bool,
        typer.Option(
            "--needles",
            help="Hide needles in DATA's documents, without DATA in the suites'; none may be lost.",
            rich_help_panel=SUITES,
        ),
    ] = False,
    needle_kinds: options.NeedleKinds = None,
    needle_lengths: options.NeedleLengths = None,
    needle_count: options.NeedleCount = 20,
    tasks: options.Tasks = None,
    system: options.System = None,
    prompt_template: options.PromptTemplate = None,
    model: options.Model = "smollm2-135m",
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Longest answer, and longest part of a reference, in tokens.", rich_help_panel=ANSWERS
        ),
    ] = 32,
    quiet: options.Quiet = False,
) -> None:
    """Find the fastest settings for a model on documents that lose no more than --max-drop.

    What each layer makes of unimportant tokens is probed, all methods are searched, and what is found is
    verified on documents that were not searched on. Exits with 5, and writes no profile, if nothing holds.
    """
    from pipeline.bench.plot import check_plot
    from pipeline.quality.calibrate_config import CalibrateConfig
    from pipeline.quality.calibration_report import raise_unless_held

    if plot is not None:
        check_plot(plot)
    config = CalibrateConfig(
        out=out,
        input=tuple(inputs or ()),
        text_column=text_column,
        question_column=question_column,
        question=question,
        id_column=id_column,
        reference_column=reference_column,
        task_column=task_column,
        **options.suite_settings(suite, tasks, needle_kinds, needle_lengths, needle_count),
        needles=needles,
        document_shard=document_shard,
        limit=limit,
        seed=seed,
        system=system,
        prompt_template=prompt_template,
        model=model,
        revision=revision,
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
        max_drop=max_drop,
        needle_drop=needle_drop,
        objective=objective,
        accept_inconclusive=accept_inconclusive,
        mass=mass,
        max_new_tokens=max_new_tokens,
        minutes=minutes,
        overwrite=overwrite,
    )
    result = _run(config, quiet=quiet)
    _print(result)
    if plot is not None:
        from pipeline.quality.calibration_plot import save_frontier

        save_frontier(plot, result)
    raise_unless_held(result)


def _run(config: CalibrateConfig, *, quiet: bool) -> Calibration:
    from rich.console import Console

    from pipeline.interrupts import graceful_stop
    from pipeline.quality.calibrate import run_calibrate

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
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from pipeline.quality import calibration_report as report

    console = Console()
    if not console.is_terminal:  # a log has no width of its own, and 80 characters would cut the numbers
        console.width = max(console.width, 140)
    layers = Table(*(Column(head, justify="right") for head in report.layer_heads(result)))
    layers.title = "What sparing cold tokens at one layer costs and saves"
    for row in report.layer_rows(result):
        layers.add_row(*map(Text, row))
    table = Table(*(Column(head, justify="right" if n else "left") for n, head in enumerate(report.HEADS)))
    table.title = f"Frontier: {report.score_name(result)}, at most {result.config.max_drop} below dense"
    for row in report.frontier_rows(result):
        table.add_row(*map(Text, row))
    console.print(layers, table)
    for line in report.lines(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
