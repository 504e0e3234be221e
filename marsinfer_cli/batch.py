"""`marsinfer batch`: flags to configuration, configuration to the pipeline."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from marsinfer_cli import options
from marsinfer_cli.options import ANSWERS, PROMPTS, READING, RUN


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files, globs or folders of Parquet, JSONL (.gz, .zst), Arrow, or .txt/.md.",
        ),
    ],
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="A file: .parquet, .arrow, .arrows or .jsonl.")
    ],
    text_column: Annotated[
        str, typer.Option(help="Column of the document.", rich_help_panel=READING)
    ] = "text",
    question_column: Annotated[
        str | None, typer.Option(help="Column of the question.", rich_help_panel=READING)
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="One question for all rows.", rich_help_panel=READING)
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of the id; else file and row number.", rich_help_panel=READING)
    ] = None,
    keep_columns: Annotated[
        str | None,
        typer.Option(
            help="Columns to pass through, as name:type,name:type; else all.", rich_help_panel=READING
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", rich_help_panel=PROMPTS)] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Jinja prompt with {{ document }}, {{ question }}, {{ system }}; "
            "else the model's chat template.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    on_overlong: Annotated[
        str,
        typer.Option(
            help="What to do with a document over the context: error, skip, truncate-left, truncate-right, "
            "truncate-middle.",
            rich_help_panel=PROMPTS,
        ),
    ] = "error",
    model: options.Model = "smollm2-135m",
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    method: options.Method = "marsinfer",
    set: options.Set = None,
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
        list[str] | None, typer.Option(help="Text that ends an answer; repeatable.", rich_help_panel=ANSWERS)
    ] = None,
    pack_tokens: Annotated[
        str | None,
        typer.Option(
            help="Prompt tokens a pack, e.g. 32k; 1 runs one document at a time, for clean TTFT; "
            "default: from free memory.",
            rich_help_panel=RUN,
        ),
    ] = None,
    order: Annotated[
        str, typer.Option(help="Rows of the output: input (order) or completion.", rich_help_panel=RUN)
    ] = "input",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that exists.", rich_help_panel=RUN)
    ] = False,
    fail_on_error: Annotated[
        bool, typer.Option("--fail-on-error", help="Exit with 3 when a row failed.", rich_help_panel=RUN)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.", rich_help_panel=RUN)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress and no closing table.", rich_help_panel=RUN)
    ] = False,
) -> int:
    """Answer a question about every document of INPUT and write OUTPUT."""
    from marsinfer_cli.progress import BatchProgress, note, print_summary
    from pipeline.batch import run_batch
    from pipeline.config import parse_count, parse_settings

    with BatchProgress(quiet=quiet) as progress:
        summary = run_batch(
            inputs,
            output,
            text_column=text_column,
            question_column=question_column,
            question=question,
            id_column=id_column,
            keep_columns=keep_columns,
            system=system,
            prompt_template=prompt_template,
            on_overlong=on_overlong,
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            attention=attention,
            trust_remote_code=trust_remote_code,
            method=method,
            settings=parse_settings(set or []),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop or ()),
            pack_tokens=None if pack_tokens is None else parse_count("--pack-tokens", pack_tokens),
            order=order,
            overwrite=overwrite,
            progress=progress,
            note=note,
        )
    if as_json:
        print(json.dumps(summary.as_dict()))
    if not quiet:
        print_summary(summary)
    return 3 if fail_on_error and summary.status["error"] else 0
