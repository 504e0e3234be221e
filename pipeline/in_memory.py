"""Rows in memory, and their answers as an iterator: nothing is read from files, and nothing written."""

from __future__ import annotations

import gc
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from pipeline.bookkeeping import Books, Note, Progress
from pipeline.engines.blocks import Key, key_of
from pipeline.engines.one_process import Hooks, OneProcess
from pipeline.engines.prefetch import ahead
from pipeline.errors import HANDED_OUT, InputError, MarsError, ending, keeps_nothing
from pipeline.inputs.given import GivenReader, MappingReader, Watched, open_given
from pipeline.inputs.table_rows import python_value
from pipeline.notebooks import listeners
from pipeline.outputs.answers import answers_table, halves
from pipeline.outputs.finished import NothingFinished
from pipeline.outputs.layout import RowLayout, Together
from pipeline.records import Answer, RowError
from pipeline.run import WINDOWS_AHEAD, configured, deadline_of, read_windows
from pipeline.settings.keywords import StrPath, called_with
from pipeline.settings.model_settings import WeightsSettings
from pipeline.settings.option import settings_of
from pipeline.settings.run_settings import BatchConfig, EngineSettings, OverwriteSettings, ResumeSettings
from pipeline.setup.intake import Item, open_rows
from pipeline.setup.preparation import prepare
from pipeline.storage.causes import cause
from pipeline.summary import Summary

if TYPE_CHECKING:
    from pipeline.model.loading import LoadedModel
    from pipeline.pruning.base import PruningMethod

MOST_WAITING = 1024  # answers whose turn has not come; until it does, no more rows are taken
# what a configuration must name, and what has no meaning without files or with them alone
PLACES = {"input": ("rows",), "output": "answers.arrows"}
FILES_ALONE = frozenset(
    {*PLACES, "retry_errors", "drop_missing", "sort_by_document"}
    | {
        each.name
        for group in (EngineSettings, ResumeSettings, OverwriteSettings)
        for each in settings_of(group)
    }
)


def answer(
    rows: Any,
    *,
    model: StrPath | LoadedModel = WeightsSettings.model,
    method: str | PruningMethod | None = None,
    question: str | None = None,
    progress: Progress | None = None,
    note: Note = lambda text: None,
    check: Callable[[], None] = lambda: None,
    phase: Note | None = None,
    **options: Any,
) -> Answers:
    """Answer rows that are in memory; iterating what is returned yields their answers, as they end.

    `rows` is an iterable of mappings (dicts), or a table: of pyarrow, pandas or Polars, or whatever else has
    `__arrow_c_stream__`, or an iterable of such tables. An iterable may be endless: some thousand rows are
    read ahead, in another thread, and no more are held. An answer is a dict: the fields of
    pipeline.records.Answer, or those that `columns` names, then the row's own columns but those of text,
    question and id. They come in the order of the rows, with `order="completion"` as they end. A row that
    cannot be answered is one of them, whose `status` is `error`.

    `frame()` takes all that is left as the kind of table that the rows came in, `table()` as one of pyarrow;
    `pa.table(answers)` and `polars.DataFrame(answers)` do, too. The weights are loaded when the first answer
    is asked for, unless `model` is one that `load_model` returned, which answers for one run at a time.
    `close()`, or the end of a `with`, gives the device back early. `progress`, `note`, `check` and `phase`
    are as those of `run_batch`, `options` the other fields of `BatchConfig`, without those of files and Ray.

    Raises ConfigError, InputError or ModelError at once, before any weights are loaded; iterating raises
    ConfigError where the model is answering other rows, TooManyErrors by `max_errors`, DeadlineReached by
    `deadline`, and behind the answers of the rows before it what `rows` itself raises.
    """
    progress, phase = listeners(progress, phase)
    options = called_with("answer", BatchConfig, {**options, "question": question}, note, without=FILES_ALONE)
    config, made, model = configured(options | PLACES, model, method)
    given = open_given(rows, config.keep_columns)
    if isinstance(given, MappingReader):
        config = replace(config, keep_columns="")  # which the reader copies by itself
    run = prepare(open_rows(config, given), model, made)
    for text in run.notes:
        note(text)
    summary = Summary(method=run.method.name, output="in memory", price_per_hour=config.price_per_hour)
    deadline = deadline_of(run.config, summary, check)
    hooks = Hooks(check=ending(deadline.check), note=ending(note), phase=ending(phase))
    engine = OneProcess(run, hooks)
    books = Books(run=run, engine=engine, summary=summary, progress=progress, hooks=hooks, deadline=deadline)
    answers = _answers(books, given.watched)
    if isinstance(model, str):
        answers = _given_back(answers)
    return Answers(answers, run.schema(), given, summary, run.layout)


