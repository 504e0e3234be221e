"""From files of documents to a file of answers: how the pieces fit together."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pipeline.engines.one_process import Engine, OneProcess
from pipeline.engines.packing import windows
from pipeline.engines.prefetch import ahead
from pipeline.errors import (
    KEPT,
    NOTHING_KEPT,
    ConfigError,
    InputError,
    MarsError,
    StorageError,
    TooManyErrors,
    did_you_mean,
)
from pipeline.inputs.reading import Reading
from pipeline.outputs.journal import Journal
from pipeline.outputs.lock import lock_output
from pipeline.outputs.mirror import open_journal
from pipeline.outputs.rowindex import Order
from pipeline.outputs.writing import check_output
from pipeline.pruning.registry import make_method
from pipeline.settings.method_settings import AUTO
from pipeline.settings.option import settings_of
from pipeline.settings.parse import parse_max_errors
from pipeline.settings.run_settings import BatchConfig
from pipeline.settings.sources import renewed
from pipeline.setup.intake import Intake, Item, item_prompts, item_tokens, new_rows, open_rows
from pipeline.setup.lacking import refuse_lacking
from pipeline.setup.leaving import files_of, notes_of, refuse_at_start, settle
from pipeline.setup.preparation import Preparation, prepare
from pipeline.setup.profile import with_profile
from pipeline.summary import Summary, Tally
from pipeline.texts.redaction import hidden
from pipeline.texts.words import counted

if TYPE_CHECKING:
    from pipeline.engines.ray_cluster import RayCluster
    from pipeline.model.loading import LoadedModel
    from pipeline.pruning.base import PruningMethod

WINDOWS_AHEAD = 1  # read and tokenized while the device works on another; one more is in the making
FEWEST_FOR_PER_CENT = 20  # finished rows before a share of errors means anything

Inputs = str | os.PathLike[str]
Progress = Callable[[Summary], None]
Note = Callable[[str], None]


def _nothing(*_: Any) -> None:
    pass


def run_batch(
    input: Inputs | Sequence[Inputs],
    output: str | os.PathLike[str],
    *,
    model: str | LoadedModel = "smollm2-135m",
    method: str | PruningMethod | None = None,
    progress: Progress = _nothing,
    note: Note = _nothing,
    check: Callable[[], None] = _nothing,
    phase: Note = _nothing,
    began: float | None = None,
    **options: Any,
) -> Summary:
    """Answer every document of `input` and write `output`; what `marsinfer batch` runs.

    `input` is a file, glob, folder or URL, or several; `output` a .parquet, .arrow, .arrows or .jsonl file or
    URL, whose columns are the fields of pipeline.records.Answer. `options` are the other fields of
    `BatchConfig`, which are the command's flags. `model` may be a model that `load_model` returned, `method`
    a method object; without one it is that of `profile`, with its settings and precisions, or else auto.

    `progress` is called as rows are saved, with the running summary, `note` with what a user should know,
    `phase` with what is being done, `check` often, between layers too: it may raise to end the run. `began`
    is when the work began of which this run is the last part, by time.perf_counter(); None: with this call.

    Returns the summary: counts of rows and tokens, `seconds` since `began`, percentiles of TTFT in
    milliseconds; `print` shows it in a line, and its `as_dict` gives plain values. A row that cannot be
    answered becomes an error row, and raises nothing; `none_answered` tells where that became of all rows.

    Raises ConfigError, InputError or ModelError before any row is answered, LockedError where another run
    writes the same output, StorageError where it cannot be written, TooManyErrors by `max_errors`. After a
    MarsError the finished rows are in the journal, from which `resume=True` goes on.
    """
    began = time.perf_counter() if began is None else began
    options = renewed(BatchConfig, options, note)
    _refuse_unknown(options)
    options["model"] = model if isinstance(model, str) else model.name
    made = None if isinstance(method, str) else method
    if made is not None:
        options["method"] = f"{type(made).__module__}:{type(made).__qualname__}"
        options["settings"] = asdict(made)
    elif method in (None, AUTO):
        options = with_profile(options)
    else:
        options["method"] = method
    inputs = (input,) if isinstance(input, str | os.PathLike) else tuple(input)
    options["input"] = tuple(map(os.fspath, inputs))
    config = BatchConfig(output=os.fspath(output), **options)
    if made is None and config.method != AUTO:
        made = make_method(config.method, config.settings)
    check_output(config.output, config.input, config.overwrite or config.resume)
    if config.engine == "ray" and not isinstance(model, str):
        raise ConfigError("engine='ray' loads the model in its workers: give its name, not a loaded model")
    summary = Summary(method=config.method, output=hidden(config.output), began=began)
    summary.kept_before = config.resume  # which the journal will tell better
    with (
        _kept_told(summary),
        lock_output(config.output) as lock,
        _cluster(config, check) as cluster,
    ):
        intake = open_input(config)
        run = prepare(intake, model if cluster is None else cluster.open_model(config), made)
        for text in run.notes:
            note(text)
        engine = _engine(run, cluster, check=check, note=note, phase=phase)
        answer_all(
            run,
            engine,
            summary,
            progress=progress,
            note=note,
            check=check,
            phase=phase,
            still_locked=lock.check,
        )
    return summary


def _refuse_unknown(options: Iterable[str]) -> None:
    known = [each.name for each in settings_of(BatchConfig)]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"run_batch has no option {name!r}{did_you_mean(name, known)}; it takes those of BatchConfig"
            )


@contextmanager
def _kept_told(summary: Summary) -> Iterator[None]:
    """Errors promise no rows to go on from where there are none."""
    try:
        yield
    except MarsError as error:
        if not (summary.kept_before or summary.documents):
            error.args = (str(error).replace(KEPT, NOTHING_KEPT),)
        raise


def _cluster(config: BatchConfig, check: Callable[[], None]) -> AbstractContextManager[RayCluster | None]:
    """Where the workers of a run will be, if it has any."""
    if config.engine == "local":
        return nullcontext()
    from pipeline.engines.ray_cluster import RayCluster

    return RayCluster(config, check)


def _engine(
    run: Preparation, cluster: RayCluster | None, *, check: Callable[[], None], note: Note, phase: Note
) -> Engine:
    if cluster is None:
        return OneProcess(run, check, note, phase)
    from pipeline.engines.ray import RayEngine

    return RayEngine(run, cluster, note)


def open_input(config: BatchConfig) -> Intake:
    """The rows of a run, its output checked against the files that they come from."""
    intake = open_rows(config)
    check_output(config.output, intake.source.files, config.overwrite or config.resume)
    return intake


def answer_all(
    run: Preparation,
    engine: Engine,
    summary: Summary,
    *,
    progress: Progress,
    note: Note,
    check: Callable[[], None],
    phase: Note = _nothing,
    still_locked: Callable[[], None] = _nothing,
) -> None:
    """Run every new row through the model, into the journal, and publish the output."""
    config, decides = run.config, run.decides()
    shape, itemsize = run.model.shape, run.model.dtype.itemsize
    summary.method = run.method.name
    summary.kv_bytes_per_token = shape.layers * shape.kv_bytes_per_token(itemsize)
    note_length = _once(run, note)
    summary.start_work()
    phase("reading and tokenizing")
    with open_journal(
        config.output,
        run.schema(),
        decides,
        resume=config.resume,
        retry_errors=config.retry_errors,
        overwrite=config.overwrite,
        check=still_locked,
    ) as journal:
        summary.kept_before = journal.resumed
        for text in journal.notes:
            note(text)
        if journal.resumed:
            done = journal.done_at_start.total()
            note(f"resuming: {counted(done, 'row')} {'is' if done == 1 else 'are'} done")
            refuse_broken(config, journal.done_at_start)
        rows = run.rows()
        refuse_at_start(run.source, rows, journal, drop_missing=config.drop_missing)

        def taken_in(windows: Iterable[Window | None]) -> Iterator[list[Item] | None]:
            for window in windows:
                if window is not None:
                    expect(summary, window, journal)
                    note_length(window.items)
                    if engine.workers is not None and not summary.documents:
                        phase("loading the model in the workers, and answering the first rows")
                yield window and window.items

        with (
            _nothing_left_behind(journal, summary),
            closing(ahead(read_windows(run, rows, journal), WINDOWS_AHEAD, check, engine.patience_s)) as read,
        ):
            for answers in engine.answers(taken_in(read)):
                journal.append(answers)
                summary.add(answers)
                summary.workers, summary.times = engine.workers, engine.times
                progress(summary)
                stop_if_broken(config, summary, journal.done_now())
                check()
        summary.times = engine.times
        refuse_out_of_reach(run)
        kept = settle(run.source, rows, journal, drop_missing=config.drop_missing)
        summary.left_rows, summary.returned_rows = journal.leaving(), journal.returned
        for text in notes_of(config.output, summary.left_rows, summary.returned_rows, kept):
            note(text)
        phase("writing the output")
        summary.in_output = journal.counts()
        if not (summary.in_output["ok"] or summary.errors):
            summary.failed_before = journal.first_failure()
        files = files_of(journal.files, run.source.files_read, saw_all=rows.saw_all)
        written = journal.publish(cast(Order, config.order), check, files)
        if journal.resumed and not summary.documents:
            note(f"nothing new: every row was done{'' if written else f'; {summary.output} stays as it is'}")
    summary.finish()
    if summary.documents:
        progress(summary)


@contextmanager
def _nothing_left_behind(journal: Journal, summary: Summary) -> Iterator[None]:
    """An input that turns out to be unusable leaves no journal of errors, which would block the next run."""
    try:
        yield
    except InputError:
        if not (journal.resumed or summary.status["ok"]):
            journal.discard()
        raise


def _once(run: Preparation, note: Note) -> Callable[[Sequence[Item]], None]:
    """Something that notes the first window whose longest prompt the run's profile says little about."""
    said = False

    def note_length(items: Sequence[Item]) -> None:
        nonlocal said
        longest = max((prompt.prompt_tokens for item in items for prompt in item_prompts(item)), default=0)
        text = None if said else run.length_note(longest)
        if text is not None:
            said = True
            note(text)

    return note_length


