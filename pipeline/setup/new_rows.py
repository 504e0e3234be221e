"""Which rows of the input are new: by their ids, and by a hash of all that their prompts have of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, replace

from pipeline.outputs.finished import FinishedRows
from pipeline.records import AS_THE_RUN, Document, Record, RowError, SamplingParams

PARAMS = tuple(field.name for field in fields(SamplingParams))


def new_rows(records: Iterable[Record], done: FinishedRows, *, renames: bool = False) -> Iterator[Record]:
    """Leave out what an earlier run has finished; an id that comes twice becomes a failure.

    With `renames` the row's number is added instead: ids that nobody named may be what they are.
    All questions of a row have one id, or fail. What stands for rows that could not be read never takes the
    place of an answer to one of them.
    """
    for record in records:
        row = record.source
        is_fault = isinstance(record, RowError) and record.is_fault
        ids = [row.document_id, f"{row.document_id}-"]
        if not is_fault:
            try:
                ids = [done.document_id(row, renames=renames)]
            except RowError as error:
                yield error.at(_hashed(record, row.document_id).source)
                continue
        failures: list[RowError] = []
        for each in (_hashed(record, id) for id in ids):
            try:
                if not done.is_done(each.source, each.source.row_hash or "", is_fault=is_fault):
                    yield each
                break
            except RowError as error:
                failures.append(error.at(each.source))
        else:
            yield failures[0]


def note_id(record: Record, done: FinishedRows, *, renames: bool) -> None:
    """Note that a row has its id, whether it will be answered or is left out."""
    if not (isinstance(record, RowError) and record.is_fault):
        with suppress(RowError):  # which the row will be, if it is one to answer
            done.document_id(record.source, renames=renames)


def _hashed(record: Record, id: str) -> Record:
    record = replace(record, source=record.source.called(id))
    return replace(record, source=replace(record.source, row_hash=row_hash(record)))


def row_hash(record: Record) -> str:
    """32 hex digits of all that a row's prompt has of it, or of what ails it; they tell if it changed."""
    if isinstance(record, Document):
        texts = [record.source.id, record.text, record.question or ""]
        texts += [text for turn in record.source.turns for text in (turn.role, turn.between, *turn.texts)]
        texts += [text for field in sorted(record.source.fields.items()) for text in field]
        if record.source.params is not AS_THE_RUN:
            for name in PARAMS:
                value = getattr(record.source.params, name)
                texts += [] if value is None else [name, json.dumps(value)]
    else:
        texts = [record.source.id, record.kind, record.message, record.source.question or ""]
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
