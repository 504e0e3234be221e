"""A report in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from marsinfer_cli.console import Console
from pipeline.report.figures import percent_of
from pipeline.report.page import cut
from pipeline.report.reporting import comparison_figures, headline_rows, pair_facts, phase_rows
from pipeline.texts.words import counted

if TYPE_CHECKING:
    from pipeline.report.compare import Comparison
    from pipeline.report.figures import Figures
    from pipeline.report.pruning_map import PruningMap
    from pipeline.report.reporting import Report

FEW_PAIRS = 5
LONGEST_ANSWER = 200  # characters
NOT_A_TERMINAL = 120  # columns: a log has no width of its own


def print_report(report: Report) -> None:
    console = _console()
    labels = [figures.run.label for figures in report.runs]
    for figures in report.runs:
        for note in figures.run.notes:
            _line(console, f"{figures.run.label}: {note}")
    _print_table(console, "Headline figures", ["", *labels], headline_rows(report.runs))
    heads = [word for label in labels for word in (f"{label} p50", "p95")]
    _print_table(console, "Time by phase", ["phase", *heads], phase_rows(report.runs))
    layers = _layer_rows(report.runs)
    if layers:
        heads = [word for label in labels for word in (f"{label} kept", "FFN", "of it fp8")]
        _print_table(console, "By layer, median over documents (fp8: mean)", ["layers", *heads], layers)
    _print_errors(console, report)
    if report.comparison is not None:
        _print_comparison(console, report.comparison, labels)


def print_row(pruning: PruningMap) -> None:
    """One row: question, answer, and what each layer did with the prompt's tokens."""
    from pipeline.report.pruning_map import layer_rows

    console, facts = _console(), pruning.facts
    _line(console, f"row {facts['row']}, {facts['id']}, {facts['method']}, {facts['prompt_tokens']:,} tokens")
    _line(console, f"question: {pruning.question_text.strip()}")
    _line(console, f"answer: {facts['answer']}")
    heads = ["layers", "FFN in full", "in fp8", "skipped", "had left"]
    _print_table(console, "Tokens by layer", heads, [(name, counts) for name, *counts in layer_rows(pruning)])


def _layer_rows(runs: tuple[Figures, ...]) -> list[tuple[str, list[str]]]:
    """Of each layer its shares; layers that look the same are one row."""
    depth = max((run.layers.layers for run in runs if run.layers is not None), default=0)
    rows: list[tuple[str, list[str]]] = []
    columns = [column for run in runs for column in _layer_columns(run, depth)]
    for layer in range(depth):
        told = [column[layer] for column in columns]
        if rows and rows[-1][1] == told:
            rows[-1] = (f"{rows[-1][0].partition('-')[0]}-{layer}", told)
        else:
            rows.append((str(layer), told))
    return rows


def _layer_columns(run: Figures, depth: int) -> list[list[str]]:
    if run.layers is None:
        return [["-"] * depth] * 3
    _, ffn, fp8 = run.layers.means()
    of_ffn = np.divide(fp8, ffn, out=np.zeros_like(fp8), where=ffn > 0)
    shares = [run.layers.quantile(0, 0.5), run.layers.quantile(1, 0.5), of_ffn]
    return [[*map(percent_of, share), *["-"] * (depth - len(share))] for share in shares]


def _print_errors(console: Console, report: Report) -> None:
    for figures in report.runs:
        for kind, error in figures.errors.items():
            _line(console, f"{figures.run.label}: {counted(error.count, 'row')} {kind}, first:", style="bold")
            for row, id, message in error.first:
                _line(console, f"  row {row}, {id}: {cut(message, LONGEST_ANSWER)}")


def _print_comparison(console: Console, comparison: Comparison, labels: list[str]) -> None:
    rows = [(name, [value]) for name, value in comparison_figures(comparison)]
    if comparison.other_input:
        rows.append(("with another text or question", [f"{comparison.other_input:,}"]))
    title = f"{labels[0]} (first) and {labels[1]} (second), joined by {comparison.joined_by}"
    _print_table(console, title, ["", "rows"], rows)
    if comparison.most:
        _line(console, f"Rows that disagree most, by {comparison.measure}", style="bold")
    for pair in comparison.most[:FEW_PAIRS]:
        _line(console, f"{pair.first['id']}: {pair_facts(pair)}")
        for label, facts in zip(labels, (pair.first, pair.second), strict=True):
            said = (
                facts["answer"]
                if facts["status"] == "ok"
                else f"{facts['error_type']}: {facts['error_message']}"
            )
            _line(console, f"  {label}: {cut(' '.join((said or '').split()), LONGEST_ANSWER)}")


def _print_table(console: Console, title: str, heads: list[str], rows: list[tuple[str, list[str]]]) -> None:
    columns = [Column(Text(head), justify="right" if n else "left") for n, head in enumerate(heads)]
    table = Table(*columns, title=Text(title))
    for name, values in rows:
        table.add_row(Text(name), *map(Text, values))
    console.print(table)


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, NOT_A_TERMINAL)
    return console


def _line(console: Console, text: str, style: str | None = None) -> None:
    """As it is: documents and answers may hold what looks like markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)
