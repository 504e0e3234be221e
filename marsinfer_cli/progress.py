"""What a person, or a program that reads logs, sees while a batch runs. All of it goes to stderr."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from marsinfer_cli.events import print_event
from pipeline.settings.run import BatchConfig
from pipeline.summary import Summary, Tally

PLAIN_EVERY_S = 10.0
HEARTBEAT_S = 55.0  # so that a watcher that allows a minute of silence sees none

LATE_ROWS = 1000  # whose TTFT stands in the line

NO_COUNTS = {"documents": 0, "tokens": 0, "errors": 0, "expected_rows": None, "tokens_per_second": None}


class BatchProgress:
    """A bar on a terminal, a plain line now and then elsewhere, or events. Call it with the tally so far."""

    def __init__(
        self,
        *,
        quiet: bool,
        as_json: bool = False,
        first_line_s: float = 0.0,
        noun: str = "documents",
    ) -> None:
        """Before `first_line_s` there is no line: what ends sooner needs none. `noun` is what is counted."""
        self.console = Console(stderr=True, quiet=quiet)
        self.as_json = as_json
        self._first_line_s = first_line_s
        self._noun = noun
        self._lock = threading.Lock()  # the heartbeat prints too
        self._began = time.monotonic()
        self._last_line = 0.0
        self._latest = "nothing has finished yet"
        self._latest_counts: dict[str, Any] = NO_COUNTS
        self._bar: Progress | None = None
        self._stopped = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> BatchProgress:
        self._last_line = time.monotonic() - PLAIN_EVERY_S + self._first_line_s
        if self.console.quiet:
            return self
        if self.console.is_terminal and not self.as_json:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=self.console
            )
            self._bar.add_task("starting", total=None)
            self._bar.start()
        else:
            self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._heart is not None:
            self._heart.join()
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, tally: Tally) -> None:
        if self.console.quiet:
            return
        # the heartbeat shows a copy: the tally changes under its hands
        line, counts = _line(tally, self._noun), _counts(tally)
        if self._bar is not None:
            # the bar counts tokens: documents differ too much in length for a fair estimate of time
            total = _expected_tokens(tally)
            task = self._bar.task_ids[0]
            self._bar.update(task, description=line, completed=tally.prompt_tokens, total=total)
            return
        with self._lock:
            self._latest, self._latest_counts = line, counts
            if time.monotonic() - self._last_line >= PLAIN_EVERY_S:
                self._print_progress(line)

    def start(self, config: BatchConfig) -> None:
        """Tell the run's settings; only a log of events says them unasked."""
        if self.as_json and not self.console.quiet:
            print_event("start", config=config.resolved())

    def note(self, text: str) -> None:
        if self.as_json:
            print_event("note", message=text)
            return
        console = Console(stderr=True)  # a note is said even when quiet
        console.print(f"marsinfer: note: {text}", markup=False, highlight=False, soft_wrap=True)

    def end(self, summary: Summary) -> None:
        """The closing table, or the last event."""
        if self.console.quiet:
            return
        if self.as_json:
            print_event("end", **summary.as_dict())
        else:
            print_summary(summary)

    def _beat(self) -> None:
        """Print when nothing was printed for a while, until stopped."""
        wait = HEARTBEAT_S
        while not self._stopped.wait(wait):
            with self._lock:
                wait = self._last_line + HEARTBEAT_S - time.monotonic()
                if wait <= 0:
                    minutes = (time.monotonic() - self._began) / 60
                    self._print_progress(f"still running after {minutes:,.1f} min; {self._latest}")
                    wait = HEARTBEAT_S

    def _print_progress(self, line: str) -> None:
        self._last_line = time.monotonic()
        if self.as_json:
            seconds = round(time.monotonic() - self._began, 1)
            print_event("progress", **self._latest_counts, seconds=seconds)
        else:
            self.console.print(f"marsinfer: {line}", markup=False, highlight=False, soft_wrap=True)


def _counts(tally: Tally) -> dict[str, Any]:
    expected = tally.expected_rows
    return {
        "documents": tally.documents,
        "tokens": tally.prompt_tokens,
        "errors": tally.status["error"],
        "expected_rows": None if expected is None else round(expected),
        "tokens_per_second": round(tally.tokens_per_second, 1),
        **_worker_counts(tally),
    }


def _worker_counts(tally: Tally) -> dict[str, Any]:
    if not isinstance(tally, Summary) or tally.workers is None:
        return {}
    return {"workers": tally.workers, "ttft_ms_p50": tally.ttft_ms(50, latest=LATE_ROWS)}


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
    if summary.grouped_rows:
        facts.append(("rows that shared a document", f"{summary.grouped_rows:,}"))
        facts.append(("  its prefill, all together", f"{summary.times.shared_s:,.1f} s"))
    facts.append(("FFN work skipped", _percent(summary.ffn_skipped())))
    ratio = summary.flops_ratio()
    facts.append(("operations, of dense", _percent(ratio)))
    facts.append(("time", f"{summary.seconds:,.1f} s"))
    facts.append(("  a row", _ms(summary.ms_per_row())))
    facts.append(("  from the first pack to the last", f"{summary.times.span_s:,.1f} s"))
    facts.append(("  warming up", f"{summary.times.warm_up_s:,.1f} s"))
    return facts


def _line(tally: Tally, noun: str) -> str:
    rows = f"{tally.documents:,}"
    if tally.expected_rows:
        rows += f"/{tally.expected_rows:,.0f}"
    errors = f", {tally.status['error']:,} errors" if tally.status["error"] else ""
    tokens = f"{tally.prompt_tokens:,} tokens, {tally.tokens_per_second:,.0f} tokens/s"
    return f"{rows} {noun}, {tokens}{errors}{_several(tally)}"


def _several(tally: Tally) -> str:
    """Of a run with workers, how many they are and their TTFT of late."""
    if not isinstance(tally, Summary) or tally.workers is None:
        return ""
    workers = f"{tally.workers:,} worker{'' if tally.workers == 1 else 's'}"
    return f", {workers}, TTFT p50 {_ms(tally.ttft_ms(50, latest=LATE_ROWS))}"


def _expected_tokens(tally: Tally) -> float | None:
    if not tally.expected_rows or not tally.documents:
        return None
    return tally.prompt_tokens * tally.expected_rows / tally.documents


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
