"""`marsinfer check`: flags to configuration, the result to tables, files and an exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marsinfer_cli import completion, options
from marsinfer_cli.options import ANSWERS, FILES, METHOD, READING, RUN

if TYPE_CHECKING:
    from pipeline.quality.check import CheckResult
    from pipeline.quality.check_config import CheckConfig

GATE = "Gate"


def check(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA", help="Files, globs, folders or URLs, as of batch; without, give --suite."
        ),
    ] = None,
    text_column: options.TextColumn = "text",
    question_column: options.QuestionColumn = None,
    question: options.Question = None,
    id_column: options.IdColumn = None,
    reference_column: options.ReferenceColumn = None,
    task_column: Annotated[
        str | None,
        typer.Option(
            help="Column of a name to group rows by.", show_default="the file's name", rich_help_panel=READING
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="First N rows of DATA, and of each suite, tasks in turn.",
            show_default="all rows",
            rich_help_panel=READING,
        ),
    ] = None,
    limit_per_task: options.LimitPerTask = None,
    document_shard: options.DocumentShard = None,
    seed: Annotated[
        int,
        typer.Option(help="Seed of --limit-per-task, needles and the interval.", rich_help_panel=READING),
    ] = 0,
    suite: options.Suite = None,
    needle_kinds: options.NeedleKinds = None,
    needle_lengths: options.NeedleLengths = None,
    needle_count: options.NeedleCount = 20,
    tasks: options.Tasks = None,
    system: options.System = None,
    prompt_template: options.PromptTemplate = None,
    model: options.Model = "smollm2-135m",
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    linear_dtype: options.LinearDtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    attention_dtype: options.AttentionDtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="Name (see `marsinfer methods`) or FILE.py:Class.",
            autocompletion=completion.methods,
            show_default="marsinfer",
            rich_help_panel=METHOD,
        ),
    ] = None,
    set: options.Set = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Method, settings and precisions as calibrate found them, instead of flags.",
            show_default="none",
            rich_help_panel=METHOD,
        ),
    ] = None,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate",
            help="Also generate answers, and score them against the references.",
            rich_help_panel=ANSWERS,
        ),
    ] = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Longest answer, and longest part of a reference, in tokens.", rich_help_panel=ANSWERS
        ),
    ] = 128,
    metric: Annotated[
        str | None,
        typer.Option(
            help="token-accuracy: share of a reference's tokens that are predicted (the default with "
            "references); nll: nats a token; found: all tokens predicted (the default of needles alone); "
            "agreement: share of the tokens at which dense chooses the same (the default without "
            "references); with --generate score (each row's own), exact-match, token-f1, rouge-l, "
            "edit-similarity, choice. All are means over rows.",
            show_default="by the rows",
            rich_help_panel=GATE,
        ),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="Npt|N%",
            help="Largest drop below dense: 1pt is 0.01 of the score, 1% a hundredth of dense's; "
            "nll takes %, of its rise.",
            show_default="1pt, 1% for nll",
            rich_help_panel=GATE,
        ),
    ] = None,
    per_task: Annotated[
        bool,
        typer.Option(
            "--per-task", help="Each task is a gate of its own; the worst decides.", rich_help_panel=GATE
        ),
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Parquet file of dense's results: made if it is not there, else used instead of running.",
            show_default="none",
            rich_help_panel=FILES,
        ),
    ] = None,
    overwrite_baseline: Annotated[
        bool,
        typer.Option("--overwrite-baseline", help="Make the baseline anew.", rich_help_panel=FILES),
    ] = False,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Result as JSON; - prints it.",
            show_default="none",
            rich_help_panel=FILES,
        ),
    ] = None,
    junit: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Gates as JUnit XML.", show_default="none", rich_help_panel=FILES),
    ] = None,
    markdown: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Tables as Markdown, added to the end of FILE.",
            show_default="none",
            rich_help_panel=FILES,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a check that was stopped; its rows are beside --json FILE.",
            rich_help_panel=RUN,
        ),
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Fail where a method is less accurate than dense, on the same rows, by more than --max-drop.

    Exits with 0 where all of the drop's 95% interval, of a bootstrap over documents, is within the bound,
    with 5 where none of it is, and with 6 where more rows are needed to tell. Dense runs in the model's
    --dtype; --linear-dtype and --attention-dtype are the method's.
    """
    from pipeline.config import parse_settings
    from pipeline.quality.check_config import CheckConfig
    from pipeline.quality.reports import as_dict, raise_verdict

    config = CheckConfig(
        input=tuple(inputs or ()),
        text_column=text_column,
        question_column=question_column,
        question=question,
        id_column=id_column,
        reference_column=reference_column,
        task_column=task_column,
        **options.suite_settings(suite, tasks, needle_kinds, needle_lengths, needle_count),
        document_shard=document_shard,
        limit=limit,
        limit_per_task=limit_per_task,
        seed=seed,
        system=system,
        prompt_template=prompt_template,
        model=model,
        revision=revision,
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
        **_method(profile, method, parse_settings(set or ()), linear_dtype, attention_dtype),
        generate=generate,
        max_new_tokens=max_new_tokens,
        metric=metric,
        max_drop=max_drop,
        per_task=per_task,
        baseline=baseline,
        overwrite_baseline=overwrite_baseline,
        json=json_file,
        junit=junit,
        markdown=markdown,
        resume=resume,
    )
    result = _run(config, quiet=quiet)
    if json_file == "-":
        print(json.dumps(as_dict(result)))
    else:
        _print(result)
    raise_verdict(result)


