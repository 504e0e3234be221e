"""What a run has done so far, in a few numbers whose size does not grow with the rows."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from pipeline.records import Answer


@dataclass(kw_only=True)
class EngineTimes:
    """Where an engine's time went, in seconds; packs that failed and ran again are in none of them."""

    load_s: float = 0.0  # of the weights
    warm_up_s: float = 0.0
    packs: int = 0
    prefill_s: float = 0.0  # until the first tokens were known: TTFT, pack by pack
    shared_s: float = 0.0  # of prefill_s, documents that several rows shared
    decode_s: float = 0.0  # in steps, during which no prefill runs
    began: float | None = None  # the first pack, by time.perf_counter()
    ended: float | None = None  # the last first token or step

    def add_prefill(self, started: float, first_at: float) -> None:
        """Count a pack, from its start to its first tokens."""
        self.packs += 1
        self.prefill_s += first_at - started
        self.began, self.ended = self.began or started, first_at

    def add_decode(self, seconds: float, ended: float) -> None:
        """Count steps that have ended."""
        self.decode_s += seconds
        self.ended = max(self.ended or ended, ended)

    def add_shared(self, started: float, ended: float) -> None:
        """Count the prefill of what the rows of later packs share."""
        self.prefill_s += ended - started
        self.shared_s += ended - started
        self.began = self.began or started

    @classmethod
    def together(cls, several: Iterable[EngineTimes]) -> Self:
        """Of engines side by side: sums, but the longest load and warm-up, first start and last end."""
        all_times = list(several)
        return cls(
            load_s=max((each.load_s for each in all_times), default=0.0),
            warm_up_s=max((each.warm_up_s for each in all_times), default=0.0),
            packs=sum(each.packs for each in all_times),
            prefill_s=sum(each.prefill_s for each in all_times),
            shared_s=sum(each.shared_s for each in all_times),
            decode_s=sum(each.decode_s for each in all_times),
            began=min((each.began for each in all_times if each.began is not None), default=None),
            ended=max((each.ended for each in all_times if each.ended is not None), default=None),
        )

    def mirrored(self, now: float) -> Self:
        """With ages at `now` in place of times of a clock, or such times in place of ages.

        Clocks of two machines have nothing to do with each other; ages can be told.
        """
        began = None if self.began is None else now - self.began
        ended = None if self.ended is None else now - self.ended
        return replace(self, began=began, ended=ended)

    @property
    def span_s(self) -> float:
        """From the first pack's start to the last pack's end, what lies between packs included."""
        return 0.0 if self.began is None or self.ended is None else self.ended - self.began


class Tally:
    """Rows and prompt tokens so far, and the rows expected: what a run's progress is told from."""

    def __init__(self) -> None:
        self.status: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()  # by error_type, of error and skipped rows
        self.prompt_tokens = 0
        self.expected_rows: float | None = None
        self._read = 0
        self._started = time.perf_counter()
        self._ended: float | None = None

    @property
    def documents(self) -> int:
        return sum(self.status.values())

    @property
    def seconds(self) -> float:
        return (self._ended or time.perf_counter()) - self._started

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens of answered rows over the run's time, reading and decoding included."""
        return self.prompt_tokens / self.seconds if self.seconds else 0.0

    def count(self, status: str, error_type: str | None = None, prompt_tokens: int = 0) -> None:
        """Add a row; tokens count where it is `ok`, its kind of error where it is not."""
        self.status[status] += 1
        if status == "ok":
            self.prompt_tokens += prompt_tokens
        else:
            self.errors[str(error_type)] += 1

    def expect(
        self,
        newly_read: int,
        total_rows: int | None,
        fraction_read: float,
        at_most: int | None = None,
        *,
        passed_over: int = 0,
        done_before: int = 0,
    ) -> None:
        """Estimate how many rows the run will have, from what has been read so far.

        `total_rows`, `fraction_read` and `at_most` are of all rows that it takes from its input. Of them
        `passed_over` have been found to be done, of the `done_before` that an earlier run has finished.
        """
        self._read += newly_read
        if total_rows is None and at_most is None and not fraction_read:
            return  # a pipe does not tell how much is to come
        read = self._read + passed_over
        total = read / max(fraction_read, 1e-6) if total_rows is None else total_rows
        if at_most is not None:
            total = min(total, at_most)
        to_pass_over = min(max(done_before - passed_over, 0), max(total - read, 0))
        self.expected_rows = max(total - passed_over - to_pass_over, self._read)

    def finish(self) -> None:
        """Stop the clock; no more rows are expected than there were."""
        self._ended = time.perf_counter()
        self.expected_rows = self.documents


