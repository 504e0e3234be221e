"""From files of documents to a file of answers: how the pieces fit together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from pipeline.bookkeeping import AnyJournal, Books, Note, Progress
from pipeline.engines.one_process import Engine, Hooks, OneProcess
from pipeline.engines.packing import windows
from pipeline.engines.prefetch import ahead
from pipeline.errors import (
    KEPT,
    NO_JOURNAL,
    NOTHING_KEPT,
    ConfigError,
    InputError,
    MarsError,
    ending,
    keeps_nothing,
)
from pipeline.inputs.reading import Reading
from pipeline.interrupts import RunDeadline
from pipeline.notebooks import listeners
from pipeline.outputs.finished import FinishedRows
from pipeline.outputs.lock import lock_output
from pipeline.outputs.mirror import open_journal
from pipeline.outputs.rowindex import Order
from pipeline.outputs.streamed import StreamedRows
from pipeline.outputs.writing import check_output
from pipeline.pruning.registry import make_method
from pipeline.settings.keywords import StrPath, called_with, inputs_of
from pipeline.settings.method_settings import AUTO
from pipeline.settings.model_settings import WeightsSettings
from pipeline.settings.moments import deadline_after, moment_told
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.intake import Intake, Item, SoughtColumns, item_tokens, open_rows
from pipeline.setup.leaving import Leaving
from pipeline.setup.new_rows import new_rows, note_id
from pipeline.setup.objects import with_objects
from pipeline.setup.preparation import Preparation, prepare
from pipeline.storage.remote import Place
from pipeline.storage.stdin import Once
from pipeline.summary import Summary
from pipeline.tally import Tally
from pipeline.texts.redaction import hidden

if TYPE_CHECKING:
    from pipeline.engines.ray_cluster import RayCluster
    from pipeline.model.loading import LoadedModel
    from pipeline.pruning.base import PruningMethod

WINDOWS_AHEAD = 1  # read and tokenized while the device works on another; one more is in the making


def run_batch(
    input: StrPath | Sequence[StrPath],
    output: StrPath,
    *,
    model: StrPath | LoadedModel = WeightsSettings.model,
    method: str | PruningMethod | None = None,
    progress: Progress | None = None,
    note: Note = lambda text: None,
    check: Callable[[], None] = lambda: None,
    phase: Note | None = None,
    began: float | None = None,
    **options: Any,
) -> Summary:
    """Answer every document of `input` and write `output`; what `marsinfer batch` runs.

    `input` is a file, glob, folder or URL, or several; `output` a .parquet, .arrow, .arrows or .jsonl file or
    URL, or - for JSON lines on standard output, whose columns are the fields of pipeline.records.Answer.
    `options` are the other fields of `BatchConfig`, which are the command's flags; a path may stand for any
    text. `model` may be a model that `load_model` returned, `method` a method object; without one it is that
    of `profile`, with its settings and precisions, or else auto.

    `progress` is called as rows are saved, with the running summary, `note` with what a user should know,
    `phase` with what is being done (where the first is not given, a notebook shows a bar), `check` often,
    between layers too: it may raise to end the run. `began` is when the work began of which this run is the
    last part, by time.perf_counter(); None: with this call.

    Returns the summary: counts of rows and tokens, `seconds` since `began`, percentiles of TTFT in
    milliseconds; `print` shows it in a line, and its `as_dict` gives plain values. A row that cannot be
    answered becomes an error row, and raises nothing; `none_answered` tells where that became of all rows.

    Raises ConfigError, InputError or ModelError before any row is answered, LockedError where another run
    writes the same output, StorageError where it cannot be written, TooManyErrors by `max_errors`,
    DeadlineReached by `deadline`. After a MarsError the finished rows are in the journal, from which
    `resume=True` goes on.
    """
    began = time.perf_counter() if began is None else began
    progress, phase = listeners(progress, phase)
    options = called_with("run_batch", BatchConfig, options, note)
    options |= {"input": inputs_of(input), "output": os.fspath(output)}
    config, made, model = configured(options, model, method)
    _check_output(config, config.input)
    summary = Summary(
        method=config.method,
        output=hidden(config.output),
        began=began,
        price_per_hour=config.price_per_hour,
    )
    summary.kept_before = config.resume  # which the journal will tell better
    deadline = deadline_of(config, summary, check)
    check = deadline.check
    with (
        _kept_told(summary, config),
        _locked(config) as still_locked,
        _cluster(config, check) as cluster,
    ):
        intake = open_input(config)
        run = prepare(intake, model if cluster is None else cluster.open_model(config), made)
        for text in run.notes:
            note(text)
        hooks = Hooks(check=ending(check), note=ending(note), phase=ending(phase))
        engine = _engine(run, cluster, hooks)
        books = Books(
            run=run, engine=engine, summary=summary, progress=progress, hooks=hooks, deadline=deadline
        )
        answer_all(books, still_locked)
    return summary


def answer_all(books: Books, still_locked: Callable[[], None]) -> None:
    """Run every new row through the model, into the journal, and publish the output."""
    run, engine, check = books.run, books.engine, books.hooks.check
    config = run.config
    books.begin()
    with _journal(run, still_locked) as journal:
        books.opened(journal)
        rows = run.rows()
        leaving = Leaving(config, run.source, rows, journal)
        leaving.refuse_at_start()
        read = read_windows(run, rows, journal, books.summary)
        with (
            _nothing_left_behind(journal, books.summary),
            closing(ahead(read, WINDOWS_AHEAD, check, engine.patience_s)) as windows,
            closing(engine.answers(map(books.taken, windows))) as answered,
        ):
            for answers in answered:
                journal.append(answers)
                books.saved(answers, journal.done_now())
                check()
        run.source.refuse_out_of_reach(f"all other rows were answered; {KEPT} once it can be read")
        books.settled(journal, leaving.settle())
        written = journal.publish(cast(Order, config.order), check, leaving.files())
        books.published(journal, written)
    books.end()


def read_windows(run: Preparation, rows: Reading, done: FinishedRows, tally: Tally) -> Iterator[list[Item]]:
    """The new rows, tokenized, some at a time; the tally expects as many as these let it."""
    sought = SoughtColumns(run.config, answered=done.done_at_start["ok"] > 0)

    def heed(items: list[Item]) -> list[Item]:
        sought.look(items)
        tally.expect(len(items), rows, done)
        return items

    renames = run.source.columns.takes_ids
    heed_id = partial(note_id, done=done, renames=renames) if rows.is_selective else None
    new = new_rows(rows.records(heed_id), done, renames=renames)
    return map(heed, windows(run.encode(new), item_tokens))


def open_input(config: BatchConfig) -> Intake:
    """The rows of a run, its output checked against the files that they come from."""
    intake = open_rows(config)
    _check_output(config, intake.source.files, of_requests=intake.source.columns.requests)
    return intake


def _check_output(
    config: BatchConfig, inputs: Iterable[str | Place | Once], *, of_requests: bool = False
) -> None:
    if not config.to_stdout:
        replaces = config.overwrite or config.resume
        check_output(config.output, inputs, replaces, of_requests=of_requests)


@contextmanager
def _locked(config: BatchConfig) -> Iterator[Callable[[], None]]:
    """Hold the output's lock, if it is a file; the function raises once it is lost."""
    if config.to_stdout:
        yield lambda: None
        return
    with lock_output(config.output) as lock:
        yield lock.check


