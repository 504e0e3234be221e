"""The rows that a run takes from its input, a record for each question, and how far it has read them.

It takes a shard of them, a sample of that, and of that the first ones. Nothing is kept but counts. A sample
draws a row with the chance (rows still wanted) / (rows still to come), so that exactly as many come out as
were asked for; whether it does hangs on the seed and the row's number alone. That needs the number of rows:
where no file tells it (JSON lines, Arrow streams), the input is read once before to count them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from pipeline.errors import ConfigError
from pipeline.inputs.source import Source
from pipeline.records import AS_THE_RUN, Document, Record, RowError, SamplingParams
from pipeline.settings.data_settings import DataSettings
from pipeline.settings.parse import parse_shard
from pipeline.settings.questions import AskedQuestion
from pipeline.structured.grammars import json_schema_format
from pipeline.values.json_answers import schema_text

Heed = Callable[[Record], object]  # is shown a row


class Reading:
    """Iterating yields the records of a run; what is known of their number grows meanwhile.

    Where only some rows are taken it ends at a file that is out of reach: which rows of the others they are
    hangs on the number of its rows.
    """

    def __init__(self, source: Source, config: DataSettings) -> None:
        self._source, self._config = source, config
        self._rows = self._records = 0
        self._ended = False

    def __iter__(self) -> Iterator[Record]:
        return self.records()

    def records(self, heed: Heed | None = None) -> Iterator[Record]:
        """What iterating yields; `heed` is shown each row before it, and rows that are not taken."""
        for record in select_rows(self._source, self._config, self._source.total_rows, heed):
            if self.is_selective and self._source.out_of_reach:
                return
            self._rows += 1
            for each in each_question(record, self._source.columns.asked):
                self._records += 1
                yield each
        self._ended = True

    @property
    def is_selective(self) -> bool:
        """Whether the run takes only some of the rows."""
        return any(each is not None for each in (self._config.limit, self._config.sample, self._config.shard))

    @property
    def saw_all(self) -> bool:
        """Whether all rows of the input have been read: only then one that did not come is gone."""
        return self._ended and not (self.is_selective or self._source.has_faults or self._source.out_of_reach)

    @property
    def fraction_read(self) -> float:
        return self._source.fraction_read

    @property
    def total(self) -> int | None:
        """How many records there will be: exact for rows with a question each, else an estimate, or None."""
        if self._ended:
            return self._records
        return self._as_records(selected_rows(self._config, self._source.total_rows))

    @property
    def most(self) -> int | None:
        """A number that they will not exceed, likewise."""
        return self._as_records(most_rows(self._config))

    def _as_records(self, rows: int | None) -> int | None:
        if rows is None or not self._rows:
            return rows
        return round(rows * self._records / self._rows)


def each_question(record: Record, asked: Sequence[AskedQuestion] = ()) -> Iterable[Record]:
    """A row with several questions as a record for each; a question that cannot be asked is a failure.

    `asked` are those with names, which stand for a row's own; of a row that has failed each fails.
    """
    if asked:
        yield from (_named(record, index, each) for index, each in enumerate(asked))
        return
    if isinstance(record, RowError) or record.questions is None:
        yield record
        return
    for index, question in enumerate(record.questions):
        row = record.source
        source = replace(row, place=f"{row.place} question {index}", question_index=index).called(row.id)
        if isinstance(question, str):
            yield Document(source=replace(source, question=question), text=record.text)
        else:
            message = f"{row.place}: {question}"
            yield RowError(source=source, kind=question.kind, message=message)


def _named(record: Record, index: int, asked: AskedQuestion) -> Record:
    """The record of a question with a name, about a row's document."""
    row, own = record.source, SamplingParams(max_new_tokens=asked.max_new_tokens)
    if asked.schema is not None:
        form = json_schema_format(dict(asked.schema)) if asked.is_form else None
        own = replace(own, schema=schema_text(asked.schema), response_format=form)
    source = replace(
        row,
        question=asked.question,
        question_index=index,
        question_name=asked.name,
        params=AS_THE_RUN if own == AS_THE_RUN else own,
        place=f"{row.place} question {asked.name}",
    )
    return replace(record, source=source.called(row.id))


def select_rows(
    source: Iterable[Record], config: DataSettings, total_rows: int | None, heed: Heed | None = None
) -> Iterator[Record]:
    """The rows of `source` that `config` asks for, in their order and with their own row numbers.

    `heed` is shown each row of `source` as it comes. Raises ConfigError for a sample of an input that can be
    read only once.
    """
    rows = _shard(source if heed is None else _heeded(source, heed), config)
    if config.sample is not None:
        count = _rows_of_shard(config, total_rows)
        if count is None:
            count = _count(source, config)
        rows = _sample(rows, config.sample, count, config.seed)
    return islice(rows, config.limit)


def selected_rows(config: DataSettings, total_rows: int | None) -> int | None:
    """How many rows `select_rows` will yield, where that is known before reading."""
    count = _rows_of_shard(config, total_rows)
    most = most_rows(config)
    return count if count is None or most is None else min(count, most)


def most_rows(config: DataSettings) -> int | None:
    """The number that `select_rows` will not exceed, however many rows there are; None without a bound."""
    return min((bound for bound in (config.sample, config.limit) if bound is not None), default=None)


def _shard(source: Iterable[Record], config: DataSettings) -> Iterator[Record]:
    if config.shard is None:
        return iter(source)
    part, parts = parse_shard(config.shard)
    return (record for record in source if record.source.row % parts == part - 1)


def _heeded(source: Iterable[Record], heed: Heed) -> Iterator[Record]:
    for record in source:
        heed(record)
        yield record


def _rows_of_shard(config: DataSettings, total_rows: int | None) -> int | None:
    if total_rows is None or config.shard is None:
        return total_rows
    part, parts = parse_shard(config.shard)
    return len(range(part - 1, total_rows, parts))


def _count(source: Iterable[Record], config: DataSettings) -> int:
    pipes = [path for path in getattr(source, "files", ()) if not path.is_file()]
    if isinstance(source, Iterator) or pipes:
        name = str(pipes[0]) if pipes else "the input"
        raise ConfigError(
            f"--sample counts the rows first, and {name} can be read only once: "
            "save it to a file, or use --limit"
        )
    return sum(1 for _ in _shard(source, config))


def _sample(rows: Iterable[Record], wanted: int, left: int, seed: int) -> Iterator[Record]:
    """Knuth's selection sampling: `wanted` of the `left` rows, in one pass."""
    for record in rows:
        if wanted < 1:
            return
        if _uniform(seed, record.source.row) * left < wanted:
            wanted -= 1
            yield record
        left -= 1


def _uniform(seed: int, row: int) -> float:
    """A number in [0, 1) for a row; unlike Python's own hash it is the same in every process and release."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=7).digest()
    return (int.from_bytes(digest) >> 3) / 2**53
