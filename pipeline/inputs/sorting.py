"""Rows put together by their documents, on disk: those about one document follow each other."""

from __future__ import annotations

import io
import pickle
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from pipeline.inputs.table_rows import as_stream, lone
from pipeline.records import Document, Record
from pipeline.storage.causes import told

# A text is kept once, however many rows ask about it; documents are numbered as they first come.
_SETUP = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -8192;
CREATE TABLE documents (number INTEGER PRIMARY KEY, digest BLOB UNIQUE, text BLOB);
CREATE TABLE rows (document INTEGER, place INTEGER, record BLOB, PRIMARY KEY (document, place))
    WITHOUT ROWID;
"""


def by_document(records: Iterable[Record]) -> Iterator[Record]:
    """All `records`, those with one text behind the first of them; failures keep their place among these.

    They are read to the end before the first comes out, and wait in a file that has no name, where SQLite
    keeps temporary ones (`TMPDIR`): in memory are a few of them. Raises StorageError where there is no room.
    """
    remedy = "; let TMPDIR name a folder with room for all texts"
    failures_told = told("the rows cannot be sorted by document", remedy, of=sqlite3.Error)
    # an empty name: a database on disk that is gone with this process, however that ends
    with failures_told, closing(sqlite3.connect("", check_same_thread=False)) as database:
        database.executescript(_SETUP)
        for place, record in enumerate(records):
            row = _document(database, record), place, _packed(record)
            database.execute("INSERT INTO rows VALUES (?, ?, ?)", row)
        yield from _stored(database)


def _document(database: sqlite3.Connection, record: Record) -> int | None:
    """The number of a record's document; a failure has one of its own."""
    if not isinstance(record, Document):
        return database.execute("INSERT INTO documents (digest) VALUES (NULL)").lastrowid
    text = record.text.encode()
    digest = blake2b(text, digest_size=16).digest()
    found = database.execute("SELECT number FROM documents WHERE digest = ?", (digest,)).fetchone()
    if found is not None:
        return found[0]
    return database.execute("INSERT INTO documents (digest, text) VALUES (?, ?)", (digest, text)).lastrowid


def _stored(database: sqlite3.Connection) -> Iterator[Record]:
    number, text = None, ""
    for document, packed in database.execute("SELECT document, record FROM rows ORDER BY document, place"):
        record = pickle.loads(packed)
        if isinstance(record, Document):
            if document != number:
                query = "SELECT text FROM documents WHERE number = ?"
                number, text = document, database.execute(query, (document,)).fetchone()[0].decode()
            record = replace(record, text=text)
        yield record


def _packed(record: Record) -> bytes:
    """A record without its text."""
    packed = io.BytesIO()
    _Pickler(packed).dump(replace(record, text="") if isinstance(record, Document) else record)
    return packed.getvalue()


class _Pickler(pickle.Pickler):
    """Takes of a row that is part of a batch, whose buffers pickle would take whole, what is its own."""

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, pa.RecordBatch):
            return NotImplemented
        columns = [lone(column) for column in value.columns]
        row = pa.RecordBatch.from_arrays(columns, schema=value.schema)
        return _row, (as_stream(row).to_pybytes(),)


def _row(stream: bytes) -> pa.RecordBatch:
    return pa.ipc.open_stream(stream).read_next_batch()
