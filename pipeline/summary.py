"""What a run has done so far, in a few numbers whose size does not grow with the rows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.engines.clock import EngineTimes
from pipeline.pruning.operations import leave_nothing_out
from pipeline.records import Answer
from pipeline.setup.guard import FLAT, LENGTH, TASK, kind_of
from pipeline.tally import Tally
from pipeline.texts.shown import html_table
from pipeline.texts.words import amount, counted, duration, percent_of

LATE_ROWS = 1000  # whose TTFT stands in the line of progress
MANY_CUT = 0.1  # share of answers that ended by their length, above which it is worth a word


class Summary(Tally):
    """Running totals of a batch: rows by status, tokens, `seconds`, and what pruning saved.

    `print` shows it in a line, a notebook as the table that the command ends with, and `as_dict` gives the
    plain values of `--json`. Times are in milliseconds (`..._ms`) or seconds (`..._s`), shares from 0 to 1.
    """

    def __init__(
        self,
        *,
        method: str,
        output: str,
        kv_bytes_per_token: int = 0,
        began: float | None = None,
        price_per_hour: float | None = None,
    ) -> None:
        """`kv_bytes_per_token` are those of all layers, without pruning."""
        super().__init__(began)
        self.price_per_hour = price_per_hour
        self.method, self.output = method, output
        self.kv_bytes_per_token = kv_bytes_per_token
        self.new_tokens = 0
        self.draft_tokens, self.accepted_tokens = 0, 0  # that were looked up, and those of them in answers
        self.answers = 0
        self.ended_by_length = 0  # of them
        self.unanswered_rows = 0  # of which the model reasoned and came to no answer
        self.invalid_answers = 0  # under their JSON schemas
        self.redrawn_answers = 0  # that were not valid, and were drawn again
        self.unchanged_rows = 0  # of which the method left out nothing
        self.grouped_rows = 0  # answered together with others about the same document
        self.guarded: Counter[str] = Counter()  # rows that a guard had run dense, by the kind of its reason
        self.times = EngineTimes()
        self.workers: int | None = None  # that are at work, of an engine that has several
        self.kept_before = False  # whether earlier runs have left rows from which to go on
        self.in_output: Counter[str] = Counter()  # rows by status, those of earlier runs too; at the end
        self.left_rows = 0  # of earlier runs, that the input has no more
        self.returned_rows = 0  # that had left the output before, and were not answered again
        self.pages_without_text = 0  # of the PDF files that were read
        self.failed_before: str | None = None  # what ails such a row, where this run has no failed row
        self._ttft_ms = array("f")  # four bytes a row
        self._ffn_work = 0.0  # tokens times the share that passed the FFN
        self._flops_work = 0.0

    def __str__(self) -> str:
        rows = ", ".join(f"{count:,} {status}" for status, count in self.status.items() if count)
        parts = [
            f"{self.method}: {self.output}: {counted(self.documents, 'row')}{f' ({rows})' if rows else ''}",
            f"{counted(self.prompt_tokens, 'prompt token')}, {counted(self.new_tokens, 'new token')}",
            f"{self.seconds:,.1f} s",
            *self._of_guard(),
            *([] if self.commonest_error is None else [self.commonest_error]),
            *([] if self.cost is None else [f"cost {amount(self.cost)}"]),
        ]
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"<Summary {self}>"

    def _repr_html_(self) -> str:
        """What notebooks show: the closing table, and the first message of each kind of error."""
        errors = [(f"first {kind}", message) for kind, message in self.first_messages.items()]
        return html_table(f"{self.method}: {self.output}", [*self.facts(), *errors])

    def progress_line(self, noun: str = "rows", *, has_rate: bool = True) -> str:
        """As a tally's; of a run with workers, how many they are and their TTFT of late."""
        line = super().progress_line(noun, has_rate=has_rate)
        if self.workers is None:
            return line
        return (
            f"{line}, {counted(self.workers, 'worker')}, TTFT p50 {_ms(self.ttft_ms(50, latest=LATE_ROWS))}"
        )

    def facts(self) -> list[tuple[str, str]]:
        """The closing table: names and values in words."""
        facts = [("rows", f"{self.documents:,}"), ("errors", f"{self.status['error']:,}")]
        if self.in_output.total() != self.documents:
            facts.append(("rows of the output", f"{self.in_output.total():,}"))
            facts.append(("  of which errors", f"{self.in_output['error']:,}"))
        moved = {"left the output": self.left_rows, "came back": self.returned_rows}
        facts += [(f"rows that {what}", f"{count:,}") for what, count in moved.items() if count]
        facts += [(f"  {kind}", f"{count:,}") for kind, count in self.errors.most_common()]
        if self.pages_without_text:
            facts.append(("PDF pages without text", f"{self.pages_without_text:,}"))
        if self.status["skipped"]:
            facts.append(("skipped", f"{self.status['skipped']:,}"))
        facts.append(("prompt tokens", f"{self.prompt_tokens:,}"))
        facts.append(("tokens/s", f"{self.tokens_per_second:,.0f}"))
        facts.append(("TTFT p50 / p95", f"{_ms(self.ttft_ms(50))} / {_ms(self.ttft_ms(95))}"))
        if self.draft_tokens:
            accepted = f"{self.accepted_tokens:,} ({self.accepted_tokens / self.draft_tokens:.0%})"
            facts.append(("tokens looked up and accepted", f"{accepted} of {self.draft_tokens:,}"))
        if self.unanswered_rows:
            facts.append(("rows of reasoning without an answer", f"{self.unanswered_rows:,}"))
        if self.ended_by_length:
            facts.append(("answers that ended by length", f"{self.ended_by_length:,}"))
        if self.redrawn_answers:
            facts.append(("answers that were drawn again", f"{self.redrawn_answers:,}"))
        if self.invalid_answers:
            facts.append(("answers that are not valid", f"{self.invalid_answers:,}"))
        if self.grouped_rows:
            facts.append(("rows that shared a document", f"{self.grouped_rows:,}"))
            facts.append(("  its prefill, all together", f"{self.times.shared_s:,.1f} s"))
        if self.guarded:
            facts.append(("rows that the guard had run dense", f"{self.guarded.total():,}"))
            facts += [(f"  by {kind}", f"{count:,}") for kind, count in self.guarded.most_common()]
        if self.guarded[FLAT]:
            facts.append(("  second prefills, after flat attention", f"{self.times.again_s:,.1f} s"))
        facts.append(("FFN work skipped", percent_of(self.ffn_skipped())))
        facts.append(("operations, of dense", percent_of(self.flops_ratio())))
        facts.append(("time", f"{self.seconds:,.1f} s"))
        facts.append(("  loading the model", f"{self.times.load_s:,.1f} s"))
        facts.append(("  warming up", f"{self.times.warm_up_s:,.1f} s"))
        facts.append(("  from the first pack to the last", f"{self.times.span_s:,.1f} s"))
        facts.append(("  a row, without loading", _ms(self.ms_per_row())))
        if self.cost is not None:
            facts.append((f"cost, at {self.price_per_hour:g} an hour", amount(self.cost)))
        return facts

    def add(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            tokens = answer.prompt_tokens or 0
            self.count(answer.status, answer.error_type, tokens, answer.error_message)
            if answer.guard is not None:
                self.guarded[kind_of(answer.guard)] += 1
            if answer.status != "ok":
                continue
            self.new_tokens += answer.new_tokens or 0
            self.draft_tokens += answer.draft_tokens or 0
            self.accepted_tokens += answer.accepted_tokens or 0
            self.answers += len(answer.finish_reasons)
            self.ended_by_length += answer.finish_reasons.count("length")
            self.unanswered_rows += answer.is_unanswered
            self.invalid_answers += answer.valid is False
            self.redrawn_answers += (answer.tries or 1) - 1
            self.unchanged_rows += self._is_unchanged(answer)
            self.grouped_rows += answer.group_rows is not None
            self._ttft_ms.append(answer.ttft_ms or 0.0)
            self._ffn_work += tokens * (answer.ffn_ratio or 0.0)
            self._flops_work += tokens * (answer.flops_ratio or 0.0)

    def _of_guard(self) -> list[str]:
        """What a guard did and cost, in words; nothing where it had no row run dense."""
        if not self.guarded:
            return []
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.guarded.most_common())
        again = f"; prefilled again in {self.times.again_s:,.1f} s" if self.guarded[FLAT] else ""
        return [f"guard: {counted(self.guarded.total(), 'row')} dense ({kinds}{again})"]

    def _is_unchanged(self, answer: Answer) -> bool:
        """Whether the run's method, which is not dense, did with a row all that dense does."""
        if answer.method != self.method or self.method == "dense" or answer.skipped_ffn_ratio:
            return False
        whole = leave_nothing_out(answer.ffn_ratio or 0.0, answer.attention_ratio or 0.0)
        all_stored = (answer.kv_bytes or 0) >= self.kv_bytes_per_token * (answer.prompt_tokens or 0)
        # in fp8 throughout: the precision of the run, not what the method does
        in_fp8 = any(answer.ffn_fp8_tokens or ()) and answer.ffn_fp8_tokens != answer.ffn_tokens
        offloaded = bool(answer.kv_host_bytes)
        return whole and all_stored and not in_fp8 and not offloaded

    def remarks(self) -> list[str]:
        """What should be said at the end."""
        found, answered = [], self.status["ok"]
        if self.unchanged_rows:
            of = "all" if self.unchanged_rows == answered else f"{self.unchanged_rows:,} of"
            why = "they are too short for it"
            if self.unchanged_rows == answered:
                why += ", or its settings leave nothing out"
            found.append(f"{self.method} changed nothing on {of} {counted(answered, 'row')}: {why}")
        if self.unanswered_rows:
            found.append(
                f"no answer, or none from a part, in {self.unanswered_rows:,} of {counted(answered, 'row')}: "
                "the model reasoned until it had no tokens left; raise --max-new-tokens, or have it answer "
                "at once, if its chat template can (--template-arg enable_thinking=false)"
            )
        if self.ended_by_length > MANY_CUT * self.answers:
            found.append(
                f"{self.ended_by_length:,} of {counted(self.answers, 'answer')} ended by length, perhaps in "
                "mid-sentence: a larger --max-new-tokens lets them end by themselves"
            )
        return found

    def none_answered(self) -> str | None:
        """That the whole output holds rows and not one answer, and what ails them; None where it has any."""
        rows = sum(self.in_output.values())
        if not rows or self.in_output["ok"]:
            return None
        return f"none of {counted(rows, 'row')} was answered; {self.commonest_error or self.failed_before}"

    def ttft_ms(self, percentile: float, latest: int = 0) -> float | None:
        """Percentile (0 to 100) of answered rows' TTFT in milliseconds, of all or of the `latest`.

        None without rows.
        """
        if not self._ttft_ms:
            return None
        return float(np.percentile(np.frombuffer(self._ttft_ms, np.float32)[-latest:], percentile))

    @property
    def cost(self) -> float | None:
        """What `seconds` cost, in the currency of the price of an hour; None without one."""
        return None if self.price_per_hour is None else self.seconds / 3600 * self.price_per_hour

    def done_so_far(self) -> str:
        """Rows, time and cost, in words."""
        cost = "" if self.cost is None else f" for {amount(self.cost)}"
        return f"{counted(self.documents, 'row')} in {duration(self.seconds)}{cost}"

    @property
    def working_s(self) -> float:
        """The part of `seconds` in which rows are read and answered: loading and warming up are left out."""
        return max(0.0, super().working_s - self.times.load_s - self.times.warm_up_s)

    def ms_per_row(self) -> float | None:
        """The time of the work, loading and warming up left out, over answered rows; None without rows."""
        answered = self.status["ok"]
        return self.working_s * 1e3 / answered if answered else None

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
            "error_messages": self.first_messages,
            "in_output": {status: self.in_output[status] for status in ("ok", "error", "skipped")},
            "left_rows": self.left_rows,
            "returned_rows": self.returned_rows,
            "pages_without_text": self.pages_without_text,
            "ended_by_length": self.ended_by_length,
            "unanswered_rows": self.unanswered_rows,
            "invalid_answers": self.invalid_answers,
            "redrawn_answers": self.redrawn_answers,
            "unchanged_rows": self.unchanged_rows,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "draft_tokens": self.draft_tokens,
            "accepted_tokens": self.accepted_tokens,
            "seconds": self.seconds,
            "price_per_hour": self.price_per_hour,
            "cost": self.cost,
            "workers": self.workers,
            "load_s": self.times.load_s,
            "warm_up_s": self.times.warm_up_s,
            "answering_s": self.times.span_s,
            "packs": self.times.packs,
            "prefill_s": self.times.prefill_s,
            "shared_prefill_s": self.times.shared_s,
            "grouped_rows": self.grouped_rows,
            "guarded_by_task": self.guarded[TASK],
            "guarded_by_length": self.guarded[LENGTH],
            "guarded_by_attention": self.guarded[FLAT],
            "second_prefill_s": self.times.again_s,
            "ms_per_row": self.ms_per_row(),
            "decode_s": self.times.decode_s,
            "prompt_tokens_per_second": self.tokens_per_second,
            "ttft_ms_p50": self.ttft_ms(50),
            "ttft_ms_p95": self.ttft_ms(95),
            "ffn_skipped": self.ffn_skipped(),
            "flops_ratio": self.flops_ratio(),
        }


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms"
