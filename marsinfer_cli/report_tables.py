"""A report in the terminal."""

from __future__ import annotations

from itertools import groupby

import numpy as np

from marsinfer_cli.console import Console, result_console
from pipeline.report.compare import Comparison
from pipeline.report.figures import Figures
from pipeline.report.page import cut
from pipeline.report.pruning_map import UNPRUNED, PruningMap, layer_rows
from pipeline.report.reporting import Report, about_rows, comparison_figures, headline_rows, phase_rows
from pipeline.report.rows_shown import pair_facts
from pipeline.texts.words import counted, percent_of

FEW_PAIRS = 5
LONGEST_ANSWER = 200  # characters


def print_report(report: Report) -> None:
    console = result_console()
    labels = [figures.run.label for figures in report.runs]
    console.plain(report.conclusion.sentence, style="bold")
    if report.conclusion.basis:
        console.plain(report.conclusion.basis)
    about = "; ".join(f"{name} {value}" for name, value in about_rows(report.runs))
    if about:
        console.plain(about)
    for figures in report.runs:
        for note in figures.run.notes:
            console.plain(f"{figures.run.label}: {note}")
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
    console, facts = result_console(), pruning.facts
    console.plain(f"row {facts['row']}, {facts['id']}, {facts['method']}, {facts['prompt_tokens']:,} tokens")
    console.plain(f"question: {pruning.question_text.strip()}")
    console.plain(f"answer: {facts['answer']}")
    if not pruning.is_pruned:
        console.plain(UNPRUNED)
    if pruning.always_kept:
        ranges = ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in pruning.always_kept)
        console.plain(f"always kept by the method's settings: tokens {ranges}")
    heads = ["layers", "FFN in full", "in fp8", "skipped", "had left"]
    _print_table(console, "Tokens by layer", heads, [(name, counts) for name, *counts in layer_rows(pruning)])


def _layer_rows(runs: tuple[Figures, ...]) -> list[tuple[str, list[str]]]:
    """Of each layer its shares; layers that look the same are one row."""
    depth = max((run.layers.layers for run in runs if run.layers is not None), default=0)
    rows: list[tuple[str, list[str]]] = []
    columns = [column for run in runs for column in _layer_columns(run, depth)]
    for shares, equal in groupby(range(depth), key=lambda layer: [column[layer] for column in columns]):
        first, *others = equal
        rows.append((f"{first}-{others[-1]}" if others else str(first), shares))
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
            console.plain(f"{figures.run.label}: {counted(error.count, 'row')} {kind}, first:", style="bold")
            for row, id, message in error.first:
                console.plain(f"  row {row}, {id}: {cut(message, LONGEST_ANSWER)}")


def _print_comparison(console: Console, comparison: Comparison, labels: list[str]) -> None:
    rows = [(name, [value]) for name, value in comparison_figures(comparison)]
    if comparison.other_input:
        rows.append(("with another text or question", [f"{comparison.other_input:,}"]))
    title = f"{labels[0]} (first) and {labels[1]} (second), joined by {comparison.joined_by}"
    _print_table(console, title, ["", "rows"], rows)
    if comparison.most:
        console.plain(f"Rows that disagree most, by {comparison.measure}", style="bold")
    for pair in comparison.most[:FEW_PAIRS]:
        console.plain(f"{pair.first['id']}: {pair_facts(pair)}")
        for name, text in (("question", pair.question), ("reference", " / ".join(pair.references))):
            if text:
                console.plain(f"  {name}: {_in_a_line(text)}")
        for label, facts in zip(labels, (pair.first, pair.second), strict=True):
            said = (
                facts["answer"]
                if facts["status"] == "ok"
                else f"{facts['error_type']}: {facts['error_message']}"
            )
            console.plain(f"  {label}: {_in_a_line(said or '')}")
    if comparison.differing < comparison.joined:
        same = comparison.joined - comparison.differing
        console.plain(f"{counted(same, 'row')} with the same answer in both, or an error in both, left out")


def _in_a_line(text: str) -> str:
    return cut(" ".join(text.split()), LONGEST_ANSWER)


def _print_table(console: Console, title: str, heads: list[str], rows: list[tuple[str, list[str]]]) -> None:
    console.table(heads, [[name, *values] for name, values in rows], title=title)
