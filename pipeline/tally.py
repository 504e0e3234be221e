"""Rows counted as a run or a reading goes on, and how far it has come."""

from __future__ import annotations

import time
from collections import Counter
from copy import copy
from typing import TYPE_CHECKING

from pipeline.texts.words import counted

if TYPE_CHECKING:
    from pipeline.inputs.reading import Reading
    from pipeline.outputs.finished import FinishedRows

MOST_MESSAGES = 3  # kept of each kind of error


class Tally:
    """Rows and prompt tokens so far, and the rows expected: what a run's progress is told from."""

    def __init__(self, began: float | None = None) -> None:
        """`began` is when the run did, by time.perf_counter(); None: now."""
        self.status: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()  # by error_type, of error and skipped rows
        self.skips: Counter[str] = Counter()  # of them, those of skipped rows
        self.messages: dict[str, list[str]] = {}  # likewise, the first few
        self.prompt_tokens = 0
        self.expected_rows: float | None = None
        self._read = 0
        self._counting_from = time.perf_counter()
        self._began = self._counting_from if began is None else began
        self._ended: float | None = None

    def with_failures(self, kind: str, rows: int) -> Tally:
        """The same, where so many of its rows that are well fail by an error of this kind."""
        failing = copy(self)
        failing.status = self.status + Counter(error=rows)
        failing.status["ok"] -= rows
        failing.errors = self.errors + Counter({kind: rows})
        return failing

    @property
    def documents(self) -> int:
        return sum(self.status.values())

    @property
    def seconds(self) -> float:
        """All that has passed since the run began, loading and warming up included."""
        return (self._ended or time.perf_counter()) - self._began

    @property
    def working_s(self) -> float:
        """The part of `seconds` in which rows are read and answered."""
        return (self._ended or time.perf_counter()) - self._counting_from

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens of answered rows over the time of the work, reading and decoding included."""
        working_s = self.working_s
        return self.prompt_tokens / working_s if working_s > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """By the tokens of the rows so far and the rows expected; None where neither tells."""
        done, rate = self.documents, self.tokens_per_second
        if not self.expected_rows or not done or not rate:
            return None
        return max(0.0, self.expected_rows - done) * self.prompt_tokens / done / rate

    def count(
        self, status: str, error_type: str | None = None, prompt_tokens: int = 0, message: str | None = None
    ) -> None:
        """Add a row; tokens count where it is `ok`, its kind of error and its message where it is not."""
        self.status[status] += 1
        if status == "ok":
            self.prompt_tokens += prompt_tokens
        else:
            self.errors[str(error_type)] += 1
            self.skips[str(error_type)] += status == "skipped"
            messages = self.messages.setdefault(str(error_type), [])
            if len(messages) < MOST_MESSAGES:
                messages.append(message or "")

    @property
    def commonest_error(self) -> str | None:
        """Of rows that failed or were skipped: how many of which kind, and the first one's message."""
        return self._commonest(self.errors)

    def failures_told(self, failed: int, rows: int, other: str | None = None) -> str:
        """That so many of an output's rows failed, and what ails those of this run.

        `other` is what ails rows that count as read here, if there are any.
        """
        earlier = "all of them in earlier runs: --resume --retry-errors runs them again"
        ails = self._commonest(self.errors - self.skips) or other or earlier
        return f"{failed:,} of {counted(rows, 'row')} failed, which --fail-on-error does not allow; {ails}"

    def _commonest(self, errors: Counter[str]) -> str | None:
        if not errors:
            return None
        ((kind, count),) = errors.most_common(1)
        return f"{kind} ({counted(count, 'row')}): {self.first_messages[kind]}"

    @property
    def first_messages(self) -> dict[str, str]:
        """By error_type the first message, in one line."""
        return {kind: " ".join(messages[0].split()) for kind, messages in self.messages.items()}

    def expect(self, newly_read: int, rows: Reading, done: FinishedRows) -> None:
        """Estimate how many rows the run will have, from what has been read so far.

        `rows` are all that it takes from its input, and `done` those that an earlier run has finished, of
        which some have been found among them.
        """
        self._read += newly_read
        if rows.total is None and rows.most is None and not rows.fraction_read:
            return  # a pipe does not tell how much is to come
        read = self._read + done.passed_over
        total = read / max(rows.fraction_read, 1e-6) if rows.total is None else rows.total
        if rows.most is not None:
            total = min(total, rows.most)
        to_pass_over = min(max(done.done_at_start.total() - done.passed_over, 0), max(total - read, 0))
        self.expected_rows = max(total - done.passed_over - to_pass_over, self._read)

    def progress_line(self, noun: str = "rows", *, has_rate: bool = True) -> str:
        """How far the run is; `noun` is what is counted, `has_rate` says that a rate means something."""
        rows = f"{self.documents:,}"
        if self.expected_rows:
            rows += f"/{self.expected_rows:,.0f}"
        errors = f", {counted(self.status['error'], 'error')}" if self.status["error"] else ""
        rate = f", {self.tokens_per_second:,.0f} tokens/s" if has_rate else ""
        one = self.documents == 1 and not self.expected_rows
        of = noun.removesuffix("s") if one else noun
        return f"{rows} {of}, {counted(self.prompt_tokens, 'token')}{rate}{errors}"

    @property
    def has_ended(self) -> bool:
        return self._ended is not None

    def start_work(self) -> None:
        """From here on rows are read and answered: what came before is no part of `working_s`."""
        self._counting_from = time.perf_counter()

    def finish(self) -> None:
        """Stop the clock; no more rows are expected than there were."""
        self._ended = time.perf_counter()
        self.expected_rows = self.documents