class Summary(Tally):
    """Running totals of a batch: rows by status, tokens, `seconds`, and what pruning saved."""

    def __init__(self, *, method: str, output: str) -> None:
        super().__init__()
        self.method, self.output = method, output
        self.new_tokens = 0
        self.grouped_rows = 0  # answered together with others about the same document
        self.times = EngineTimes()
        self.workers: int | None = None  # that are at work, of an engine that has several
        self._ttft_ms = array("f")  # four bytes a row
        self._ffn_work = 0.0  # tokens times the share that passed the FFN
        self._flops_work = 0.0

    def add(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            tokens = answer.prompt_tokens or 0
            self.count(answer.status, answer.error_type, tokens)
            if answer.status != "ok":
                continue
            self.new_tokens += answer.new_tokens or 0
            self.grouped_rows += answer.group_rows is not None
            self._ttft_ms.append(answer.ttft_ms or 0.0)
            self._ffn_work += tokens * (answer.ffn_ratio or 0.0)
            self._flops_work += tokens * (answer.flops_ratio or 0.0)

    def ttft_ms(self, percentile: float, latest: int = 0) -> float | None:
        """Percentile (0 to 100) of answered rows' TTFT in milliseconds, of all or of the `latest`.

        None without rows.
        """
        if not self._ttft_ms:
            return None
        return float(np.percentile(np.frombuffer(self._ttft_ms, np.float32)[-latest:], percentile))

    def ms_per_row(self) -> float | None:
        """The run's time, warming up left out, over its answered rows; None without rows."""
        answered = self.status["ok"]
        return (self.seconds - self.times.warm_up_s) * 1e3 / answered if answered else None

    def ffn_skipped(self) -> float | None:
        """Share of FFN work that was skipped, over the tokens of all answered rows."""
        return 1 - self._ffn_work / self.prompt_tokens if self.prompt_tokens else None

    def flops_ratio(self) -> float | None:
        """Prefill operations done over those of a dense prefill, weighted by tokens."""
        return self._flops_work / self.prompt_tokens if self.prompt_tokens else None

    def as_dict(self) -> dict[str, Any]:
        """The summary as `--json` prints it."""
        return {
            "output": self.output,
            "method": self.method,
            "documents": self.documents,
            "ok": self.status["ok"],
            "errors": self.status["error"],
            "skipped": self.status["skipped"],
            "error_types": dict(self.errors),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "workers": self.workers,
            "load_s": self.times.load_s,
            "warm_up_s": self.times.warm_up_s,
            "answering_s": self.times.span_s,
            "packs": self.times.packs,
            "prefill_s": self.times.prefill_s,
            "shared_prefill_s": self.times.shared_s,
            "grouped_rows": self.grouped_rows,
            "ms_per_row": self.ms_per_row(),
            "decode_s": self.times.decode_s,
            "prompt_tokens_per_second": self.tokens_per_second,
            "ttft_ms_p50": self.ttft_ms(50),
            "ttft_ms_p95": self.ttft_ms(95),
            "ffn_skipped": self.ffn_skipped(),
            "flops_ratio": self.flops_ratio(),
        }
