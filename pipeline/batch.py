"""From files of documents to a file of answers: how the pieces fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pipeline.engines.one_process import Engine, OneProcess
from pipeline.errors import ConfigError, TooManyErrors
from pipeline.intake import Intake, Item, item_prompts, item_tokens, new_rows, open_rows
from pipeline.io.journal import Journal
from pipeline.io.lock import lock_output
from pipeline.io.mirror import open_journal
from pipeline.io.rowindex import Order
from pipeline.io.writing import check_output
from pipeline.packing import windows
from pipeline.prefetch import ahead
from pipeline.preparation import Preparation, prepare
from pipeline.pruning.registry import make_method
from pipeline.settings.method import AUTO
from pipeline.settings.parse import parse_max_errors
from pipeline.settings.run import BatchConfig
from pipeline.settings.sources import renewed, with_profile
from pipeline.summary import Summary

if TYPE_CHECKING:
    from pipeline.engines.ray_cluster import RayCluster
    from pipeline.model.loading import LoadedModel
    from pipeline.pruning.base import PruningMethod

WINDOWS_AHEAD = 1  # read and tokenized while the device works on another; one more is in the making
FEWEST_FOR_PER_CENT = 20  # finished rows before a share of errors means anything

Progress = Callable[[Summary], None]
Note = Callable[[str], None]


def _nothing(*_: Any) -> None:
    pass


def run_batch(
    input: str | Sequence[str],
    output: str,
    *,
    model: str | LoadedModel = "smollm2-135m",
    method: str | PruningMethod | None = None,
    progress: Progress = _nothing,
    note: Note = _nothing,
    check: Callable[[], None] = _nothing,
    **options: Any,
) -> Summary:
    """Answer every document of `input` and write `output`; what `marsinfer batch` runs.

    `input` is a file, glob, folder or URL, or several; `output` a .parquet, .arrow, .arrows or .jsonl file or
    URL, whose columns are the fields of pipeline.records.Answer. `options` are the other fields of
    `BatchConfig`, which are the command's flags. `model` may be a model that `load_model` returned, `method`
    a method object; without one it is that of `profile`, with its settings and precisions, or else auto.

    `progress` is called as rows are saved, with the running summary, `note` with what a user should know,
    `check` often, between layers too: it may raise to end the run.

    Returns the summary: counts of rows and tokens, `seconds`, percentiles of TTFT in milliseconds; its
    `as_dict` gives plain values. A row that cannot be answered becomes an error row, and raises nothing.

    Raises ConfigError, InputError or ModelError before any row is answered, LockedError where another run
    writes the same output, StorageError where it cannot be written, TooManyErrors by `max_errors`. After a
    MarsError the finished rows are in the journal, from which `resume=True` goes on.
    """
    options = renewed(BatchConfig, options, note)
    options["model"] = model if isinstance(model, str) else model.name
    made = None if isinstance(method, str) else method
    if made is not None:
        options["method"] = f"{type(made).__module__}:{type(made).__qualname__}"
        options["settings"] = asdict(made)
    elif method in (None, AUTO):
        options = with_profile(options)
    else:
        options["method"] = method
    options["input"] = (input,) if isinstance(input, str) else tuple(map(str, input))
    config = BatchConfig(output=str(output), **options)
    if made is None and config.method != AUTO:
        made = make_method(config.method, config.settings)
    check_output(config.output, (), config.overwrite or config.resume)
    if config.engine == "ray" and not isinstance(model, str):
        raise ConfigError("engine='ray' loads the model in its workers: give its name, not a loaded model")
    with lock_output(config.output) as lock, _cluster(config, check) as cluster:
        intake = open_input(config)
        run = prepare(intake, model if cluster is None else cluster.open_model(config), made)
        for text in run.notes:
            note(text)
        engine = OneProcess(run, check, note) if cluster is None else cluster.engine(run, note)
        return answer_all(run, engine, progress=progress, note=note, check=check, still_locked=lock.check)


def _cluster(config: BatchConfig, check: Callable[[], None]) -> AbstractContextManager[RayCluster | None]:
    """Where the workers of a run will be, if it has any."""
    if config.engine == "local":
        return nullcontext()
    from pipeline.engines.ray_cluster import RayCluster

    return RayCluster(config, check)


def open_input(config: BatchConfig) -> Intake:
    """The rows of a run, its output checked against the files that they come from."""
    intake = open_rows(config)
    check_output(config.output, intake.source.files, config.overwrite or config.resume)
    return intake


def answer_all(
    run: Preparation,
    engine: Engine,
    *,
    progress: Progress,
    note: Note,
    check: Callable[[], None],
    still_locked: Callable[[], None] = _nothing,
) -> Summary:
    """Run every new row through the model, into the journal, and publish the output."""
    config, decides = run.config, run.decides()
    summary = Summary(method=run.method.name, output=config.output)
    note_length = _once(run, note)
    with open_journal(
        config.output,
        run.schema(),
        decides,
        resume=config.resume,
        retry_errors=config.retry_errors,
        overwrite=config.overwrite,
        check=still_locked,
    ) as journal:
        if journal.resumed:
            note(f"resuming: {journal.done_at_start.total():,} rows are done")

        def taken_in(windows: Iterable[Window | None]) -> Iterator[list[Item] | None]:
            for window in windows:
                if window is not None:
                    expect(summary, window, journal)
                    note_length(window.items)
                yield window and window.items

        with closing(ahead(read_windows(run, journal), WINDOWS_AHEAD, check, engine.patience_s)) as read:
            for answers in engine.answers(taken_in(read)):
                journal.append(answers)
                summary.add(answers)
                summary.workers = engine.workers
                progress(summary)
                stop_if_broken(config, summary)
                check()
        summary.times = engine.times
        written = journal.publish(cast(Order, config.order), check)
        if journal.resumed and not summary.documents:
            note(f"nothing new: every row was done{'' if written else f'; {config.output} stays as it is'}")
    summary.finish()
    if summary.documents:
        progress(summary)
    return summary


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


def read_windows(run: Preparation, journal: Journal) -> Iterator[Window]:
    """The new rows, tokenized."""
    rows = run.rows()
    for items in windows(
        run.encode(new_rows(rows, journal, renames=run.source.columns.takes_ids)), item_tokens
    ):
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


def stop_if_broken(config: BatchConfig, summary: Summary) -> None:
    """Raise TooManyErrors when more rows have failed than `--max-errors` allows."""
    if config.max_errors is None:
        return
    bound, per_cent = parse_max_errors(config.max_errors)
    failed, finished = summary.status["error"], summary.documents
    if per_cent and (finished < FEWEST_FOR_PER_CENT or failed <= bound / 100 * finished):
        return
    if not per_cent and failed <= bound:
        return
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary.errors.most_common(3))
    raise TooManyErrors(
        f"{failed:,} of {finished:,} rows failed ({kinds}), more than --max-errors {config.max_errors} allows"
        "; finished rows are kept: mend the cause, then --resume --retry-errors"
    )
