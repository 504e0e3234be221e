"""`marsinfer batch`: settings to the pipeline, and what is printed of the run."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING

from marsinfer_cli.signature import takes
from pipeline.errors import ConfigError, NoneAnswered, RowsFailed
from pipeline.interrupts import graceful_stop
from pipeline.settings.console_settings import BatchSwitches
from pipeline.settings.run_settings import BatchConfig
from pipeline.texts.shown import printable

if TYPE_CHECKING:
    from pipeline.summary import Summary


@takes(BatchConfig, BatchSwitches)
def batch(config: BatchConfig, switches: BatchSwitches) -> int | None:
    """Answer a question about every document of INPUT and write OUTPUT."""
    logging.getLogger("marsinfer").setLevel(logging.INFO if switches.verbose else logging.NOTSET)
    if switches.verbose and switches.log_format == "text":
        from pipeline.settings.sources import to_toml

        print(to_toml(config), end="", file=sys.stderr)
    if switches.dry_run:
        _dry_run(config, switches)
        return None
    if switches.show_prompt is not None:
        _print_prompts(config, switches.show_prompt, as_json=switches.as_json)
        return None
    if config.to_stdout and switches.as_json:
        raise ConfigError("--json prints the summary on stdout, where answers are with - as OUTPUT")
    with graceful_stop() as check:  # until all is said: once all is written, a signal changes nothing
        try:
            summary = _run(config, switches, check)
        except BrokenPipeError:
            if not config.to_stdout:
                raise
            return 1  # whoever read the answers has left, and wants to hear no more
        if switches.as_json:
            print(json.dumps(summary.as_dict()), flush=True)
    none_answered = summary.none_answered()
    if none_answered is not None:
        raise NoneAnswered(none_answered)
    failed = summary.in_output["error"]
    if switches.fail_on_error and failed:
        raise RowsFailed(summary.failures_told(failed, summary.in_output.total()))
    return 0


def _run(config: BatchConfig, switches: BatchSwitches, check: Callable[[], None]) -> Summary:
    from marsinfer_cli.progress import BatchProgress
    from pipeline.run import run_batch

    options = config.options_of(BatchConfig)
    inputs, output = options.pop("input"), options.pop("output")
    as_json = switches.log_format == "json"
    began = _process_began()
    shown = BatchProgress(quiet=switches.quiet, as_json=as_json, began=began)
    with shown as progress:
        progress.start(config)
        progress.phase("opening input and model")
        # messages of Ray, or of whatever else prints, would come between our JSON
        aside = config.engine == "ray" or config.to_stdout
        with redirect_stdout(sys.stderr) if aside else nullcontext():
            summary = run_batch(
                inputs,
                output,
                **options,
                progress=progress,
                note=progress.note,
                check=check,
                phase=progress.phase,
                began=began,
            )
    progress.end(summary)
    return summary


def _process_began() -> float:
    """When a user began to wait, by time.perf_counter(), from which all times of a run are told."""
    import psutil

    age_s = time.time() - psutil.Process().create_time()
    return time.perf_counter() - max(0.0, age_s)


def _dry_run(config: BatchConfig, switches: BatchSwitches) -> None:
    """Print what the run would do, and raise the error that it would end with."""
    from marsinfer_cli.progress import PLAIN_EVERY_S, BatchProgress
    from pipeline.dryrun import dry_run

    in_events = switches.log_format == "json"
    shown = BatchProgress(
        quiet=switches.quiet,
        as_json=in_events,
        first_line_s=PLAIN_EVERY_S,
        noun="rows read and tokenized",
        has_rate=False,
    )
    with shown as progress:
        progress.phase("reading and tokenizing")
        report = dry_run(config, progress)
    print(json.dumps(report.as_dict()) if switches.as_json else printable(report.as_text()))
    report.raise_outcome(fail_on_error=switches.fail_on_error)


def _print_prompts(config: BatchConfig, count: int, *, as_json: bool) -> None:
    from pipeline.setup.preparation import rendered_prompts

    for shown in rendered_prompts(config, count):
        if as_json:
            print(json.dumps(shown))
        elif "error" in shown:
            print(printable(f"--- row {shown['row']}, id {shown['id']}: no prompt: {shown['error']}"))
        else:
            cut = f", {shown['truncated_tokens']:,} cut" if shown["truncated_tokens"] else ""
            part = f", part {shown['part']} of {shown['parts']}" if "part" in shown else ""
            counts = f"{shown['prompt_tokens']:,} tokens, document {shown['document_tokens']:,}{cut}"
            print(printable(f"--- row {shown['row']}, id {shown['id']}{part}: {counts}"))
            print(printable(shown["prompt"]) if sys.stdout.isatty() else shown["prompt"])
