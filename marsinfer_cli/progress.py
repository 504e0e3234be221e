"""What a person, or a program that reads logs, sees while a batch runs. All of it goes to stderr."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from marsinfer_cli.console import Console
from marsinfer_cli.events import note, print_event
from pipeline.settings.run_settings import BatchConfig
from pipeline.summary import LATE_ROWS, Summary
from pipeline.tally import Tally
from pipeline.texts.words import duration

PLAIN_EVERY_S = 10.0
HEARTBEAT_S = 55.0  # so that a watcher that allows a minute of silence sees none

NO_COUNTS: dict[str, Any] = {"documents": 0, "tokens": 0, "errors": 0}
NO_COUNTS |= dict.fromkeys(("expected_rows", "tokens_per_second", "seconds_left"))


class BatchProgress:
    """A bar on a terminal, a plain line now and then elsewhere, or events. Call it with the tally so far."""

    def __init__(
        self,
        *,
        quiet: bool,
        as_json: bool = False,
        first_line_s: float = 0.0,
        noun: str = "rows",
        has_rate: bool = True,
        began: float | None = None,
    ) -> None:
        """Before `first_line_s` there is no line: what ends sooner needs none. `noun` is what is counted.

        `has_rate` says that a rate and the time left mean something. `began` is when the work did, by
        time.perf_counter(); None: now.
        """
        self.console = Console(stderr=True, quiet=quiet)
        self.as_json = as_json
        self._first_line_s = first_line_s
        self._noun, self._has_rate = noun, has_rate
        self._lock = threading.Lock()  # the heartbeat prints too
        self._began = time.perf_counter() if began is None else began
        self._last_line = 0.0
        self._phase: str | None = None
        self._latest: str | None = None  # None: nothing has finished
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
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.add_task("starting", total=None)
            self._bar.start()
        else:
            self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._heart.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._heart is not None:
            self._heart.join()
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, tally: Tally) -> None:
        if self.console.quiet:
            return
        # the heartbeat shows a copy: the tally changes under its hands
        line, counts = tally.progress_line(self._noun, has_rate=self._has_rate), _counts(tally)
        if self._bar is not None:
            # the bar counts tokens: documents differ too much in length for a fair estimate of time
            total = _expected_tokens(tally)
            task = self._bar.task_ids[0]
            self._bar.update(task, description=line, completed=tally.prompt_tokens, total=total)
            return
        with self._lock:
            left = tally.seconds_left if self._has_rate else None
            self._latest = f"{line}, about {duration(left)} left" if left else line
            self._latest_counts = counts
            if time.monotonic() - self._last_line >= PLAIN_EVERY_S:
                self._print_progress(self._latest)

    def phase(self, text: str) -> None:
        """Hear what is being done, which is shown as long as nothing has finished."""
        self._phase = text
        if self._bar is not None and self._bar.tasks[0].total is None:
            self._bar.update(self._bar.task_ids[0], description=text)

    def start(self, config: BatchConfig) -> None:
        """Tell the run's settings; only a log of events says them unasked."""
        if self.as_json and not self.console.quiet:
            print_event("start", config=config.resolved())

    def note(self, text: str) -> None:
        note(text, in_events=self.as_json)  # even when quiet

    def end(self, summary: Summary) -> None:
        """The closing table, or the last event; what should be said of the run stands with it."""
        if self.console.quiet:
            return
        if not self.as_json and summary.documents:
            print_summary(summary)
        for text in summary.remarks():
            self.note(text)
        if self.as_json:
            print_event("end", **summary.as_dict())

    def _beat(self) -> None:
        """Print when nothing was printed for a while, until stopped."""
        wait = HEARTBEAT_S
        while not self._stopped.wait(wait):
            with self._lock:
                wait = self._last_line + HEARTBEAT_S - time.monotonic()
                if wait <= 0:
                    minutes = (time.perf_counter() - self._began) / 60
                    doing = "" if self._phase is None else f": {self._phase}"
                    state = self._latest or f"nothing has finished yet{doing}"
                    self._print_progress(f"still running after {minutes:,.1f} min; {state}")
                    wait = HEARTBEAT_S

    def _print_progress(self, line: str) -> None:
        self._last_line = time.monotonic()
        if self.as_json:
            seconds = round(time.perf_counter() - self._began, 1)
            print_event("progress", **self._latest_counts, seconds=seconds, phase=self._phase)
        else:
            self.console.plain(f"marsinfer: {line}")


def _counts(tally: Tally) -> dict[str, Any]:
    expected = tally.expected_rows
    return {
        "documents": tally.documents,
        "tokens": tally.prompt_tokens,
        "errors": tally.status["error"],
        "expected_rows": None if expected is None else round(expected),
        "tokens_per_second": round(tally.tokens_per_second, 1),
        "seconds_left": None if tally.seconds_left is None else round(tally.seconds_left, 1),
        **_worker_counts(tally),
    }


def _worker_counts(tally: Tally) -> dict[str, Any]:
    if not isinstance(tally, Summary) or tally.workers is None:
        return {}
    return {"workers": tally.workers, "ttft_ms_p50": tally.ttft_ms(50, latest=LATE_ROWS)}


def print_summary(summary: Summary) -> None:
    """The closing table."""
    console = Console(stderr=True)
    console.plain(f"{summary.method}: {summary.output}")
    table = Table(Column(style="bold"), Column(justify="right"), show_header=False)
    for name, value in summary.facts():
        table.add_row(name, value)
    console.print(table)
    for kind, message in summary.first_messages.items():
        console.plain(f"first {kind}: {message}")


def _expected_tokens(tally: Tally) -> float | None:
    if not tally.expected_rows or not tally.documents:
        return None
    return tally.prompt_tokens * tally.expected_rows / tally.documents
