"""What a person sees while a batch runs and when it ends. All of it goes to stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.summary import Summary

PLAIN_EVERY_S = 10.0


def note(text: str) -> None:
    Console(stderr=True).print(f"marsinfer: note: {text}", markup=False, highlight=False, soft_wrap=True)


class BatchProgress:
    """A bar on a terminal, a plain line now and then elsewhere; called with the running summary."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self._last_line = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> BatchProgress:
        if self.console.is_terminal and not self.console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=self.console
            )
            self._bar.add_task("loading the model", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, summary: Summary) -> None:
        if self._bar is not None:
            # the bar counts tokens: documents differ too much in length for a fair estimate of time
            total = _expected_tokens(summary)
            task = self._bar.task_ids[0]
            self._bar.update(task, description=_line(summary), completed=summary.prompt_tokens, total=total)
        elif time.monotonic() - self._last_line >= PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            self.console.print(f"marsinfer: {_line(summary)}", markup=False, highlight=False, soft_wrap=True)


def print_summary(summary: Summary) -> None:
    """The closing table."""
    console = Console(stderr=True)
    console.print(f"{summary.method}: {summary.output}", markup=False, highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in _facts(summary):
        table.add_row(name, value)
    console.print(table)


def _facts(summary: Summary) -> list[tuple[str, str]]:
    facts = [("documents", f"{summary.documents:,}"), ("errors", f"{summary.status['error']:,}")]
    facts += [(f"  {kind}", f"{count:,}") for kind, count in summary.errors.most_common()]
    if summary.status["skipped"]:
        facts.append(("skipped", f"{summary.status['skipped']:,}"))
    facts.append(("prompt tokens", f"{summary.prompt_tokens:,}"))
    facts.append(("tokens/s", f"{summary.tokens_per_second:,.0f}"))
    facts.append(("TTFT p50 / p95", f"{_ms(summary.ttft_ms(50))} / {_ms(summary.ttft_ms(95))}"))
    facts.append(("FFN work skipped", _percent(summary.ffn_skipped())))
    ratio = summary.flops_ratio()
    facts.append(("operations, of dense", _percent(ratio)))
    facts.append(("time", f"{summary.seconds:,.1f} s"))
    return facts


def _line(summary: Summary) -> str:
    rows = f"{summary.documents:,}"
    if summary.expected_rows:
        rows += f"/{summary.expected_rows:,.0f}"
    errors = f", {summary.status['error']:,} errors" if summary.status["error"] else ""
    tokens = f"{summary.prompt_tokens:,} tokens, {summary.tokens_per_second:,.0f} tokens/s"
    return f"{rows} documents, {tokens}{errors}"


def _expected_tokens(summary: Summary) -> float | None:
    if not summary.expected_rows or not summary.documents:
        return None
    return summary.prompt_tokens * summary.expected_rows / summary.documents


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
