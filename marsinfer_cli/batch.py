"""`marsinfer batch`: flags to configuration, configuration to the pipeline."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from marsinfer_cli import completion, options
from marsinfer_cli.options import ANSWERS, LOGS, METHOD, PROMPTS, READING, RUN, TRYING
from pipeline.config import GROUP, GUARD, ON_OVERLONG, ORDERS
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import BatchConfig
    from pipeline.summary import Summary


def batch(
    context: typer.Context,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Files, globs, folders or URLs of Parquet, JSONL (.gz, .zst), Arrow, or .txt/.md; "
            "- is JSONL from stdin.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Argument(
            metavar="OUTPUT", help="A file, or an s3:// or gs:// URL: .parquet, .arrow, .arrows or .jsonl."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="TOML file of settings, named as the flags; may hold input and output.",
            show_default="none",
            rich_help_panel=READING,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Method, settings and precisions as calibrate found them; all other places stand above.",
            show_default="none",
            rich_help_panel=METHOD,
        ),
    ] = None,
    text_column: options.TextColumn = "text",
    question_column: options.QuestionColumn = None,
    questions_column: Annotated[
        str | None,
        typer.Option(
            help="Column of a list of questions, each of which gets an answer row.",
            show_default="none",
            rich_help_panel=READING,
        ),
    ] = None,
    question: options.Question = None,
    id_column: options.IdColumn = None,
    task_column: options.TaskColumn = None,
    keep_columns: Annotated[
        str | None,
        typer.Option(
            help="Columns to pass through, as name:type,name:type.",
            show_default="all",
            rich_help_panel=READING,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Every N-th row, from the I-th on.",
            show_default="all rows",
            rich_help_panel=READING,
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="N rows drawn with --seed (of the shard).",
            show_default="all rows",
            rich_help_panel=READING,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="First N rows (of shard and sample).",
            show_default="all rows",
            rich_help_panel=READING,
        ),
    ] = None,
    system: options.System = None,
    prompt_template: options.PromptTemplate = None,
    on_overlong: Annotated[
        str,
        typer.Option(
            help="What to do with a document over the context: error, skip, split (answer in parts, then "
            "combine), truncate-left, truncate-right, truncate-middle.",
            autocompletion=completion.one_of(ON_OVERLONG),
            rich_help_panel=PROMPTS,
        ),
    ] = "error",
    split_overlap: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="With --on-overlong split: what a part shares with the one before.",
            rich_help_panel=PROMPTS,
        ),
    ] = 128,
    combine_template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With --on-overlong split: Jinja prompt that combines the answers of parts, which are its "
            "{{ document }}.",
            show_default="one of ours",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    model: options.Model = "smollm2-135m",
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    linear_dtype: options.LinearDtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    attention_dtype: options.AttentionDtype = "auto",
    rope_scaling: options.RopeScaling = None,
    trust_remote_code: options.TrustRemoteCode = False,
    method: options.Method = "marsinfer",
    set: options.Set = None,
    sparse_attention: options.SparseAttention = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer in tokens.", rich_help_panel=ANSWERS)
    ] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=ANSWERS)] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling's share of probability.", rich_help_panel=ANSWERS)
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Seed of the draws, with each row's number.", rich_help_panel=ANSWERS)
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that ends an answer; repeatable.", show_default="none", rich_help_panel=ANSWERS
        ),
    ] = None,
    engine: options.Engine = "local",
    ray_address: options.RayAddress = None,
    workers: options.Workers = "all",
    gpus_per_worker: options.GpusPerWorker = None,
    pack_tokens: Annotated[
        str | None,
        typer.Option(
            help="Prompt tokens a pack, e.g. 32k; 1 runs one document at a time, for clean TTFT.",
            show_default="from free memory",
            rich_help_panel=RUN,
        ),
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Rows that are decoded together, at most; a kill costs no more than these.",
            show_default="256 on a GPU, 16 on a CPU",
            rich_help_panel=RUN,
        ),
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Keys and values on the device, e.g. 4GiB; sliminfer offloads what exceeds it to the host.",
            show_default="no bound",
            rich_help_panel=RUN,
        ),
    ] = None,
    guard: Annotated[
        str,
        typer.Option(
            help="With --profile: auto (dense for rows that it does not speak for, by task, length or "
            "attention), off.",
            autocompletion=completion.one_of(GUARD),
            rich_help_panel=METHOD,
        ),
    ] = "auto",
    group: Annotated[
        str,
        typer.Option(
            help="Rows about the same document: auto (together, its K/V computed once, where that is "
            "cheaper), off.",
            autocompletion=completion.one_of(GROUP),
            rich_help_panel=RUN,
        ),
    ] = "auto",
    sort_by_document: Annotated[
        bool,
        typer.Option(
            "--sort-by-document",
            help="Read all rows first and put those about the same document together, on disk.",
            rich_help_panel=RUN,
        ),
    ] = False,
    order: Annotated[
        str,
        typer.Option(
            help="Rows of the output: input (order) or completion.",
            autocompletion=completion.one_of(ORDERS),
            rich_help_panel=RUN,
        ),
    ] = "input",
    save_selection: Annotated[
        bool,
        typer.Option(
            "--save-selection",
            help="Store which tokens each layer kept, with the prompt's text, for report --row.",
            rich_help_panel=RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that exists.", rich_help_panel=RUN)
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with an unfinished run or a published output.", rich_help_panel=RUN
        ),
    ] = False,
    retry_errors: Annotated[
        bool,
        typer.Option(
            "--retry-errors", help="With --resume: run rows that failed again.", rich_help_panel=RUN
        ),
    ] = False,
    max_errors: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%",
            help="Stop after more row errors than N, or than P% of the finished rows.",
            show_default="no bound",
            rich_help_panel=RUN,
        ),
    ] = None,
    row_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="A row that takes longer is an error; the rest of its pack runs again.",
            show_default="no bound",
            rich_help_panel=RUN,
        ),
    ] = None,
    fail_on_error: Annotated[
        bool, typer.Option("--fail-on-error", help="Exit with 3 when a row failed.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read and tokenize everything, print what the run would do; no weights, no output.",
            rich_help_panel=TRYING,
        ),
    ] = False,
    show_prompt: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Print the first N prompts; no weights, no output.",
            show_default="none",
            rich_help_panel=TRYING,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the summary (or dry run, prompts) as JSON on stdout.", rich_help_panel=LOGS
        ),
    ] = False,
    log_format: Annotated[
        str, typer.Option(help="Messages on stderr: text, or json (one event a line).", rich_help_panel=LOGS)
    ] = "text",
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            help="Print the settings as TOML for --config on stderr, and Ray's own messages.",
            rich_help_panel=LOGS,
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress and no closing table.", rich_help_panel=LOGS)
    ] = False,
) -> int:
    """Answer a question about every document of INPUT and write OUTPUT."""
    from marsinfer_cli.settings import resolve

    settings = resolve(context)
    _check(log_format=log_format, dry_run=dry_run, show_prompt=show_prompt)
    logging.getLogger("marsinfer").setLevel(logging.INFO if verbose else logging.NOTSET)
    if verbose and log_format == "text":
        _print_settings(settings)
    if dry_run:
        _print_dry_run(settings, as_json=as_json, quiet=quiet, log_format=log_format)
        return 0
    if show_prompt is not None:
        _print_prompts(settings, show_prompt, as_json=as_json)
        return 0
    summary = _run(settings, quiet=quiet, log_format=log_format)
    if as_json:
        print(json.dumps(summary.as_dict()))
    return 3 if fail_on_error and summary.status["error"] else 0


def _check(*, log_format: str, dry_run: bool, show_prompt: int | None) -> None:
    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format {log_format!r}: choose from text, json")
    if dry_run and show_prompt is not None:
        raise ConfigError("--dry-run and --show-prompt exclude each other: each prints on stdout")


def _run(settings: BatchConfig, *, quiet: bool, log_format: str) -> Summary:
    from marsinfer_cli.progress import BatchProgress
    from pipeline.batch import run_batch
    from pipeline.interrupts import graceful_stop

    # not asdict: it would copy values that a method of one's own may hold
    options = {field.name: getattr(settings, field.name) for field in fields(settings)}
    inputs, output = options.pop("input"), options.pop("output")
    with BatchProgress(quiet=quiet, as_json=log_format == "json") as progress, graceful_stop() as check:
        progress.start(settings)
        # Ray's own messages would come between our JSON
        with redirect_stdout(sys.stderr) if settings.engine == "ray" else nullcontext():
            summary = run_batch(inputs, output, **options, progress=progress, note=progress.note, check=check)
    progress.end(summary)
    return summary


def _print_settings(settings: BatchConfig) -> None:
    from pipeline.config_file import to_toml

    print(to_toml(settings), end="", file=sys.stderr)


def _print_dry_run(settings: BatchConfig, *, as_json: bool, quiet: bool, log_format: str) -> None:
    from marsinfer_cli.progress import PLAIN_EVERY_S, BatchProgress
    from pipeline.dryrun import dry_run

    in_events = log_format == "json"
    with BatchProgress(quiet=quiet, as_json=in_events, first_line_s=PLAIN_EVERY_S) as progress:
        report = dry_run(settings, progress)
    print(json.dumps(report.as_dict()) if as_json else report.as_text())


def _print_prompts(settings: BatchConfig, count: int, *, as_json: bool) -> None:
    from pipeline.dryrun import rendered_prompts

    for shown in rendered_prompts(settings, count):
        if as_json:
            print(json.dumps(shown))
        elif "error" in shown:
            print(f"--- row {shown['row']}, id {shown['id']}: no prompt: {shown['error']}")
        else:
            cut = f", {shown['truncated_tokens']:,} cut" if shown["truncated_tokens"] else ""
            part = f", part {shown['part']} of {shown['parts']}" if "part" in shown else ""
            counts = f"{shown['prompt_tokens']:,} tokens, document {shown['document_tokens']:,}{cut}"
            print(f"--- row {shown['row']}, id {shown['id']}{part}: {counts}")
            print(shown["prompt"])
