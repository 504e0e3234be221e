"""`marsinfer bench accuracy`: several methods against right answers, side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from marsinfer_cli.signature import takes
from marsinfer_cli.tables import conditions_of, print_accuracy_tables
from marsinfer_cli.variants import parse_variants
from pipeline.settings.bench_settings import AccuracyConfig, AgreementConfig
from pipeline.settings.console_settings import AccuracySwitches
from pipeline.texts.shown import printable


@takes(AccuracyConfig, AccuracySwitches)
def accuracy(config: AccuracyConfig, switches: AccuracySwitches) -> None:
    """Right tokens, needles found, shares kept and TTFT of many methods, each held against dense.

    Teacher-forced: one prefill and one short forward over the right answer, or without one over dense's own,
    each document alone. Drops are below dense, with their 95% intervals over documents.
    """
    _run(config, switches)


@takes(AgreementConfig, AccuracySwitches)
def agreement(config: AgreementConfig, switches: AccuracySwitches) -> None:
    """Now bench accuracy, which without --reference-column measures the agreement with dense."""
    _say(switches)("note: bench agreement is now bench accuracy; the next version does not know it any more")
    _run(config, switches)


def _run(config: AccuracyConfig, switches: AccuracySwitches) -> None:
    from pipeline.bench.plot import check_plot

    config.check_data()
    if switches.plot is not None:
        check_plot(switches.plot)
    conditions, results = _measure(config, _say(switches))
    if switches.plot is not None:
        from pipeline.bench.accuracy_plot import save_accuracy

        save_accuracy(switches.plot, f"{conditions['model']}, {conditions['device']}", results)
    if switches.as_json:
        print(json.dumps({**conditions, "results": [result.as_dict() for result in results]}))
    else:
        print_accuracy_tables(conditions, results, config.long_tokens)


def _say(switches: AccuracySwitches) -> Callable[[str], None]:
    if switches.quiet:
        return lambda text: None
    return lambda text: print(f"marsinfer: {printable(text)}", file=sys.stderr)


def _measure(config: AccuracyConfig, say: Callable[[str], None]) -> tuple[dict[str, Any], list[Any]]:
    from pipeline.bench.accuracy import measure_accuracy, read_cases
    from pipeline.interrupts import graceful_stop
    from pipeline.model.loading import open_model
    from pipeline.suites.by_name import NOT_COMPARABLE

    variants = [each for each in parse_variants(config.methods, None) if each.name != "dense"]
    model = open_model(config).load()
    results = []
    with graceful_stop("nothing is kept of a measurement that did not end") as stop:
        cases, left_out = read_cases(config, model, stop)
        for message in left_out:
            say(f"left out: {message}")
        for result in measure_accuracy(model, cases, variants, long_tokens=config.long_tokens, check=stop):
            say(f"{result.variant}: {result.groups[0].token_accuracy:.1%} of {len(cases):,} rows' tokens")
            results.append(result)
    tokens = sum(case.document.prompt_tokens for case in cases)
    held = "right answers" if config.has_references else "dense's own answers"
    conditions = {**conditions_of(model), "held against": held, "rows": len(cases), "prompt tokens": tokens}
    if config.suite:
        conditions["suites"] = NOT_COMPARABLE
    return conditions, results