def _method(
    profile: str | None, method: str | None, settings: dict[str, str], linear_dtype: str, attention_dtype: str
) -> dict[str, Any]:
    """What is held against dense, by flags or by a profile."""
    from pipeline.config_file import DEFAULT_METHOD
    from pipeline.errors import ConfigError
    from pipeline.profile import load_profile

    if profile is None:
        return {
            "method": method or str(DEFAULT_METHOD),
            "settings": settings,
            "linear_dtype": linear_dtype,
            "attention_dtype": attention_dtype,
        }
    if method or settings or linear_dtype != "auto" or attention_dtype != "auto":
        raise ConfigError("--profile says method, settings and precisions: leave their flags out")
    return {"profile": profile, **load_profile(profile).batch}


def _run(config: CheckConfig, *, quiet: bool) -> CheckResult:
    from marsinfer_cli.progress import BatchProgress
    from pipeline.interrupts import graceful_stop
    from pipeline.quality.check import run_check

    kept = "finished rows are kept, and --resume continues"
    if config.json in (None, "-"):
        kept = "nothing is kept without --json FILE"
    with BatchProgress(quiet=quiet, noun="prefills") as progress, graceful_stop(kept) as stop:
        return run_check(config, progress=progress, note=progress.note, check=stop)


def _print(result: CheckResult) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from pipeline.quality.reports import (
        HEADS,
        counts_text,
        measure_rows,
        speed_text,
        table_rows,
        verdict_text,
    )

    config = result.config
    console = Console()
    if not console.is_terminal:  # a log has no width of its own, and 80 characters would cut the numbers
        console.width = max(console.width, 120)
    heads = [result.method if head == "method" else head for head in HEADS]
    title = f"{config.gate_metric}, at most {config.bound_text} below dense"
    table = Table(*(Column(head, justify="right" if 0 < n < 6 else "left") for n, head in enumerate(heads)))
    table.title = title
    for row in table_rows(result):
        table.add_row(*map(Text, row))
    measures = Table("all rows", Column("dense", justify="right"), Column(result.method, justify="right"))
    for row in measure_rows(result):
        measures.add_row(*map(Text, row))
    console.print(table, measures)
    for line in (counts_text(result), speed_text(result)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if result.verdict == "pass":  # any other is the error that ends the command
        console.print(f"pass: {verdict_text(result)}", markup=False, highlight=False, soft_wrap=True)
