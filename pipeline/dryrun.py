"""A run without its model: every row is read and tokenized, and what the run would do is counted.

No weights are loaded, nothing is written but scratch files, and the memory that is held does not grow with
the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.bookkeeping import stop_if_broken
from pipeline.engines.group_packs import GroupPacker
from pipeline.engines.memory import Packer
from pipeline.errors import MarsError, NoneAnswered, RowsFailed, TooManyErrors
from pipeline.estimate import (
    TIMED,
    Estimate,
    Pace,
    PlannedPacks,
    estimate,
    estimate_by_pace,
    expected_flops,
    measure_rates,
    memory_needed,
    planning_packer,
)
from pipeline.outputs.answers import lacking_told
from pipeline.outputs.finished import FinishedRows
from pipeline.outputs.lock import refuse_locked
from pipeline.outputs.standing import done_rows, no_rows, refuse_unfinished
from pipeline.outputs.writing import check_output
from pipeline.prompts.splitting import SplitDocument
from pipeline.pruning.operations import dense_flops
from pipeline.records import EncodedDocument, RowError
from pipeline.run import read_windows
from pipeline.settings.moments import deadline_after, moment_told
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.intake import Item, item_prompts, open_rows
from pipeline.setup.leaving import Leaving
from pipeline.setup.preparation import Preparation, prepare
from pipeline.storage.remote import output_place
from pipeline.tally import Tally
from pipeline.texts.redaction import hidden
from pipeline.texts.words import amount, counted, duration, figures

SHOWN_SPLIT = 10
BAR_WIDTH = 40


@dataclass
class DryRunReport:
    """Counts of a dry run."""

    run: Preparation
    packer: Packer
    refusal: MarsError | None = None  # why the run could not write its output
    output_is_there: bool = False
    notes: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)  # rows of earlier runs by status, under --resume
    done_before: tuple[Counter[str], ...] = ()  # likewise as the run counts them: before, meanwhile, after
    left_rows: int = 0  # of earlier runs, that would leave the output
    returned_rows: int = 0  # that had left it, and would come back
    estimate: Estimate | None = None
    deadline: datetime | None = None
    pace: Pace = field(init=False)  # of the rows that are done
    tally: Tally = field(default_factory=Tally)
    lengths: Counter[int] = field(default_factory=Counter)  # by power of two: 2**n up to 2**(n+1) - 1
    longest_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    split_rows: int = 0
    parts: int = 0  # of all of these
    split: list[dict[str, Any]] = field(default_factory=list)  # the first few
    grouped_rows: int = 0  # answered together with others about the same document
    grouped_documents: int = 0
    planned: PlannedPacks = field(init=False)
    new_tokens: int = 0  # that all answers together may have
    flops: int = 0  # of a dense prefill of every prompt
    method_flops: int = 0  # of the run's, as far as its method says what it does

    def __post_init__(self) -> None:
        self.notes += self.run.notes
        memory = self.run.model.memory(self.run.precision)
        self.planned = PlannedPacks(weights_bytes=0 if memory is None else memory.held)
        self.pace = Pace(shape=self.packer.shape, n=self.packer.n)
        if self.config.deadline is not None:
            self.deadline = deadline_after(self.config.deadline, datetime.now(UTC))

    @property
    def config(self) -> BatchConfig:
        return self.run.config

    @property
    def prompts(self) -> int:
        """How many there are, parts of documents counted each."""
        return self.lengths.total()

    @property
    def schema(self) -> dict[str, str]:
        """Columns that are passed through, and their types."""
        return {column.name: str(column.type) for column in self.run.source.schema}

    @property
    def prompt_columns(self) -> list[str]:
        """Columns that the prompt template writes."""
        return list(self.run.source.columns.fields)

    def open_done(self, opened: ExitStack) -> FinishedRows:
        """What earlier runs have done; nothing where the run would be refused, which is noted."""
        config = self.config
        if config.to_stdout:
            return opened.enter_context(no_rows())
        try:
            source, replaces = self.run.source, config.overwrite or config.resume
            check_output(config.output, source.files, replaces, of_requests=source.columns.requests)
            refuse_locked(config.output)
            self.output_is_there = output_place(config.output).exists()
            if config.resume:
                rows = done_rows(
                    config.output,
                    self.run.schema(),
                    self.run.decides(),
                    retry_errors=config.retry_errors,
                    timed=TIMED,
                    heed=self.pace.add,
                )
                done = opened.enter_context(rows)
                self.notes += done.notes
                lacks = lacking_told(self.run.schema().names, TIMED)
                if lacks is not None and done.done_at_start:
                    self.notes.append(f"{lacks}: how long rows took that are done is not known")
                return done
            if not config.overwrite:
                refuse_unfinished(config.output)
        except MarsError as error:
            self.refusal = error
        return opened.enter_context(no_rows())

    def read(self, done: FinishedRows, progress: Callable[[Tally], None]) -> None:
        """Count all rows that are not done, and what would become of those of earlier runs."""
        run, rows = self.run, self.run.rows()
        for window in read_windows(run, rows, done, self.tally):
            self.add(window)
            progress(self.tally)
        try:
            run.source.refuse_out_of_reach("nothing would be written")
            self.notes += [*Leaving(run.config, run.source, rows, done).settle(), *run.source.scans_told()]
            self.returned_rows = done.returned
        except MarsError as error:
            self.refusal = self.refusal or error
        self.left_rows = done.leaving()
        self.done = done.counts()
        after = (self.done,) if self.config.retry_errors else ()
        self.done_before = (done.done_at_start, done.done_now(), *after)

    def foretell(self) -> None:
        """Estimate the time, by the rows that are done, or else by the rates of the device."""
        if not self.prompts:
            return
        model, answers = self.run.model, self.prompts * self.packer.n
        counts = {"flops": self.method_flops, "answers": answers}
        packer = replace(self.packer, new_tokens=round(self.new_tokens / answers))
        if self.pace.says_something:
            self.estimate = estimate_by_pace(packer, self.pace, **counts)
        elif rates := measure_rates(model.device, model.dtype, model.shape):
            tokens = self.tally.prompt_tokens
            self.estimate = estimate(packer, rates, **counts, prompt_tokens=tokens)

    def add(self, window: Sequence[Item]) -> None:
        documents = []
        for item in window:
            if isinstance(item, RowError):
                self.tally.count(item.status, item.kind, message=item.message)
                continue
            self.tally.count("ok", prompt_tokens=item.prompt_tokens)
            if isinstance(item, SplitDocument):
                self._add_split(item)
            prompts = item_prompts(item)
            for prompt in prompts:
                self._add_prompt(prompt)
            documents += prompts
        group = self.config.group
        group_packer = GroupPacker(packer=self.packer, any_method=group == "any")
        groups, alone = ([], documents) if group == "off" else group_packer.split(documents)
        self.method_flops += sum(group.flops for group in groups)
        self.method_flops += sum(expected_flops(self.packer, prompt.prompt_tokens) for prompt in alone)
        for pack in self.packer.packs(alone):
            self.planned.add_pack(self.packer, pack)
        self.grouped_documents += len(groups)
        self.grouped_rows += sum(len(group.rows) for group in groups)
        for group_pack in group_packer.packs(groups):
            shared = sum(group.shared_tokens for group in group_pack.groups)
            for chunk in group_packer.chunks(group_pack):
                tokens = max(shared, group_packer.running_tokens(group_pack, chunk))
                needed = group_packer.planned_bytes(group_pack, chunk)
                self.planned.add(tokens, group_packer.kv_bytes(group_pack, chunk), needed)

    def _add_split(self, document: SplitDocument) -> None:
        parts = len(document.prompts)
        self.split_rows += 1
        self.parts += parts
        if len(self.split) < SHOWN_SPLIT:
            row, tokens = document.source, document.document_tokens
            self.split.append({"row": row.row, "id": row.id, "document_tokens": tokens, "parts": parts})

    def _add_prompt(self, document: EncodedDocument) -> None:
        tokens = document.prompt_tokens
        self.lengths[tokens.bit_length() - 1] += 1
        self.longest_tokens = max(self.longest_tokens, tokens)
        self.truncated_rows += document.truncated_tokens > 0
        self.truncated_tokens += document.truncated_tokens
        self.new_tokens += self.packer.n * self.packer.room(document)
        self.flops += dense_flops(self.packer.shape, tokens)

    def as_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        cost = self._cost()
        return {
            "output": hidden(self.config.output),
            "output_problem": None if self.refusal is None else str(self.refusal),
            "output_is_there": self.output_is_there,
            "done_rows": self.done.total(),
            "left_rows": self.left_rows,
            "returned_rows": self.returned_rows,
            "notes": self.notes,
            "schema": self.schema,
            "prompt_columns": self.prompt_columns,
            "rows": self.tally.documents,
            "ok": self.tally.status["ok"],
            "errors": self.tally.status["error"],
            "skipped": self.tally.status["skipped"],
            "error_types": {
                kind: {"rows": rows, "first": self.tally.messages[kind]}
                for kind, rows in self.tally.errors.most_common()
            },
            "over_long": {
                "policy": self.config.on_overlong,
                "limit_tokens": self.run.prompts.limit,
                "rows": self._over_long_rows(),
                "truncated_tokens": self.truncated_tokens,
                "split_rows": self.split_rows,
                "parts": self.parts,
                "split": self.split,
            },
            "prompts": {
                "tokens": self.tally.prompt_tokens,
                "longest": self.longest_tokens,
                "histogram": [
                    {"from": 2**power, "to": 2 ** (power + 1) - 1, "rows": self.lengths[power]}
                    for power in self._powers()
                ],
            },
            "packing": {
                "method": self.packer.method.name,
                "device": str(self.run.model.device),
                "pack_tokens": self.packer.pack_tokens,
                "packs": self.planned.packs,
                "largest_pack_tokens": self.planned.largest_pack_tokens,
                "kv_bytes": self.planned.kv_bytes,
                "prefill_bytes": self.planned.prefill_bytes,
                "too_large_rows": len(self.planned.too_large),
                "grouped_rows": self.grouped_rows,
                "grouped_documents": self.grouped_documents,
            },
            "dense_prefill_tflop": self.flops / 1e12,
            "estimate": None if self.estimate is None else self.estimate.as_dict(),
            "estimated_cost": None if cost is None else {"low": cost[0], "high": cost[1]},
            "deadline": None if self.deadline is None else self.deadline.isoformat(timespec="seconds"),
        }

    def as_text(self) -> str:
        """The report for a person."""
        lines = [f"note: {note}" for note in self.notes]
        lines += [f"output: {self._output()}", "columns passed through:"]
        lines += [f"  {name}: {kind}" for name, kind in self.schema.items()] or ["  none"]
        if self.prompt_columns:
            lines.append(f"columns in the prompt: {', '.join(self.prompt_columns)}")
        return "\n".join([*lines, *self._rows(), *self._over_long(), *self._histogram(), *self._plan()])

    def _rows(self) -> Iterator[str]:
        tally = self.tally
        new = "new rows" if self.done else "rows"
        yield f"{new}: {tally.documents:,}, of which {self._answerable:,} can be answered"
        for kind, rows in tally.errors.most_common():
            yield f"  {kind}: {rows:,}"
            yield from (f"    {' '.join(message.split())}" for message in tally.messages[kind])

    @property
    def _answerable(self) -> int:
        """New rows that can be read and have room in memory; of a row in parts some may."""
        return self.tally.status["ok"] - (0 if self.split_rows else len(self.planned.too_large))

    def _output(self) -> str:
        """Where answers go, and what becomes of what is there."""
        output = "standard output, as JSON lines" if self.config.to_stdout else hidden(self.config.output)
        if self.refusal is not None:
            return f"refused: {self.refusal}"
        if self.done or self.left_rows:
            done = self.done.total()
            left = f", {self.left_rows:,} that leave" if self.left_rows else ""
            return f"{output}, resumed: {counted(done, 'row')} done, {self.tally.documents:,} new{left}"
        if self.output_is_there:
            return f"{output}, which is there and {'goes on' if self.config.resume else 'is overwritten'}"
        return output

    def raise_outcome(self, *, fail_on_error: bool = False) -> None:
        """Raise what the run would end with, with `fail_on_error` or not, as far as is known beforehand."""
        if self.refusal is not None:
            raise self.refusal
        tally = self.tally.with_failures("out_of_memory", self.tally.status["ok"] - self._answerable)
        try:
            for new, before in zip((Tally(), tally, tally), self.done_before, strict=False):
                stop_if_broken(self.config, new, before)
        except TooManyErrors as error:
            raise TooManyErrors(f"the run would stop: {str(error).partition(';')[0]}") from error
        rows = self.done.total() + self.tally.documents
        too_large = next(iter(self.planned.too_large), None)
        if rows and not (self.done["ok"] or self._answerable):
            why = self.tally.commonest_error or too_large or "all of them failed in earlier runs"
            raise NoneAnswered(f"none of {counted(rows, 'row')} can be answered; {why}")
        if fail_on_error and (failed := self.done["error"] + tally.status["error"]):
            raise RowsFailed(self.tally.failures_told(failed, rows, too_large))

    def _over_long(self) -> Iterator[str]:
        cut = f", {self.truncated_tokens:,} tokens cut" if self.truncated_rows else ""
        policy = f"--on-overlong {self.config.on_overlong}"
        rows = self._over_long_rows()
        yield f"over {self.run.prompts.limit:,} prompt tokens: {counted(rows, 'row')} ({policy}{cut})"
        if self.split_rows:
            parts = counted(self.parts, "part")
            yield f"split: {counted(self.split_rows, 'row')} into {parts}; combining them comes on top"
        for row in self.split:
            tokens = f"{row['document_tokens']:,} tokens in {row['parts']:,} parts"
            yield f"  row {row['row']}, id {row['id']}: {tokens}"

    def _over_long_rows(self) -> int:
        return self.tally.errors["over_long"] + self.truncated_rows + self.split_rows

    def _histogram(self) -> Iterator[str]:
        yield f"prompts: {self.tally.prompt_tokens:,} tokens, the longest {self.longest_tokens:,}"
        most = max(self.lengths.values(), default=1)
        for power in self._powers():
            rows = self.lengths[power]
            # a bar that is not empty for any row at all
            bar = "#" * -(-rows * BAR_WIDTH // most)
            span = f"{2**power:,} to {2 ** (power + 1) - 1:,}"
            yield f"  {span:>22} {rows:>10,} {bar}".rstrip()

    def _powers(self) -> range:
        return range(min(self.lengths), max(self.lengths) + 1) if self.lengths else range(0)

    def _plan(self) -> Iterator[str]:
        packer = self.packer
        if self.grouped_documents:
            documents = counted(self.grouped_documents, "document")
            yield f"answered together: {counted(self.grouped_rows, 'row')} about {documents}"
        yield from memory_needed(self.run, packer, self.longest_tokens or 1)
        packs = f"{self.planned.packs:,} of up to {packer.pack_tokens:,} tokens on {self.run.model.device}"
        yield f"packs: {packs}, the largest {self.planned.largest_pack_tokens:,}"
        gigabytes = figures(self.planned.kv_bytes / 1e9)
        yield f"keys and values of the largest pack: {gigabytes} GB ({packer.method.name})"
        yield from self.planned.told()
        yield f"work of a dense prefill: {figures(self.flops / 1e12)} TFLOP"
        if self.estimate is not None:
            yield self.estimate.as_text()
        yield from self._money_and_deadline()

    def _money_and_deadline(self) -> Iterator[str]:
        cost, at = self._cost(), self.deadline
        if cost is not None:
            low, high = map(amount, cost)
            between = high if low == high else f"{low} to {high}"
            alone = ", as if one device did it all" if self.config.engine == "ray" else ""
            price = f"{self.config.price_per_hour:g} an hour"
            yield f"cost, an estimate from that time: {between}, at {price}{alone}; loading comes on top"
        if at is not None:
            left = (at - datetime.now(at.tzinfo)).total_seconds()
            when = f"in {duration(left)}" if left > 0 else "which is past: the run would stop at once"
            yield f"deadline: {moment_told(at)}, {when}"

    def _cost(self) -> tuple[float, float] | None:
        price = self.config.price_per_hour
        return None if price is None or self.estimate is None else self.estimate.cost(price)


def dry_run(config: BatchConfig, progress: Callable[[Tally], None] = lambda tally: None) -> DryRunReport:
    """Read and tokenize everything, and report what the run would do; `progress` is called now and then."""
    run = prepare(open_rows(config), config.model)
    report = DryRunReport(run=run, packer=planning_packer(run))
    with ExitStack() as opened:
        report.read(report.open_done(opened), progress)
    text = run.length_note(report.longest_tokens)
    report.notes += [] if text is None else [text]
    report.foretell()
    return report
