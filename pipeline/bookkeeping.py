"""What a run counts and tells beside its answers, and when too many of its rows have failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.engines.one_process import Engine, Hooks
from pipeline.errors import KEPT_TO_MEND, TooManyErrors
from pipeline.interrupts import RunDeadline
from pipeline.outputs.journal import Journal
from pipeline.outputs.streamed import StreamedRows
from pipeline.records import Answer
from pipeline.settings.parse import parse_max_errors
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.intake import Item, item_prompts
from pipeline.setup.preparation import Preparation
from pipeline.summary import Summary
from pipeline.tally import Tally
from pipeline.texts.words import counted

FEWEST_FOR_PER_CENT = 20  # finished rows before a share of errors means anything

MOST_MODELS_TOLD = 3

Progress = Callable[[Summary], None]
Note = Callable[[str], None]
AnyJournal = Journal | StreamedRows


@dataclass(kw_only=True)
class Books:
    """What a run counts and tells beside its answers."""

    run: Preparation
    engine: Engine
    summary: Summary
    progress: Progress
    hooks: Hooks
    deadline: RunDeadline
    told_length: bool = False  # of a prompt that the run's profile says little about
    told_models: set[str] = field(default_factory=set)  # which rows ask for, and the run does not have

    def begin(self) -> None:
        """From here on rows are read and answered."""
        run, summary = self.run, self.summary
        summary.method = run.method.name
        itemsize = run.model.dtype.itemsize
        summary.kv_bytes_per_token = run.model.shape.layers * run.model.shape.kv_bytes_per_token(itemsize)
        summary.start_work()
        self.hooks.phase("reading and tokenizing")

    def opened(self, journal: AnyJournal) -> None:
        """Tell what earlier runs have done; raises TooManyErrors where too many of their rows failed."""
        self.summary.kept_before = journal.resumed
        for text in journal.notes:
            self.hooks.note(text)
        if journal.resumed:
            done = journal.done_at_start.total()
            self.hooks.note(f"resuming: {counted(done, 'row')} {'is' if done == 1 else 'are'} done")
            refuse_broken(self.run.config, journal.done_at_start)

    def taken(self, items: list[Item] | None) -> list[Item] | None:
        """The same window, on its way to the engine."""
        if items is None:
            return None
        self._tell_models(items)
        if not self.told_length:
            longest = max(
                (prompt.prompt_tokens for item in items for prompt in item_prompts(item)), default=0
            )
            text = self.run.length_note(longest)
            self.told_length = text is not None
            if text is not None:
                self.hooks.note(text)
        if self.engine.workers is not None and not self.summary.documents:
            self.hooks.phase("loading the model in the workers, and answering the first rows")
        return items

    def _tell_models(self, items: Sequence[Item]) -> None:
        """Tell of models that rows ask for: the run has one, and a row of another is no reason to fail it."""
        own = {_bare(self.run.config.model), _bare(self.run.model.name)}
        for name in dict.fromkeys(item.source.model for item in items):
            if name is None or _bare(name) in own or name in self.told_models:
                continue
            self.told_models.add(name)
            told = len(self.told_models)
            if told <= MOST_MODELS_TOLD:
                more = "; of further ones no note says it" if told == MOST_MODELS_TOLD else ""
                self.hooks.note(f"requests ask for {name!r}: {self.run.model.name} answers them{more}")

    def saved(self, answers: Sequence[Answer], before: Counter[str]) -> None:
        """Count answers that are in the journal; `before` are rows of earlier runs by status."""
        self.summary.add(answers)
        self.summary.workers, self.summary.times = self.engine.workers, self.engine.times
        self.progress(self.summary)
        stop_if_broken(self.run.config, self.summary, before)

    def settled(self, journal: AnyJournal, notes: Sequence[str]) -> None:
        """Tell what the output will hold, and what becomes of rows that did not come.

        Raises TooManyErrors where too many of all these rows failed, and some of earlier runs were to be run
        again: of them some may not have come.
        """
        self.deadline.lift()
        summary = self.summary
        summary.times = self.engine.times
        summary.left_rows, summary.returned_rows = journal.leaving(), journal.returned
        summary.pages_without_text = self.run.source.pages_without_text
        for text in (*notes, *self.run.source.scans_told()):
            self.hooks.note(text)
        self.hooks.phase("writing the output")
        summary.in_output = journal.counts()
        if self.run.config.retry_errors:
            stop_if_broken(self.run.config, summary, summary.in_output - summary.status)
        if not (summary.in_output["ok"] or summary.errors):
            summary.failed_before = journal.first_failure()

    def published(self, journal: AnyJournal, written: bool) -> None:
        """Tell a user who waits for new rows that there are none, and where the failed ones are."""
        failed = self.summary.in_output.total() - self.summary.in_output["ok"]
        if failed and journal.errors_file is not None:
            self.hooks.note(f"{counted(failed, 'row')} without an answer: {journal.errors_file}")
        if journal.resumed and not self.summary.documents:
            stays = "" if written else f"; {self.summary.output} stays as it is"
            self.hooks.note(f"nothing new: every row was done{stays}")

    def end(self) -> None:
        self.summary.finish()
        if self.summary.documents:
            self.progress(self.summary)


def _bare(model: str) -> str:
    """A model's name without the folders, or the owner, in front of it."""
    return model.rstrip("/").rpartition("/")[2].casefold()


def stop_if_broken(config: BatchConfig, tally: Tally, before: Counter[str]) -> None:
    """Raise TooManyErrors when more rows have failed than `--max-errors` allows.

    `before` are rows of earlier runs by status, which count as those of this one do.
    """
    failed, finished = tally.status["error"] + before["error"], tally.documents + before.total()
    if not _is_broken(config, failed, finished):
        return
    kinds = [f"{kind} {count:,}" for kind, count in tally.errors.most_common(3)]
    remedy = KEPT_TO_MEND
    if before["error"]:
        kinds.append(f"earlier runs {before['error']:,}")
        if config.retry_errors:  # of rows alone that this run did not come to
            kinds[-1] += ", of rows that were not read again"
            remedy = f"{KEPT_TO_MEND} without --limit, --sample or --shard, or with a higher --max-errors"
    raise TooManyErrors(
        f"{failed:,} of {counted(finished, 'row')} failed ({', '.join(kinds)}), more than --max-errors "
        f"{config.max_errors} allows; {remedy}"
    )


def refuse_broken(config: BatchConfig, before: Counter[str]) -> None:
    """Raise TooManyErrors where rows of earlier runs, by status, are over `--max-errors` already."""
    failed, finished = before["error"], before.total()
    if _is_broken(config, failed, finished):
        raise TooManyErrors(
            f"{failed:,} of {counted(finished, 'row')} failed in earlier runs, more than --max-errors "
            f"{config.max_errors} allows; finished rows are kept: --retry-errors runs these again, and a "
            "higher --max-errors goes on with them as they are"
        )


def _is_broken(config: BatchConfig, failed: int, finished: int) -> bool:
    if config.max_errors is None:
        return False
    bound, per_cent = parse_max_errors(config.max_errors)
    if per_cent:
        return finished >= FEWEST_FOR_PER_CENT and failed > bound / 100 * finished
    return failed > bound
