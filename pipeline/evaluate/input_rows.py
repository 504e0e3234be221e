"""The rows of a check's input: what is read of them, under which ids, and as samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.inputs.reading import Heed, each_question, select_rows
from pipeline.inputs.source import Source
from pipeline.outputs.finished import FinishedRows
from pipeline.outputs.rowindex import scratch_index
from pipeline.records import Document, Row, RowError
from pipeline.settings.data_settings import DataSettings
from pipeline.settings.parse import parse_shard
from pipeline.settings.row_settings import RowSettings
from pipeline.setup.intake import open_columns
from pipeline.setup.new_rows import note_id
from pipeline.suites.samples import Sample, document_key, part_of, parted, references_of
from pipeline.texts.redaction import bare

METRIC = "token_f1"  # of the user's own references


def open_documents(config: RowSettings) -> tuple[Source | None, tuple[str, ...]]:
    """The input, if there is one, and what to say of its columns."""
    if not config.input:
        return None, ()
    if config.has_needles and "-" in config.input:
        raise ConfigError("--suite needles reads INPUT twice: save the standard input to a file")
    if not config.asks_rows:  # documents that facts are hidden in, whose ids and questions nobody asks for
        texts = DataSettings(**config.options_of(DataSettings))
        source, found = open_columns(texts, {}, asks=False)
        return source, found.notes
    unnamed = replace(config, task_column=None)
    source, settled = open_columns(unnamed, _kept(config), asked=config.asked_questions())
    return source, settled.notes


def input_samples(
    config: RowSettings, documents: Source | None, tasks: dict[str, None]
) -> tuple[list[Sample], list[str]]:
    """Those of the input's rows in the shard of documents, where they are asked, and why others are none.

    A row that cannot be read is of every shard. Tasks that rows name are added to `tasks`.
    """
    if documents is None or not config.asks_rows:
        return [], []
    records = _with_ids(config, documents)
    return parted(_sample(config, record, tasks) for record in records if _is_taken(config, record))


def _is_taken(config: RowSettings, record: Document | RowError) -> bool:
    return isinstance(record, RowError) or in_document_shard(config, document_key(record.text))


def _with_ids(config: RowSettings, source: Source) -> Iterator[Document | RowError]:
    """The rows that are asked for, under the ids that `batch` gives them where nobody named their column."""
    if not source.columns.takes_ids:
        yield from read_documents(config, source)
        return
    with scratch_index() as index:
        ids = FinishedRows(index)
        for record in read_documents(config, source, partial(note_id, done=ids, renames=True)):
            if isinstance(record, Document):
                id = ids.document_id(record.source, renames=True)
                record = replace(record, source=record.source.called(id))
            yield record


def read_documents(
    config: RowSettings, source: Source, heed: Heed | None = None
) -> Iterator[Document | RowError]:
    """The rows of the input that are asked for, a record for each question; StorageError if some are lost.

    `heed` is shown each row before, and rows that are not asked for.
    """
    for row in select_rows(source, config, source.total_rows, heed):
        yield from each_question(row, source.columns.asked)
    source.refuse_out_of_reach("nothing was measured")


def in_document_shard(config: RowSettings, key: str) -> bool:
    """Whether the document with this key is in the shard of documents."""
    if config.document_shard is None:
        return True
    part, parts = parse_shard(config.document_shard, "--document-shard")
    return part_of(key, parts) == part - 1


def _kept(config: RowSettings) -> dict[str, None]:
    """The columns that are read beside text, question and id."""
    names = (config.reference_column, config.task_column)
    return dict.fromkeys(name for name in names if name is not None)


def _sample(config: RowSettings, record: Document | RowError, tasks: dict[str, None]) -> Sample | str:
    """A row of the data, or why it is left out; the task that it names is added to `tasks`."""
    if isinstance(record, RowError):
        return record.message
    if record.source.turns:
        what = "messages, or is a request of OpenAI's Batch API"
        return f"{record.source.place} has {what}, which marsinfer batch alone answers"
    task = Path(bare(config.input[0])).name.partition(".")[0] if len(config.input) == 1 else ""
    if config.task_column is not None:
        task = str(_cell(config, record.source, config.task_column) or "")
        if not task:
            return f"{record.source.place}: no task in column {config.task_column!r}"
    task = task or "data"
    tasks[task] = None
    references: tuple[str, ...] = ()
    if config.reference_column is not None:
        references = references_of(_cell(config, record.source, config.reference_column))
        if not references:
            return f"{record.source.place}: no reference in column {config.reference_column!r}"
    return Sample(
        id=record.source.id,
        task=task,
        text=record.text,
        question=record.question or "",
        references=references,
        metric=METRIC,
        document_key=document_key(record.text),
        fields=record.source.fields,
        facets={"place": record.source.place},
    )


def _cell(config: RowSettings, source: Row, column: str) -> Any:
    assert isinstance(source.passthrough, pa.RecordBatch)
    # by place: a column that has the name of one of batch's output is renamed
    return source.passthrough.column(list(_kept(config)).index(column))[0].as_py()