def _journal(run: Preparation, still_locked: Callable[[], None]) -> AnyJournal:
    """Where the answers of a run go."""
    config = run.config
    if config.to_stdout:
        return StreamedRows(run.schema())
    return open_journal(
        config.output,
        run.schema(),
        run.decides(),
        resume=config.resume,
        retry_errors=config.retry_errors,
        overwrite=config.overwrite,
        check=still_locked,
    )


def configured(
    options: dict[str, Any], model: StrPath | LoadedModel, method: str | PruningMethod | None
) -> tuple[BatchConfig, PruningMethod | None, str | LoadedModel]:
    """The settings of a run, the method that they name, which may be the one given, and its model."""
    config = BatchConfig(**with_objects(options, model, method))
    made = None if isinstance(method, str) else method
    name_or_model = os.fspath(model) if isinstance(model, str | os.PathLike) else model
    if config.engine == "ray" and not isinstance(name_or_model, str):
        raise ConfigError("engine='ray' loads the model in its workers: give its name, not a loaded model")
    if made is None and config.method != AUTO:
        made = make_method(config.method, config.settings)
    return config, made, name_or_model


@contextmanager
def _kept_told(summary: Summary, config: BatchConfig) -> Iterator[None]:
    """Errors promise no rows to go on from where there are none."""
    try:
        yield
    except MarsError as error:
        if config.to_stdout:
            keeps_nothing(error, NO_JOURNAL)
        elif not (summary.kept_before or summary.documents):
            keeps_nothing(error, NOTHING_KEPT)
        raise


def deadline_of(config: BatchConfig, summary: Summary, check: Callable[[], None]) -> RunDeadline:
    """When the run is to end, reckoned from when it began; its `check` calls the one given too."""
    if config.deadline is None:
        return RunDeadline(None, "", check, summary.done_so_far)
    began = datetime.now(UTC) - timedelta(seconds=summary.seconds)
    at = deadline_after(config.deadline, began)
    return RunDeadline(at.timestamp(), moment_told(at), check, summary.done_so_far)


def _cluster(config: BatchConfig, check: Callable[[], None]) -> AbstractContextManager[RayCluster | None]:
    """Where the workers of a run will be, if it has any."""
    if config.engine == "local":
        return nullcontext()
    from pipeline.engines.ray_cluster import RayCluster

    return closing(RayCluster(config, check))


def _engine(run: Preparation, cluster: RayCluster | None, hooks: Hooks) -> Engine:
    if cluster is None:
        return OneProcess(run, hooks)
    from pipeline.engines.ray import RayEngine

    return RayEngine(run, cluster, hooks.note)


@contextmanager
def _nothing_left_behind(journal: AnyJournal, summary: Summary) -> Iterator[None]:
    """An input that turns out to be unusable leaves no journal of errors, which would block the next run."""
    try:
        yield
    except InputError:
        if not (journal.resumed or summary.status["ok"]):
            journal.discard()
        raise
