"""`marsinfer bench accuracy`: several methods against right answers, side by side."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marsinfer_cli import options
from marsinfer_cli.bench_inputs import parse_variants
from marsinfer_cli.options import ANSWERS, FILES, MEASURED, READING
from marsinfer_cli.tables import conditions_of, print_accuracy_tables

if TYPE_CHECKING:
    from pipeline.quality.check_config import CheckConfig

LONG_TOKENS = 24_000


def accuracy(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA", help="Files, globs or folders, as of check; without, give --suite."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated beside dense, with settings as in bench ttft; @FILE is a profile.",
            rich_help_panel=MEASURED,
        ),
    ] = "mars,marsinfer,sliminfer,uniprefill,fastkv,gemfilter",
    text_column: options.TextColumn = "text",
    question_column: options.QuestionColumn = None,
    reference_column: Annotated[
        str | None,
        typer.Option(help="Column of the right answer.", show_default="none", rich_help_panel=READING),
    ] = None,
    limit_per_task: options.LimitPerTask = None,
    document_shard: options.DocumentShard = None,
    seed: Annotated[
        int, typer.Option(help="Seed of --limit-per-task, needles and intervals.", rich_help_panel=READING)
    ] = 0,
    suite: options.Suite = None,
    tasks: options.Tasks = None,
    needle_kinds: options.NeedleKinds = None,
    needle_lengths: options.NeedleLengths = None,
    needle_count: options.NeedleCount = 20,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest part of a reference, in tokens.", rich_help_panel=ANSWERS)
    ] = 64,
    long_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Prompts of more tokens count for the TTFT that is told.", rich_help_panel=MEASURED
        ),
    ] = LONG_TOKENS,
    model: options.Model = "smollm2-135m",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Also draw drop against speed: .png, .svg or .pdf.",
            show_default="none",
            rich_help_panel=FILES,
        ),
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Right tokens, needles found, shares kept and TTFT of many methods, each held against dense.

    Teacher-forced: one prefill and one short forward over the right answer, each document alone. Drops are
    below dense, with the 95% interval of a bootstrap over documents.
    """
    from pipeline.bench.plot import check_plot
    from pipeline.quality.check_config import CheckConfig

    if plot is not None:
        check_plot(plot)
    variants = [variant for variant in parse_variants(methods, None) if variant.name != "dense"]
    config = CheckConfig(
        input=tuple(inputs or ()),
        text_column=text_column,
        question_column=question_column,
        reference_column=reference_column,
        limit_per_task=limit_per_task,
        document_shard=document_shard,
        seed=seed,
        **options.suite_settings(suite, tasks, needle_kinds, needle_lengths, needle_count),
        max_new_tokens=max_new_tokens,
        model=model,
        dtype=dtype,
        device=device,
        attention=attention,
        metric="token-accuracy",
    )
    conditions, results = _measure(config, variants, long_tokens, quiet=quiet)
    if plot is not None:
        from pipeline.quality.accuracy_plot import save_accuracy

        save_accuracy(plot, f"{conditions['model']}, {conditions['device']}", results)
    if as_json:
        print(json.dumps({**conditions, "results": [result.as_dict() for result in results]}))
    else:
        print_accuracy_tables(conditions, results, long_tokens)


def _measure(
    config: CheckConfig, variants: list[Any], long_tokens: int, *, quiet: bool
) -> tuple[dict[str, Any], list[Any]]:
    from pipeline.interrupts import graceful_stop
    from pipeline.model.loading import load_model
    from pipeline.quality.accuracy import measure_accuracy, read_cases

    model = load_model(config.model, dtype=config.dtype, device=config.device, attention=config.attention)
    cases, left_out = read_cases(config, model)
    say = (lambda text: None) if quiet else (lambda text: print(f"marsinfer: {text}", file=sys.stderr))
    for message in left_out:
        say(f"left out: {message}")
    results = []
    with graceful_stop("nothing is kept of a measurement that did not end") as stop:
        for result in measure_accuracy(
            model, cases, variants, long_tokens=long_tokens, seed=config.seed, check=stop
        ):
            say(f"{result.variant}: {result.groups[0].token_accuracy:.1%} of {len(cases):,} rows' tokens")
            results.append(result)
    tokens = sum(case.document.prompt_tokens for case in cases)
    return {**conditions_of(model), "rows": len(cases), "prompt tokens": tokens}, results