class Answers(Iterator[dict[str, Any]]):
    """Answers of rows in memory, as `answer` returns them: an iterator of dicts, which can be closed early.

    `summary` counts those so far, and is complete at their end. `frame()` and `table()` take all that are
    left at once; where they raise, what was answered until then can still be iterated.
    """

    def __init__(
        self,
        answers: Generator[Answer, None, None],
        schema: pa.Schema,
        rows: GivenReader,
        summary: Summary,
        layout: RowLayout,
    ) -> None:
        """`schema` is that of a table of `answers`, without keys of mappings, and `rows` what they answer."""
        self.summary = summary
        self._answers, self._schema, self._rows, self._layout = answers, schema, rows, layout
        self._names = halves(schema)[0].names
        self._together = Together(layout.answers_a_row)
        self._taken: deque[list[Answer]] = deque()  # for a table that could not be made

    def __next__(self) -> dict[str, Any]:
        of_row = self._taken.popleft() if self._taken else self._next_row()
        return {**self._layout.row_of(of_row, self._names), **_copied(of_row[0])}

    def _next_row(self) -> list[Answer]:
        """The answers of the next row. Raises StopIteration behind the last one."""
        while True:
            for of_row in self._together.take([next(self._answers)]):
                return of_row

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End early: what the device holds for these rows is given back, and no more of them are read."""
        self._taken.clear()
        self._answers.close()

    def frame(self) -> Any:
        """All answers that are left, as what the rows came in: a frame of pandas or Polars, else `table()`.

        One of pandas has the index of the rows. Raises as `table`.
        """
        return self._rows.as_given(self.table())

    def table(self) -> pa.Table:
        """All answers that are left. Raises InputError for keys of mappings whose values have no type.

        Raises, too, what iterating does.
        """
        for answer in self._answers:
            self._taken.extend(self._together.take([answer]))
        table = self._as_table(list(self._taken))
        self._taken.clear()
        return table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """All that are left, for who takes tables over from Arrow: pyarrow, Polars, pandas, DuckDB."""
        return self.table().__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        return f"<Answers {self.summary}>"

    def _repr_html_(self) -> str:
        return self.summary._repr_html_()

    def _as_table(self, rows: Sequence[Sequence[Answer]]) -> pa.Table:
        answers = [answer for of_row in rows for answer in of_row]
        if not isinstance(self._rows, MappingReader):
            return self._laid_out(answers)
        firsts = [of_row[0] for of_row in rows]
        own = self._laid_out([replace(each, passthrough=None) for each in answers])
        for name in dict.fromkeys(name for each in firsts for name in each.passthrough or {}):
            own = own.append_column(str(name), _column(name, firsts))
        return own

    def _laid_out(self, answers: Sequence[Answer]) -> pa.Table:
        table = answers_table(answers, self._schema)
        return self._layout.laid_out(table, self._layout.file_schema(self._schema))


def _answers(books: Books, rows: Watched[Any]) -> Generator[Answer, None, None]:
    """Answers one by one, over the parts of a run; at their end the run's books are closed."""
    run, engine, summary, check = books.run, books.engine, books.summary, books.hooks.check
    turns = Turns(in_order=run.config.order == "input")
    try:
        books.begin()
        read = read_windows(run, run.rows(), NothingFinished(), summary)
        with (
            closing(ahead(read, WINDOWS_AHEAD, check, engine.patience_s)) as windows,
            closing(engine.answers(turns.taken(map(books.taken, windows)))) as answered,
        ):
            for answers in answered:
                turns.put(answers)
                books.saved(answers, Counter())
                yield from turns.due()
                check()
    except MarsError as error:
        if isinstance(error, InputError) and rows.failure is not None:
            raise rows.failure from error  # without which there would have been more rows
        keeps_nothing(error, HANDED_OUT)
        yield from turns.rest()
        raise
    finally:
        summary.times, summary.in_output = engine.times, Counter(summary.status)
    books.end()
    if rows.failure is not None:
        raise rows.failure


class Turns:
    """Puts answers into the order in which their rows were taken."""

    def __init__(self, *, in_order: bool) -> None:
        """Without `in_order` each answer has its turn at once."""
        self._in_order = in_order
        self._turns: deque[Key] = deque()
        self._waiting: dict[Key, Answer] = {}

    def taken(self, windows: Iterable[Sequence[Item] | None]) -> Iterator[Sequence[Item] | None]:
        """The same windows, each when few answers wait for those before them; until then None."""
        for window in windows:
            if self._in_order:
                self._turns.extend(key_of(item.source) for item in window or ())
            yield window
            while len(self._waiting) >= MOST_WAITING:
                yield None

    def put(self, answers: Sequence[Answer]) -> None:
        """Take in answers, of rows that were taken."""
        self._waiting |= {key_of(answer): answer for answer in answers}
        if not self._in_order:
            self._turns.extend(map(key_of, answers))

    def due(self) -> Iterator[Answer]:
        """The answers whose turn has come."""
        while self._turns and self._turns[0] in self._waiting:
            yield self._waiting.pop(self._turns.popleft())

    def rest(self) -> Iterator[Answer]:
        """All answers that there are, though rows before them have none."""
        for key in self._turns:
            if key in self._waiting:
                yield self._waiting.pop(key)


def _copied(answer: Answer) -> dict[str, Any]:
    """A row's own columns, as Python's values."""
    row = answer.passthrough
    if row is None or isinstance(row, Mapping):
        return dict(row or {})
    values = {name: python_value(row.column(name)[0]) for name in row.schema.names}
    return {name: None if isinstance(value, RowError) else value for name, value in values.items()}


def _column(name: str, answers: Sequence[Answer]) -> pa.Array:
    values = [(answer.passthrough or {}).get(name) for answer in answers]
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"the values of {name!r} are no column of a table ({cause(error)}): leave it out by "
            "keep_columns, or iterate the answers, which are all still there"
        ) from error


def _given_back(answers: Generator[Answer, None, None]) -> Generator[Answer, None, None]:
    """The same; behind the last one, or where they are closed, the weights that they loaded are freed."""
    try:
        yield from answers
    finally:
        answers.close()
        del answers  # and with it the engine and its model
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