class Window(NamedTuple):
    """Rows from which packs are made, and how far the reading had come with the last of them."""

    items: list[Item]
    fraction_read: float
    passed_over: int
    total_rows: int | None  # as `Reading` estimates it
    most_rows: int | None


def refuse_out_of_reach(run: Preparation) -> None:
    """A StorageError for files that could not be read to their end, though perhaps they are sound."""
    files = run.source.out_of_reach
    if files:
        more = f", and {counted(len(files) - 1, 'file')} more" if len(files) > 1 else ""
        raise StorageError(f"{files[0]}{more}; all other rows were answered; {KEPT} once it can be reached")


def read_windows(run: Preparation, rows: Reading, journal: Journal) -> Iterator[Window]:
    """The new rows, tokenized."""
    new = new_rows(rows, journal, renames=run.source.columns.takes_ids)
    read = windows(run.encode(new), item_tokens)
    for items in refuse_lacking(read, run.config, answered=journal.done_at_start["ok"] > 0):
        yield Window(items, rows.fraction_read, journal.passed_over, rows.total, rows.most)


def expect(summary: Summary, window: Window, journal: Journal) -> None:
    """Estimate how many rows the run will answer, those left out that are done."""
    summary.expect(
        len(window.items),
        window.total_rows,
        window.fraction_read,
        window.most_rows,
        passed_over=window.passed_over,
        done_before=journal.done_at_start.total(),
    )


def stop_if_broken(config: BatchConfig, tally: Tally, before: Counter[str]) -> None:
    """Raise TooManyErrors when more rows have failed than `--max-errors` allows.

    `before` are rows of earlier runs by status, which count as those of this one do.
    """
    failed, finished = tally.status["error"] + before["error"], tally.documents + before.total()
    if not _is_broken(config, failed, finished):
        return
    kinds = [f"{kind} {count:,}" for kind, count in tally.errors.most_common(3)]
    kinds += [f"earlier runs {before['error']:,}"] if before["error"] else []
    raise TooManyErrors(
        f"{failed:,} of {counted(finished, 'row')} failed ({', '.join(kinds)}), more than --max-errors "
        f"{config.max_errors} allows; finished rows are kept: mend the cause, then --resume --retry-errors"
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
